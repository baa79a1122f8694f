"""A run of one batch through the model itself, to compare the pipeline's runs with."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe import context as moe
from llmcompressor.modifiers.utils.hooks import HooksMixin
from loguru import logger
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from fista_modifier.calibration.calls import EndOfRun, LayerCall
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.tracing import configs_of

__all__ = ["ReferenceRun"]

ROWS = 32
"""The most tokens for which the outputs of a part of a layer are kept."""
TOLERANCE = {4: 1e-2, 2: 0.25}
"""
The relative difference up to which two outputs count as the same, for each number of
bytes of the model's dtype. Over the layers of a model, rounding may add up to this.
"""


class _Outputs(NamedTuple):
    """
    Outputs of one module for some tokens.

    :param size: number of tokens, padding included
    :param chosen: the tokens that are kept, evenly spread over batch and sequence
    :param rows: the outputs for these tokens, float32 on the CPU
    """

    size: int
    chosen: Tensor
    rows: Tensor


OfLayers = dict[DecoderLayer, dict[torch.nn.Module, _Outputs]]


class ReferenceRun:
    """
    A run of the first batch through the model itself, to compare other runs with.

    The toolkit's sequential pipeline runs a trace of the model, which may leave out a
    mask or compute it otherwise. So the outputs of the parts of each layer for the
    first batch are recorded from the model itself, for a few tokens, and compared.

    Calibration has eager attention, or what computes the same, and no cache. In some
    families a token sees other tokens with other kernels or without a cache. The model
    would then be pruned for another model than the user loaded. So the outputs of that
    model are compared, too.

    :param model: the model being calibrated, as the user loaded it
    :param layers: layers of the model, of which only decoder layers count
    """

    def __init__(self, model: PreTrainedModel, layers: Iterable[DecoderLayer]) -> None:
        self._model = model
        self._layers = [layer for layer in layers if layer.in_sequence]
        self._outputs: OfLayers = {}
        self._calls: Counter[DecoderLayer] = Counter()
        self._done = False
        self._as_loaded = [
            (config, name, getattr(config, name))
            for config in configs_of(model)
            for name in ("_attn_implementation", "use_cache")
            if hasattr(config, name)
        ]
        with disable_onloading():  # the dtype is that of the first weight
            self._tolerance = TOLERANCE[4 if model.dtype.itemsize >= 4 else 2]

    def run(self, batch: dict[str, Any]) -> None:
        """
        Run the first batch through the model as it was loaded, and with the attention
        and cache of calibration. Warn if a layer's outputs differ.

        :param batch: arguments of the model by their names; others are left out
        """
        with ExitStack() as stack:
            for config, name, value in self._as_loaded:
                stack.enter_context(patch_attr(config, name, value))
            as_loaded = self._recorded(batch)
        self._outputs = self._recorded(batch)
        self._done = True
        self._compare(as_loaded, batch)

    def _compare(self, as_loaded: OfLayers, batch: dict[str, Any]) -> None:
        for layer in self._layers:
            mask = batch.get(layer.mask_name or "")
            real = mask.bool().cpu() if mask is not None and mask.ndim == 2 else None
            error, part = self._difference(layer, as_loaded.get(layer, {}), real)
            if part:
                logger.warning(
                    f"{layer.name} ({part}) computes something else with eager "
                    "attention and no cache, as in calibration, than in the model as "
                    "it was loaded "
                    f"(relative difference {error:.2g}): transformers' masks for "
                    f"{type(self._model).__name__} differ. Give the data an "
                    "attention_mask, or load the model with "
                    'attn_implementation="eager" and see whether it predicts as well'
                )
                return

    def _recorded(self, batch: dict[str, Any]) -> OfLayers:
        recorded: OfLayers = {}
        self._calls.clear()
        taken = inspect.signature(self._model.forward).parameters
        arguments = {name: value for name, value in batch.items() if name in taken}
        with ExitStack() as stack:
            stack.enter_context(_tensors_kept(self._model))
            stack.enter_context(HooksMixin.disable_hooks())
            stack.enter_context(patch_attr(moe, "_CALIBRATE_ALL_EXPERTS", False))
            for layer in self._layers:
                stack.enter_context(
                    layer.module.register_forward_pre_hook(self._counter(layer))
                )
                for child in layer.module.children():
                    stack.enter_context(
                        child.register_forward_hook(self._recorder(layer, recorded))
                    )
            head = self._model.get_output_embeddings()
            if head is not None:  # the toolkit keeps it without weights
                stack.enter_context(head.register_forward_pre_hook(_stop))
            stack.enter_context(suppress(EndOfRun))
            stack.enter_context(torch.no_grad())
            self._model(**arguments)
        return recorded

    def calls(self, layer: DecoderLayer) -> int | None:
        """
        Return how often the model calls a layer for one batch.

        :param layer: a decoder layer
        :return: the number of calls; None if the model itself was not run
        """
        return self._calls[layer] if self._done else None

    def check(self, layer: DecoderLayer, first: LayerCall, real: Tensor | None) -> None:
        """
        Refuse a layer that computes something else in the pipeline than in the model
        itself.

        :param layer: a decoder layer
        :param first: its first batch in the pipeline
        :param real: which tokens of it are not padding, None for all
        :raises RuntimeError: if a part of the layer computes something else in the
            pipeline
        """
        expected = self._outputs.get(layer)
        if not expected:
            return
        seen: dict[torch.nn.Module, _Outputs] = {}
        with ExitStack() as stack:
            for child in expected:
                stack.enter_context(child.register_forward_hook(_into(seen)))
            first.run()
        error, part = self._difference(layer, seen, real)
        if part:
            raise RuntimeError(
                f"{layer.name} ({part}) computes something else in the calibration "
                f"pipeline than in the model itself (relative difference {error:.2g}): "
                f"llm-compressor's trace of {type(self._model).__name__} is not "
                "faithful. Use pipeline='basic', and report this model family"
            )

    def _difference(
        self,
        layer: DecoderLayer,
        seen: dict[torch.nn.Module, _Outputs],
        real: Tensor | None,
    ) -> tuple[float, str]:
        """
        Find the first part of a layer whose outputs differ by more than rounding.

        :return: its relative difference and its class; 0 and "" if no part differs
        """
        for child, outputs in self._outputs.get(layer, {}).items():
            error = _difference(seen.get(child), outputs, real)
            if not error <= self._tolerance:
                return error, type(child).__name__
        return 0.0, ""

    def _counter(self, layer: DecoderLayer) -> Any:
        def count(_module: torch.nn.Module, _args: Any) -> None:
            self._calls[layer] += 1

        return count

    def _recorder(self, layer: DecoderLayer, recorded: OfLayers) -> Any:
        record = _into(recorded.setdefault(layer, {}))

        def once(module: torch.nn.Module, args: Any, output: Any) -> None:
            if self._calls[layer] == 1:
                record(module, args, output)

        return once


@contextmanager
def _tensors_kept(model: PreTrainedModel) -> Iterator[None]:
    """
    Put tensors that modules have as attributes back to what they were before a run.
    Some models remember tensors from one run to the next, such as position offsets.
    Other attributes stay as the run left them, because they may stand for what a run
    has set up for all, such as hooks.
    """
    before = {module: dict(vars(module)) for module in model.modules()}
    yield
    for module, attributes in before.items():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value is not attributes.get(name):
                if name in attributes:
                    setattr(module, name, attributes[name])
                else:
                    delattr(module, name)


def _into(seen: dict[torch.nn.Module, _Outputs]) -> Any:
    """Return a hook that keeps the first output of a module for some tokens."""

    def record(module: torch.nn.Module, _args: Any, output: Any) -> None:
        outputs = _outputs(output)
        if outputs is not None and module not in seen:
            seen[module] = outputs

    return record


def _outputs(output: Any) -> _Outputs | None:
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if not tensors or tensors[0].ndim < 2 or not tensors[0].is_floating_point():
        return None
    flat = tensors[0].flatten(0, -2)
    rows = min(ROWS, len(flat))
    chosen = torch.linspace(0, len(flat) - 1, rows, dtype=torch.float64).long()
    return _Outputs(len(flat), chosen, flat[chosen.to(flat.device)].float().cpu())


def _difference(one: _Outputs | None, other: _Outputs, real: Tensor | None) -> float:
    """
    Return the median over tokens of the relative difference. Unlike a mean, it forgives
    a few tokens that reach other experts.
    """
    if one is None or one.rows.shape != other.rows.shape:
        return float("inf")
    norms = other.rows.norm(dim=-1)
    # infinities of the model itself are reported when its inputs are summed
    counted = (norms > 0) & norms.isfinite()
    if real is not None and real.numel() == other.size:
        counted &= real.flatten()[other.chosen]
    if not bool(counted.any()):
        return 0.0
    ratios = (one.rows - other.rows).norm(dim=-1) / norms
    return float(ratios[counted].median())


def _stop(_module: torch.nn.Module, _args: Any) -> None:
    raise EndOfRun
