"""A layer's weights without some of its channels, and a check that it runs so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fista_modifier.calibration.calls import LayerCall
from fista_modifier.calibration.tensors import same_output
from fista_modifier.channels.groups import ChannelGroup, Members
from fista_modifier.models.operators import UNCHANGED, Operator, replaced_weights

__all__ = ["check_cut", "leaving", "without_channels"]


def check_cut(group: ChannelGroup, call: LayerCall, kept: Tensor) -> str | None:
    """
    Check that a layer without some channels computes the same as if nobody read them.
    For this check the channels are cut, or set to zero if they are "values". Afterwards
    the layer is as it was before.

    :param group: a group of the layer
    :param call: a call of the layer
    :param kept: long, the channels that stay, in ascending order
    :return: a sentence that says why it does not; None if it does
    """
    unread = {}
    for operator, columns in leaving(group.consumers, kept):
        weight = operator.weight.clone()
        weight[:, columns] = 0
        unread[operator] = weight
    with torch.no_grad():
        with replaced_weights(unread):
            expected = call.run()
        with replaced_weights(*without_channels(group, kept)):
            try:
                found = call.run()
            except (RuntimeError, ValueError, IndexError) as error:
                return (
                    "The layer does not run without them, as not all sizes that it "
                    f"computes with are those of its weights ({error})."
                )
    if not same_output(found, expected):
        return "The layer computes something else without them."
    return None


def without_channels(
    group: ChannelGroup,
    kept: Tensor,
    weights: Mapping[Operator, Tensor] = UNCHANGED,
    biases: Mapping[Operator, Tensor] = UNCHANGED,
) -> tuple[dict[Operator, Tensor], dict[Operator, Tensor]]:
    """
    Return the weights and biases of a group's operators without some of its channels.
    The channels are cut, or set to zero if they are "values".

    :param group: a group of a layer
    :param kept: long, the channels that stay
    :param weights: out×in weights of operators that have others than the model's own
    :param biases: biases of operators that have others than the model's own
    :return: the weights and biases that change
    """
    change = _zeroed if group.kind == "values" else _cut
    found: dict[Operator, Tensor] = {}
    shorter: dict[Operator, Tensor] = {}
    for operator, rows in leaving(group.producers, kept):
        found[operator] = change(weights.get(operator, operator.weight), rows, 0)
        own = operator.module.bias
        if own is not None:
            shorter[operator] = change(biases.get(operator, own.data), rows, 0)
    if group.kind != "values":
        for operator, columns in leaving(group.consumers, kept):
            found[operator] = _cut(weights.get(operator, operator.weight), columns, 1)
    return found, shorter


def leaving(
    members: Iterable[Members], kept: Tensor
) -> Iterator[tuple[Operator, Tensor]]:
    """
    Yield each operator with its rows or columns of the channels that leave.

    :param members: members of a group
    :param kept: long, the group's channels that stay
    :return: each operator, and its rows or columns of the channels that leave
    """
    for operator, indices in members:
        leaves = torch.ones(len(indices), dtype=torch.bool)
        leaves[kept.cpu()] = False
        yield operator, indices[leaves].flatten()


def _cut(tensor: Tensor, indices: Tensor, dim: int) -> Tensor:
    stays = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
    stays[indices.to(tensor.device)] = False
    return tensor.index_select(dim, stays.nonzero()[:, 0])


def _zeroed(tensor: Tensor, indices: Tensor, dim: int) -> Tensor:
    return tensor.index_fill(dim, indices.to(tensor.device), 0)
