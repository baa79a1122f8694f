"""Fused attention in the toolkit's passes, where it agrees with eager attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.calibration.calls import LayerCall, LayerInputs
from fista_modifier.calibration.contexts import calibration_runs
from fista_modifier.calibration.observed import outputs_of_parts
from fista_modifier.calibration.padding import real_rows
from fista_modifier.calibration.tensors import same_output
from fista_modifier.models.tracing import configs_of

__all__ = [
    "FusedAttention",
]

Padding = Callable[[torch.nn.Module, Tensor], Tensor | None]


class FusedAttention:
    """
    Attention by torch's fused kernels, in the place of the eager attention that the
    toolkit asks for.

    Eager attention holds a matrix of tokens×tokens for each head. The fused kernels
    compute the same up to rounding, but not in every model: transformers leaves out
    soft caps of the scores, and puts in a causal mask where there is none. So the first
    batch of the first layer of each class is run both ways, and fused kernels are used
    only if the outputs agree. The outputs of the first part of the layer that differs
    at all are compared, which is attention itself. Once they are added to the residual
    stream, a change of them may look like rounding.

    The choice holds while a layer of the class runs. It does not hold between layers,
    because masks are made there: a text model makes its masks after its vision tower
    has run.

    :param model: the model being calibrated
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._implementations: dict[type[torch.nn.Module], str] = {}
        self._suspended = False

    @contextmanager
    def in_passes(
        self, layers: Iterable[torch.nn.Module], padding: Padding
    ) -> Iterator[None]:
        """
        Use fused attention in the toolkit's passes, also in those without the toolkit's
        own hooks.

        :param layers: decoder layers
        :param padding: given a layer and its hidden states in the batch that runs now,
            says which tokens are real; None for all
        """
        running = ExitStack()

        def before(layer: torch.nn.Module, *call: Any) -> None:
            if self._suspended:
                return
            running.close()  # a run may have failed within the layer
            if type(layer) not in self._implementations:
                self._choose(layer, padding, *call)
            running.enter_context(self._running(layer))

        def after(layer: torch.nn.Module, _args: Any, _output: Any) -> None:
            if not self._suspended:
                running.close()

        with ExitStack() as hooks:
            hooks.callback(running.close)
            for layer in layers:
                hooks.enter_context(
                    layer.register_forward_pre_hook(before, with_kwargs=True)
                )
                hooks.enter_context(layer.register_forward_hook(after))
            yield

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """
        Leave attention as the model's configuration has it, also within
        :meth:`in_passes`.
        """
        with patch_attr(self, "_suspended", True):
            yield

    @contextmanager
    def used(self, layer: torch.nn.Module) -> Iterator[None]:
        """
        Give a layer the attention that it has in the toolkit's passes.

        :param layer: a decoder layer, or a lone operator
        """
        with self.suspended(), self._running(layer):
            yield

    @contextmanager
    def _running(self, layer: torch.nn.Module) -> Iterator[None]:
        implementation = self._implementations.get(type(layer), "eager")
        with _attention_implementation(self._model, layer, implementation):
            yield

    def _choose(self, layer: torch.nn.Module, padding: Padding, *call: Any) -> None:
        inputs = LayerInputs(layer)
        real = padding(layer, inputs.append(*call))
        same = self._model._supports_sdpa and self._agree(inputs[0], real)
        self._implementations[type(layer)] = "sdpa" if same else "eager"

    def _agree(self, call: LayerCall, real: Tensor | None) -> bool:
        def outputs(implementation: str) -> list[Tensor]:
            with _attention_implementation(self._model, call.layer, implementation):
                found = outputs_of_parts(call)
            return [real_rows(output, real) for output in found]

        with self.suspended(), calibration_runs(self._model):
            pairs = list(zip(outputs("sdpa"), outputs("eager"), strict=True))
        first = next((pair for pair in pairs if not torch.equal(*pair)), None)
        return first is None or same_output(*first)


@contextmanager
def _attention_implementation(
    model: PreTrainedModel, layer: torch.nn.Module, implementation: str
) -> Iterator[None]:
    """Set the attention of a layer, and of all parts with the same configuration."""
    with ExitStack() as stack:
        for config in configs_of(layer) or [model.config]:
            stack.enter_context(
                patch_attr(config, "_attn_implementation", implementation)
            )
        yield
