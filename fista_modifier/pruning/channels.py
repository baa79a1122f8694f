"""The plan of the channels that leave a model, and of its new configuration."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from compressed_tensors.offload import disable_onloading
from loguru import logger
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fista_modifier.calibration.calls import LayerCall
from fista_modifier.channels.cuts import check_cut
from fista_modifier.channels.groups import ChannelGroup, Members
from fista_modifier.channels.layers import ProbedLayer, probed_layers
from fista_modifier.models.experts import check_expert_widths
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.operators import Operator
from fista_modifier.models.resizing import ConfigChange, changes_for

__all__ = ["ChannelPlan", "GroupPlan", "Structure", "check_apart", "plan_channels"]

Structure = Literal["mlp", "heads", "value_dims"]
KIND: dict[Structure, str] = {
    "mlp": "channels",
    "heads": "heads",
    "value_dims": "values",
}


@dataclass(frozen=True)
class GroupPlan:
    """
    A channel group, and how many of its channels stay.

    :param group: channels of one layer
    :param keep: how many of them stay
    """

    group: ChannelGroup
    keep: int

    @property
    def consumer(self) -> Members:
        """The operator that reads the channels, with the columns of each channel."""
        return self.group.consumers[0]

    @property
    def zeroes(self) -> bool:
        """
        True if channels that go become zeros in place, because no loader would take the
        model without them.
        """
        return self.group.kind == "values"

    @property
    def parameters(self) -> int:
        """
        Number of parameters of one channel: rows and biases of the producers, and
        columns of the consumer.
        """
        rows = sum(
            indices.shape[1] * (one.shape[1] + (one.module.bias is not None))
            for one, indices in self.group.producers
        )
        operator, indices = self.consumer
        return rows + indices.shape[1] * operator.shape[0]


@dataclass(frozen=True)
class ChannelPlan:
    """
    The channels that leave a model, and what its configuration becomes.

    :param groups: the plans of each layer that loses channels, by the layer's name
    :param changes: changes of the model's configuration
    :param removed: share of the decoder layers' parameters that leaves, exactly
    :param zeroed: share of the decoder layers' parameters that become zeros in place,
        exactly
    """

    groups: Mapping[str, Sequence[GroupPlan]] = field(default_factory=dict)
    changes: Sequence[ConfigChange] = ()
    removed: float = 0.0
    zeroed: float = 0.0

    @property
    def every(self) -> list[GroupPlan]:
        """The plans of all layers, in order."""
        return [plan for of_layer in self.groups.values() for plan in of_layer]

    @property
    def zero_rows(self) -> dict[str, int]:
        """
        Number of rows that become zeros in place, by the name of each operator that
        gets some.
        """
        rows: defaultdict[str, int] = defaultdict(int)
        for plan in self.every:
            for operator, indices in plan.group.producers if plan.zeroes else ():
                rows[operator.name] += (plan.group.size - plan.keep) * indices.shape[1]
        return dict(rows)


def plan_channels(
    model: PreTrainedModel,
    layers: Sequence[DecoderLayer],
    batches: Iterable[dict[str, Any]],
    structures: Sequence[Structure],
    sparsity: float,
    multiple_of: int,
) -> ChannelPlan:
    """
    Plan how many channels of each group leave. All layers keep equally many channels,
    since no loader takes layers of different sizes. About the same share of each
    structure leaves. Heads are few, so the many channels of MLPs make up for the rest
    of their share. Dimensions of values do not leave: they become zeros in place.
    Layers that the data do not reach, such as those of a vision tower, have no plan.

    :param model: the dense model
    :param layers: layers of the model, with the operators that may be changed
    :param batches: calibration data, of which a few tokens show who reads what
    :param structures: the kinds of channels that leave
    :param sparsity: share of the decoder layers' parameters that is to leave
    :param multiple_of: the number of an MLP's channels stays a multiple of this
    :return: the plan
    :raises ValueError: if channels cannot leave the model, with the reason, or if the
        sparsity leaves less than one multiple of an MLP's channels, takes less than
        half a multiple, or would take all of another structure
    """
    found = probed_layers(model, layers, batches, _usable)
    if not found:
        raise ValueError(
            "structures: the calibration data reach no decoder layer with targets"
        )
    chosen: dict[str, dict[Structure, list[ChannelGroup]]] = {}
    for layer, (groups, reason) in found.items():
        for structure in structures:
            of_kind = [one for one in groups if one.kind == KIND[structure]]
            if not of_kind:
                raise ValueError(
                    f"structures: {layer.name} has no {structure} channels that can "
                    f"leave it. {reason}".strip()
                )
            chosen.setdefault(layer.name, {})[structure] = of_kind
    total = sum(_parameters(layer.module) for layer in found)
    keeps = _keeps(chosen, sparsity * total, multiple_of)
    plans = {
        name: [
            GroupPlan(group, keep)
            for structure, groups in by_structure.items()
            for group in groups
            if (keep := keeps[structure, group.size]) < group.size
        ]
        for name, by_structure in chosen.items()
    }
    for of_layer in plans.values():
        check_apart(of_layer)
    every = [one for of_layer in plans.values() for one in of_layer]
    smaller = [one for one in every if not one.zeroes]
    check_expert_widths(model, {one.consumer[0]: one.keep for one in smaller})
    removed, zeroed = (
        sum(one.parameters * (one.group.size - one.keep) for one in some) / total
        for some in (smaller, [one for one in every if one.zeroes])
    )
    shapes = dict(_shapes(smaller))
    try:
        changes = changes_for(model, shapes, _sizes(smaller))
    except ValueError as error:
        reasons = [f"{one.name} has no targets." for one in layers if not one.operators]
        reasons += [reason for _, reason in found.values() if reason]
        if "heads" in structures:
            reasons.append(_numbers_of_heads(model, chosen, total))
        raise ValueError(" ".join([f"{error}.", *dict.fromkeys(reasons)])) from error
    return ChannelPlan(plans, changes, removed, zeroed)


def _numbers_of_heads(
    model: PreTrainedModel,
    chosen: Mapping[str, Mapping[Structure, Sequence[ChannelGroup]]],
    total: int,
) -> str:
    """Say with which numbers of heads, and at which sparsities, a model would load."""
    everything = [
        group
        for by_structure in chosen.values()
        for groups in by_structure.values()
        for group in groups
    ]
    heads = [group for group in everything if group.kind == "heads"]
    whole = sum(GroupPlan(one, 1).parameters * one.size for one in everything) / total
    fitting = []
    for keep in range(min(one.size for one in heads) - 1, 0, -1):
        plans = [GroupPlan(one, keep) for one in heads]
        try:
            changes_for(model, dict(_shapes(plans)), _sizes(plans))
        except ValueError:
            continue
        share = max((one.size - keep) / one.size for one in heads)
        fitting.append(f"{keep} heads (sparsity: {share * whole:.3f})")
    if not fitting:
        return "No other number of heads would do: leave heads out of structures."
    return f"It would load with {' or '.join(fitting)}."


def _keeps(
    chosen: Mapping[str, Mapping[Structure, Sequence[ChannelGroup]]],
    to_remove: float,
    multiple_of: int,
) -> dict[tuple[Structure, int], int]:
    """
    Return how many channels stay, by the structure and the number of its channels.

    :raises ValueError: if the sparsity is too large or too small for a structure
    """
    costs: defaultdict[tuple[Structure, int], int] = defaultdict(int)
    for by_structure in chosen.values():
        for structure, groups in by_structure.items():
            for group in groups:
                costs[structure, group.size] += GroupPlan(group, 1).parameters
    sizes = {key: cost * key[1] for key, cost in costs.items()}
    share = to_remove / sum(sizes.values())
    keeps: dict[tuple[Structure, int], int] = {}
    for structure, size in costs:
        if structure != "mlp":
            if share >= 1:
                raise ValueError(
                    f"sparsity: all {size} {structure} would have to leave, and more: "
                    "lower sparsity, or add to structures"
                )
            keep = max(round(size * (1 - share)), 1)
            if keep == size:
                too_few = (
                    f"No {structure} leave: of {size}, {size * share:.2f} would have "
                    f"to. Raise sparsity, or leave {structure} out of structures"
                )
                if len(sizes) == 1:
                    raise ValueError(f"sparsity: {too_few}")
                logger.warning(too_few)
            keeps[structure, size] = keep
            to_remove -= costs[structure, size] * (size - keep)
    rest = sum(size for (structure, _), size in sizes.items() if structure == "mlp")
    if rest:
        share = to_remove / rest
    mlps = sorted(size for structure, size in costs if structure == "mlp")
    for size in mlps:
        # a configuration may have a size only as so many times another one, as that of
        # several shared experts
        unit = next(one for one in mlps if size % one == 0)
        keeps["mlp", size] = size // unit * _multiple(unit, share, multiple_of)
    return keeps


def check_apart(plans: Iterable[GroupPlan]) -> None:
    """
    Refuse to cut rows of an operator for several groups, as one cut moves the rows of
    the next.

    :param plans: the plans of a layer
    :raises ValueError: if an operator makes the channels of several groups
    """
    makers = Counter(
        operator
        for plan in plans
        for operator in {one for one, _ in plan.group.producers}
    )
    shared = [operator.name for operator, count in makers.items() if count > 1]
    if shared:
        raise ValueError(
            f"structures: {shared[0]} makes channels of several kinds, which cannot "
            "leave it together: name one of structures"
        )


def _multiple(size: int, share: float, multiple_of: int) -> int:
    keep = round(size * (1 - share) / multiple_of) * multiple_of
    if size * (1 - share) < multiple_of or keep < multiple_of:
        raise ValueError(
            f"sparsity: of {size} channels {max(size * (1 - share), 0):.0f} would be "
            f"left, which is less than one multiple of {multiple_of}: lower sparsity "
            "or multiple_of, or add to structures"
        )
    if keep >= size:
        raise ValueError(
            f"sparsity: of {size} channels {size * share:.0f} would leave, which is "
            f"less than half a multiple of {multiple_of}: raise sparsity, or lower "
            "multiple_of"
        )
    return keep


def _sizes(plans: Iterable[GroupPlan]) -> dict[int, int]:
    """Return the new size for each old size that a configuration may have."""
    sizes = {}
    for plan in plans:
        sizes[plan.group.size] = plan.keep
        if plan.group.kind == "heads":
            largest = max(len(one.indices[0]) for one in plan.group.producers)
            smallest = min(len(one.indices[0]) for one in plan.group.producers)
            queries = largest // smallest
            sizes[plan.group.size * queries] = plan.keep * queries
    return sizes


def _shapes(plans: Iterable[GroupPlan]) -> Iterator[tuple[str, torch.Size]]:
    """
    Yield the name and the new shape, as stored, of each parameter that becomes smaller.
    """
    smaller: defaultdict[Operator, list[int]] = defaultdict(lambda: [0, 0])
    for plan in plans:
        leaving = plan.group.size - plan.keep
        for operator, indices in plan.group.producers:
            smaller[operator][0] += leaving * indices.shape[1]
        operator, indices = plan.consumer
        smaller[operator][1] += leaving * indices.shape[1]
    for operator, (rows, columns) in smaller.items():
        m, n = operator.shape
        shape = (m - rows, n - columns)
        if isinstance(operator.module, Conv1D):
            shape = shape[::-1]
        yield f"{operator.name}.weight", torch.Size(shape)
        if operator.module.bias is not None and rows:
            yield f"{operator.name}.bias", torch.Size([m - rows])


def _usable(layer: ProbedLayer) -> tuple[list[ChannelGroup], str]:
    """
    Return the groups whose channels can leave, and sentences that say why those of
    other operators cannot.
    """
    groups = []
    reasons = [layer.found.why_not(operator) for operator in layer.operators]
    for group in layer.found.groups:
        problem = _problem(group, set(layer.targets), layer.calls[0])
        if problem is None:
            groups.append(group)
        else:
            reasons.append(problem)
    return groups, " ".join(dict.fromkeys(filter(None, reasons)))


def _problem(
    group: ChannelGroup, targets: set[Operator], call: LayerCall
) -> str | None:
    """Return the reason why a group cannot be pruned; None if it can."""
    names = ", ".join(sorted(operator.name for operator in group.operators))
    if not group.operators <= targets:
        missing = min(operator.name for operator in group.operators - targets)
        return (
            f"The channels of {names} are not all among targets: {missing} is none. "
            "Let targets match it; if several layers share its weight or its bias, "
            "nothing can leave."
        )
    if len(group.consumers) > 1:
        return f"Several operators read the channels of {names}."
    operator, columns = group.consumers[0]
    if columns.numel() != operator.shape[1]:
        return f"Some columns of {operator.name} belong to no channel."
    return check_cut(group, call, torch.arange(0, group.size, 2))


def _parameters(module: torch.nn.Module) -> int:
    with disable_onloading():
        return sum(parameter.numel() for parameter in module.parameters())
