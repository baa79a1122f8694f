"""The shape of a model's decoder layers, from its configuration alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from loguru import logger
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, PreTrainedModel

from fista_modifier.calibration.calls import LayerCall
from fista_modifier.calibration.stages import find_stages
from fista_modifier.models.classes import weightless_model
from fista_modifier.models.experts import linearize_weightless
from fista_modifier.models.layers import (
    DecoderLayer,
    group_by_layer,
    layer_targets,
)
from fista_modifier.models.operators import Operator, blocks_of
from fista_modifier.models.targets import find_operators
from fista_modifier.pruning.corrected import ErrorCorrection
from fista_modifier.solver.drift import narrows

__all__ = ["LayerShape", "StageShape", "shape_of"]

WATCHED = 4096
"""
The most tokens in a sequence that a layer is watched with. The cost of longer sequences
is extrapolated.
"""


@dataclass(frozen=True)
class StageShape:
    """
    The sizes of a stage, whose operators receive one and the same tensor.

    :param columns: n, the input features of each operator
    :param rows: m, the output features of each operator
    :param wave: number of the wave that the stage is in
    :param block: number of the block of the layer that the stage is in
    :param returned: whether the block returns the output of the stage's only operator
    :param share: share of the tokens that reach the stage; below 1 for an expert of a
        mixture
    :param routed: whether the stage is given a choice of the tokens, as an expert is
    :param names: names of the operators, inside the layer
    """

    columns: int
    rows: tuple[int, ...]
    wave: int
    block: int
    returned: bool
    share: float = 1.0
    routed: bool = False
    names: tuple[str, ...] = ()

    def only(self, names: Collection[str]) -> StageShape | None:
        """
        Return the stage with only some of its operators.

        :param names: names of operators, inside the layer
        :return: the stage without all other operators; None if none is left
        """
        chosen = [
            (name, rows)
            for name, rows in zip(self.names, self.rows, strict=True)
            if name in names
        ]
        if not chosen:
            return None
        return replace(
            self,
            names=tuple(name for name, _ in chosen),
            rows=tuple(rows for _, rows in chosen),
        )

    @property
    def weights(self) -> int:
        """Entries of the weights of all operators."""
        return self.columns * sum(self.rows)

    @property
    def products(self) -> float:
        """Operations of all operators in a run, for one token of the layer."""
        return 2 * self.weights * self.share

    @property
    def narrow(self) -> bool:
        """True if the drift is summed in the outputs of the only operator."""
        return len(self.rows) == 1 and narrows(self.rows[0], self.columns)

    @property
    def recorded(self) -> bool:
        """
        True if the outputs of the dense operator are recorded, so that the dense layer
        is not replayed.
        """
        return self.narrow and self.returned


@dataclass(frozen=True)
class LayerShape:
    """
    The shape of a model's decoder layers, which are taken to be alike.

    :param names: names of the layers
    :param hidden: features of the hidden state
    :param stages: stages of one layer, in the order of execution
    :param attention: operations of attention itself, for one sequence
    :param seq_len: tokens of a sequence
    :param parameters: number of parameters of the whole model
    :param estimate: the reason why the layer could not be watched, so that stages and
        attention are a coarser estimate, from its operators alone; None if it was
        watched
    :param pruned: names, inside the layer, of the operators that are pruned; None if
        all of them are
    """

    names: tuple[str, ...]
    hidden: int
    stages: tuple[StageShape, ...]
    attention: float
    seq_len: int
    parameters: int
    estimate: str | None = None
    pruned: frozenset[str] | None = None

    def pruning(self, operators: Collection[str]) -> LayerShape:
        """
        Return the shape for a run that prunes only some operators. What is pruned in
        one of the layers is taken to be pruned in all.

        :param operators: names, in the model, of the operators that are pruned
        :return: the shape of the layers that have some of them
        """
        inside = {
            layer: {
                name.removeprefix(f"{layer}.")
                for name in operators
                if name.startswith(f"{layer}.")
            }
            for layer in self.names
        }
        names = tuple(layer for layer, found in inside.items() if found)
        return replace(self, names=names, pruned=frozenset().union(*inside.values()))

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.names)

    @property
    def solved(self) -> list[tuple[int, StageShape]]:
        """Number of each stage with pruned operators, and the stage with these only."""
        if self.pruned is None:
            return list(enumerate(self.stages))
        return [
            (number, chosen)
            for number, stage in enumerate(self.stages)
            if (chosen := stage.only(self.pruned))
        ]

    @property
    def weights(self) -> int:
        """Entries of the weights of all operators of a layer."""
        return sum(stage.weights for stage in self.stages)

    @property
    def forward(self) -> float:
        """Operations of a run of the layer over one sequence."""
        products = math.fsum(stage.products for stage in self.stages)
        return products * self.seq_len + self.attention

    @property
    def toolkit_forward(self) -> float:
        """Operations of the toolkit's pass, in which all experts see all tokens."""
        return 2 * self.weights * self.seq_len + self.attention

    def routed(self, block: int) -> bool:
        """
        Say whether a block gives tokens to experts. If so, it runs from its dense
        inputs.

        :param block: number of the block
        :return: whether it has experts
        """
        return any(stage.routed for stage in self.stages if stage.block == block)

    def drifts(self, stage: StageShape, correction: ErrorCorrection) -> bool:
        """
        Say whether the inputs of a stage drift.

        :param stage: a stage of the layer
        :param correction: whose errors operators make up for
        :return: whether its inputs follow from operators that were pruned before
        """
        if correction == "none":
            return False
        routed = self.routed(stage.block)
        if correction == "full" and not routed:
            return True
        return any(
            other.wave < stage.wave and (other.block == stage.block or not routed)
            for _, other in self.solved
        )


