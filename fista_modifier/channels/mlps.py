"""The tokens of an MLP of a partly pruned layer, from runs of the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fista_modifier.calibration.activations import MAIN_MEMORY, ActivationStorage
from fista_modifier.calibration.calls import LayerCall, LayerInputs
from fista_modifier.calibration.observed import real_inputs_of
from fista_modifier.calibration.padding import RealTokens, real_rows
from fista_modifier.calibration.replays import Replays
from fista_modifier.channels.groups import ChannelGroup
from fista_modifier.models.experts import routing_real_tokens
from fista_modifier.models.operators import Operator, replaced_weights
from fista_modifier.structured.alternating import MLPBatch

__all__ = ["MLPTokens"]


class MLPTokens:
    """
    The tokens of an MLP with a linear producer: its inputs, and the outputs
    that it should have.

    Each batch has x*, a* and y. x* is the input of the linear producer in the partly
    pruned layer. a* is what the consumer reads there if all outputs of the linear
    producer are ones. y is W X, the consumer's output in the dense layer without its
    bias. x* and a* come from a run of the smallest module around the MLP, anew each
    time they are asked for. Only the inputs of that module and y are kept, which are
    two hidden states for each token.

    :param group: a channel group with a linear producer
    :param channels: the group's channels that stay, in the order of the consumer's
        columns
    :param replays: the runs that show the consumer's X and X*
    :param calls: how often the operators are called in one run of the layer
    :param real_tokens: for each batch, what is not padding
    :param storage: where y waits between the passes
    :param on_batch: called after each batch of each pass, for a progress bar
    """

    def __init__(
        self,
        group: ChannelGroup,
        channels: Tensor,
        replays: Replays,
        calls: int,
        real_tokens: Sequence[RealTokens],
        storage: ActivationStorage = MAIN_MEMORY,
        on_batch: Callable[[], object] = lambda: None,
    ) -> None:
        assert group.linear is not None, "there is a linear producer"
        self._producer, rows = group.linear
        self._consumer, columns = group.consumers[0]
        self.rows = rows[channels, 0]
        """The rows of the linear producer that belong to the channels that stay."""
        self._columns = columns[channels, 0]
        self._replays = replays
        self._calls = calls
        self._real_tokens = real_tokens
        self._storage = storage
        self._on_batch = on_batch
        self._inputs, self._places = self._narrowed(group.operators)
        self._outputs = [
            storage.keep(self._dense_outputs(batch))
            for batch in range(len(real_tokens))
        ]

    def __iter__(self) -> Iterator[MLPBatch]:
        """
        Yield the tokens of each batch, any number of times.

        :return: x*ᵀ (with a last feature of ones if the linear producer has a bias),
            a*ᵀ and yᵀ = (W X)ᵀ of each batch
        """
        for batch, outputs in enumerate(self._outputs):
            inputs, activations = self._tokens(batch)
            yield MLPBatch(inputs, activations, outputs.to(inputs.device))
            self._on_batch()

    def fault(self) -> str | None:
        """
        Say why the tokens are not those of one MLP.

        :return: the reason; None if they are
        """
        for inputs, activations, outputs in self:
            assert activations is not None, "what the channels are multiplied by"
            if not len(inputs) == len(activations) == len(outputs):
                return (
                    f"{self._consumer.name} reads {len(activations)} tokens in the "
                    f"partly pruned layer, {len(outputs)} in the dense one, and "
                    f"{self._producer.name} {len(inputs)}"
                )
        return None

    def _narrowed(
        self, operators: Iterable[Operator]
    ) -> tuple[LayerInputs, list[int | None]]:
        """
        Record what the smallest module around the MLP is called with. If that is the
        layer itself, or the operators are called several times, the inputs for X* serve
        as they are.

        :return: the inputs, and the place of each batch in them, which is None if the
            batch does not reach the module
        """
        around = self._replays.pruned
        module = _smallest_around(around.layer, operators)
        if module is around.layer or self._calls > 1:
            return around, list(range(len(around)))
        inputs = LayerInputs(module, self._storage)
        places: list[int | None] = []
        with replaced_weights(self._replays.weights, self._replays.biases):
            for call, real in zip(around, self._real_tokens, strict=True):
                before = len(inputs)
                with routing_real_tokens(call.layer, real.own):
                    inputs.follow(call)
                places.append(before if len(inputs) > before else None)
        return inputs, places

    def _tokens(self, batch: int) -> tuple[Tensor, Tensor]:
        place, real = self._places[batch], self._real_tokens[batch]
        if place is None:  # no token of the batch is routed to this expert
            return self._cat([], self._producer), self._cat([], self._consumer)
        call = self._inputs[place]
        modules = {self._producer.module: self._calls}
        modules[self._consumer.module] = self._calls
        hook = self._producer.module.register_forward_hook(self._put_out_ones)
        with hook, replaced_weights(self._replays.weights, self._replays.biases):
            seen = real_inputs_of(modules, call, real)
        inputs, activations = (
            self._cat(seen[operator.module], operator)
            for operator in (self._producer, self._consumer)
        )
        if self._producer.module.bias is not None:
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
        return inputs, activations[:, self._columns.to(activations.device)]

    def _cat(self, rows: list[Tensor], operator: Operator) -> Tensor:
        weight = operator.weight
        return torch.cat([weight.new_empty(0, weight.shape[1]), *rows])

    def _put_out_ones(
        self, _module: torch.nn.Module, _args: Any, output: Tensor
    ) -> Tensor:
        return output.index_fill(-1, self.rows.to(output.device), 1)

    def _dense_outputs(self, batch: int) -> Tensor:
        """Return yᵀ = (W X)ᵀ of one batch, float32 tokens×m."""
        real, recorded = self._real_tokens[batch], self._replays.outputs
        weight, bias = self._consumer.weight, self._consumer.module.bias
        if recorded is not None:
            found = real_rows(recorded[batch], real.own).to(weight.device).float()
            return found if bias is None else found - bias.float()
        call: LayerCall = self._replays.dense[batch]
        seen = real_inputs_of({self._consumer.module: self._calls}, call, real)
        rows = seen[self._consumer.module]
        return self._cat(rows, self._consumer).float() @ weight.float().T


def _smallest_around(
    layer: torch.nn.Module, operators: Iterable[Operator]
) -> torch.nn.Module:
    """Return the innermost module of a layer that has all of the operators in it."""
    inside = {operator.module for operator in operators}
    *_, innermost = (one for one in layer.modules() if inside <= {*one.modules()})
    return innermost
