"""Channel groups of all decoder layers. One layer of each kind is probed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import Any, Protocol, TypeVar

from compressed_tensors.offload import disable_onloading, get_execution_device
from llmcompressor.pytorch.utils.helpers import tensors_to_device
from torch.nn import Module
from transformers import PreTrainedModel

from fista_modifier.calibration.calls import EndOfRun, LayerCall, LayerInputs
from fista_modifier.calibration.contexts import (
    calibration_runs,
    forward_context,
    plain_forward,
)
from fista_modifier.channels.finding import find_groups
from fista_modifier.channels.groups import LayerGroups
from fista_modifier.distributed import current_ranks
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.operators import Operator, operators_in

__all__ = ["ProbedLayer", "probed_layers"]

PROBED = 8
"""
The most batches that are run to probe layers. A layer is probed with one after another,
until each of its operators was called.
"""


@dataclass(frozen=True)
class ProbedLayer:
    """
    A layer with the channel groups that a probe found in it.

    :param targets: operators of the layer that may be changed
    :param operators: all operators of the layer, these among them
    :param found: the channel groups of the layer
    :param calls: calls of the layer with a few tokens of the calibration data
    """

    targets: Sequence[Operator]
    operators: Sequence[Operator]
    found: LayerGroups
    calls: Sequence[LayerCall]


class OfLayer(Protocol):
    """The type of things that are found in one layer and hold for all of its kind."""

    def moved(self, operator_of: Callable[[Operator], Operator]) -> Any:
        """
        Return the counterpart of this thing in another layer.

        :param operator_of: returns the other layer's operator in the place of one of
            this layer
        :return: the same thing of the other layer
        """
        ...


Found = TypeVar("Found", bound=OfLayer)


def probed_layers(
    model: PreTrainedModel,
    layers: Sequence[DecoderLayer],
    batches: Iterable[dict[str, Any]],
    look: Callable[[ProbedLayer], tuple[list[Found], str]],
) -> dict[DecoderLayer, tuple[list[Found], str]]:
    """
    Probe layers and look for something in each. Layers of the same parts have the same
    groups, so only one of them is probed.

    :param model: the dense model
    :param layers: layers of the model
    :param batches: calibration data, of which a few tokens show who reads what
    :param look: takes what is wanted from a layer, and says why there is no more
    :return: what ``look`` returned, moved to each decoder layer that has targets and
        that the data reach
    """
    targets = _changeable(model, layers)
    kinds = {layer: _kind(layer, changed) for layer, changed in targets.items()}
    first: dict[Any, DecoderLayer] = {}
    for layer, kind in kinds.items():
        first.setdefault(kind, layer)
    seen: dict[Any, tuple[list[Found], str]] = {}
    calls = _calls(model, list(first.values()), batches)
    for kind, layer in first.items():
        if reached := list(calls[layer]):
            with calibration_runs(model):
                seen[kind] = look(_probed(layer, targets[layer], reached))
    found = {}
    for layer, kind in kinds.items():
        if kind not in seen:
            continue
        things, reasons = seen[kind]
        operator_of = _counterparts(first[kind], layer)
        found[layer] = [one.moved(operator_of) for one in things], reasons
    return found


def _changeable(
    model: PreTrainedModel, layers: Sequence[DecoderLayer]
) -> dict[DecoderLayer, list[Operator]]:
    """
    Return the operators of each decoder layer that may be changed. Those whose bias is
    another module's too may not: a change would be one of the other module.
    """
    with disable_onloading():
        owners = Counter(
            id(value)
            for module in model.modules()
            for value in module.parameters(recurse=False)
        )
        return {
            layer: [
                one
                for one in layer.operators
                if one.module.bias is None or owners[id(one.module.bias)] == 1
            ]
            for layer in layers
            if layer.in_sequence and layer.operators
        }


def _kind(layer: DecoderLayer, targets: Sequence[Operator]) -> tuple[Any, ...]:
    """
    Return what layers with the same groups share: class, shapes of parameters, and
    names of operators that may be changed.
    """
    with disable_onloading():
        parameters = tuple(
            (name, value.shape) for name, value in layer.module.named_parameters()
        )
    start = len(layer.name) + 1
    return (
        type(layer.module),
        parameters,
        tuple(one.name[start:] for one in targets),
    )


def _calls(
    model: PreTrainedModel,
    layers: Sequence[DecoderLayer],
    batches: Iterable[dict[str, Any]],
) -> dict[DecoderLayer, LayerInputs]:
    """
    Run the first batches, as far as the last of the layers. Return their calls. Weights
    do not stay onloaded, since these are runs of the whole model.
    """
    inputs = {layer: LayerInputs(layer.module) for layer in layers}
    waiting: set[Module] = set()

    def stop(layer: Module, *_: Any) -> None:
        waiting.discard(layer)
        if not waiting:
            raise EndOfRun

    device = get_execution_device(model)
    with ExitStack() as hooks:
        hooks.enter_context(forward_context(model))
        hooks.enter_context(plain_forward(model))
        for one in inputs.values():
            hooks.enter_context(
                one.layer.register_forward_pre_hook(one.remember, with_kwargs=True)
            )
            hooks.enter_context(one.layer.register_forward_pre_hook(stop))
        for batch in _first(batches):
            waiting.update(one.layer for one in inputs.values())
            with suppress(EndOfRun):
                model(**tensors_to_device(batch, device))
    return inputs


def _first(batches: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Return the first batches of all ranks in turn. They are the same on each rank, so
    that all find the same.
    """
    of_ranks = current_ranks().all(list(islice(batches, PROBED)))
    in_turn = chain.from_iterable(zip_longest(*of_ranks))
    return list(islice((batch for batch in in_turn if batch is not None), PROBED))


def _probed(
    layer: DecoderLayer, targets: Sequence[Operator], calls: Sequence[LayerCall]
) -> ProbedLayer:
    known = {operator.module: operator for operator in layer.operators}
    operators = [
        known.get(operator.module, operator)
        for operator in operators_in(layer.module, layer.name)
    ]
    return ProbedLayer(targets, operators, find_groups(operators, calls), calls)


def _counterparts(
    source: DecoderLayer, target: DecoderLayer
) -> Callable[[Operator], Operator]:
    of_name = {operator.name: operator for operator in target.operators}
    start = len(source.name)
    return lambda operator: of_name[target.name + operator.name[start:]]