def shape_of(config: PretrainedConfig, seq_len: int) -> LayerShape:
    """
    Build the model without weights and watch its largest decoder layer. Each expert of
    a mixture is given its average share of the tokens. A layer that cannot be watched,
    since what it does depends on values, is estimated from its operators alone.

    :param config: the model's configuration
    :param seq_len: tokens of a calibration sequence
    :return: the shape of its layers, which are taken to be alike
    :raises ValueError: if transformers has no class for the configuration, or there is
        nothing to prune in the model
    """
    if seq_len > WATCHED:
        # A longer sequence is not watched, because masks are real. Attention has a term
        # of first and one of second degree.
        half, whole = shape_of(config, WATCHED // 2), shape_of(config, WATCHED)
        square = 2 * (whole.attention - 2 * half.attention) / WATCHED**2
        linear = whole.attention / WATCHED - square * WATCHED
        attention = linear * seq_len + square * seq_len**2
        return replace(whole, seq_len=seq_len, attention=attention)
    model = weightless_model(config, attn_implementation="eager").eval()
    linearize_weightless(model)
    parameters = model.num_parameters()
    layers = _decoder_layers(model)
    largest = max(layers, key=_parameters)
    shape = _estimated(largest, model, seq_len)
    try:
        call = _call_of(layers, model, seq_len)
        largest = next(layer for layer in layers if layer.module is call.layer)
        shape = _watched(largest, call, _estimated(largest, model, seq_len))
    except Exception as error:  # a model's own code may need values in any way
        logger.opt(exception=error).debug("where watching the layer ended")
        why = str(error).partition("\n")[0]
        shape = replace(shape, estimate=f"{type(error).__name__}: {why}")
    alike = layers
    if not config.is_encoder_decoder:  # a vision tower is left out
        alike = [layer for layer in layers if _in_one_stack(layer, largest)]
    names = tuple(layer.name for layer in alike)
    return replace(shape, names=names, parameters=parameters)


def _decoder_layers(model: PreTrainedModel) -> list[DecoderLayer]:
    """Return the decoder layers that have operators."""
    operators = find_operators(model, ["Linear"], [])
    targets = layer_targets(model, operators)
    layers = group_by_layer(model, operators, targets)
    return [layer for layer in layers if layer.in_sequence and layer.operators]


def _in_one_stack(layer: DecoderLayer, other: DecoderLayer) -> bool:
    """Say whether two layers are of one class or, in a hybrid, in one list."""
    if type(layer.module) is type(other.module):
        return True
    return layer.name.rpartition(".")[0] == other.name.rpartition(".")[0]


def _watched(layer: DecoderLayer, call: LayerCall, estimate: LayerShape) -> LayerShape:
    """Return the shape of a layer as a run shows it, in place of an estimate of it."""
    counter = FlopCounterMode(display=False)
    tokens: dict[torch.nn.Module, int] = {}

    def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        tokens[module] = args[0][..., 0].numel()

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # the pointer is 0, as for a tensor on the meta device
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.enter_context(patch_attr(LinearExperts2D, "forward", _evenly_routed))
        for operator in layer.operators:
            stack.enter_context(operator.module.register_forward_pre_hook(count))
        with torch.no_grad(), counter:
            call.run()
        # Mamba's dt_proj is not called: its weight is used in another way
        called = [one for one in layer.operators if one.module in tokens]
        stages = find_stages(called, [call])
    blocks = list(blocks_of(call.layer, layer.operators).values())
    start = len(layer.name) + 1
    shapes = tuple(
        StageShape(
            columns=stage.operators[0].weight.shape[1],
            rows=tuple(operator.weight.shape[0] for operator in stage.operators),
            wave=stage.wave,
            block=_block(blocks, stage.operators[0]),
            returned=stage.returned,
            share=tokens[stage.operators[0].module] / estimate.seq_len,
            routed=stage.routed,
            names=tuple(one.name[start:] for one in stage.operators),
        )
        for stage in stages
    )
    products = estimate.seq_len * math.fsum(shape.products for shape in shapes)
    return replace(
        estimate,
        hidden=call.hidden_states.shape[-1],
        stages=shapes,
        # an operator in groups takes fewer operations than its size suggests
        attention=max(0.0, counter.get_total_flops() - products),
    )


def _estimated(layer: DecoderLayer, model: PreTrainedModel, seq_len: int) -> LayerShape:
    """
    Estimate the shape of a layer from its operators and the configuration alone. Each
    operator is a stage, experts are given their share of the tokens, and every layer
    has attention.
    """
    hidden = int(model.get_input_embeddings().weight.shape[-1])
    blocks = list(blocks_of(layer.module, layer.operators).values())
    shares = _shares(model)
    stages = []
    for wave, operator in enumerate(layer.operators):
        rows, columns = operator.weight.shape
        share = shares.get(operator.module, 1.0)
        stages.append(
            StageShape(
                columns=columns,
                rows=(rows,),
                wave=wave,
                block=_block(blocks, operator),
                returned=False,
                share=share,
                routed=share < 1,
                names=(operator.name[len(layer.name) + 1 :],),
            )
        )
    return LayerShape(
        names=(layer.name,),
        hidden=hidden,
        stages=tuple(stages),
        attention=4.0 * seq_len**2 * hidden,
        seq_len=seq_len,
        parameters=model.num_parameters(),
    )


def _block(blocks: list[list[Operator]], operator: Operator) -> int:
    return next(number for number, inside in enumerate(blocks) if operator in inside)


def _shares(model: PreTrainedModel) -> dict[torch.nn.Module, float]:
    """
    Return the share of the tokens that each expert's operators are given. It is 1 if
    the configuration does not say how many experts a token has.
    """
    config = model.config.get_text_config()
    return {
        operator: min(1.0, chosen / experts.num_experts)
        for experts in model.modules()
        if isinstance(experts, LinearExperts2D)
        for chosen in [getattr(config, "num_experts_per_tok", experts.num_experts)]
        for operator in experts.modules()
    }


def _evenly_routed(
    experts: LinearExperts2D, hidden_states: Tensor, chosen: Tensor, _weights: Tensor
) -> Tensor:
    """Compute what the experts of a mixture do if all are chosen equally often."""
    count = math.ceil(chosen.numel() / experts.num_experts)
    positions = torch.arange(count, device=hidden_states.device)
    outputs = torch.zeros_like(hidden_states)
    for index in range(experts.num_experts):
        outputs = outputs.index_add(0, positions, experts[index](hidden_states[:count]))
    return outputs


class _FirstCall(Exception):
    """The exception that carries a call of a decoder layer out of the model."""


def _parameters(layer: DecoderLayer) -> int:
    return _entries(layer.module)


def _entries(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _call_of(
    layers: Sequence[DecoderLayer], model: PreTrainedModel, seq_len: int
) -> LayerCall:
    """
    Return the model's call of the largest layer that text reaches.

    :raises ValueError: if text reaches no layer
    """

    def stop(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise _FirstCall(LayerCall(module, args, kwargs))

    # The weights get no values and appear to be on the CPU. All that does not depend on
    # them, such as masks, has its values.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
    tokens = torch.ones(1, seq_len, dtype=torch.long)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    remaining = list(layers)
    while remaining:
        largest = max(remaining, key=_parameters)
        watched = largest.module.register_forward_pre_hook(stop, with_kwargs=True)
        with (
            watched,
            patch_attr(LinearExperts2D, "forward", _evenly_routed),
            torch.no_grad(),
        ):
            try:
                model(**inputs, use_cache=False)
            except _FirstCall as seen:
                call: LayerCall = seen.args[0]
                return call
        remaining = [one for one in remaining if not _in_one_stack(one, largest)]
    raise ValueError("text reaches no layer of the model")
