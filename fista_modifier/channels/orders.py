"""The channels of a layer that can change places, found from runs of the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fista_modifier.calibration.calls import LayerCall
from fista_modifier.calibration.tensors import same_output
from fista_modifier.channels.groups import ChannelGroup, LayerGroups
from fista_modifier.models.operators import UNCHANGED, Operator, replaced_weights

__all__ = ["Interchangeable", "check_order", "interchangeable", "reordered"]


@dataclass(frozen=True)
class Interchangeable:
    """
    Channels of a layer that can change places. If their rows of the producers and their
    columns of the consumer move together, the layer computes the same.

    :param group: a channel group with one consumer
    :param sets: long sets×size; the channels of a set can change places with each
        other. An MLP has one set with all of its channels, and values have one for each
        head
    """

    group: ChannelGroup
    sets: Tensor

    @property
    def consumer(self) -> Operator:
        """The operator that reads the channels."""
        return self.group.consumers[0].operator

    @property
    def columns(self) -> Tensor:
        """
        The columns of the consumer for each channel of each set, long sets×size×r.
        """
        return self.group.consumers[0].indices[self.sets]

    def moved(self, operator_of: Callable[[Operator], Operator]) -> Interchangeable:
        """
        Return the interchangeable channels of another layer.

        :param operator_of: returns the other layer's operator in the place of one of
            this layer
        :return: the same channels of the other layer
        """
        return replace(self, group=self.group.moved(operator_of))

    def fits(self, size: int) -> bool:
        """
        Say whether the sets suit a pattern n:m.

        :param size: m of the pattern
        :return: whether each set has whole groups of m consecutive columns
        """
        first = self.columns[:, :1]
        count = self.sets.shape[1]
        in_a_row = torch.equal(self.columns, first + torch.arange(count)[:, None])
        return in_a_row and count % size == 0 and not bool((first % size).any())

    def columns_in(self, order: Tensor) -> Tensor:
        """
        Return the order of the consumer's columns that goes with an order of the
        channels.

        :param order: long, the channel that comes to each place
        :return: long n, the consumer's column that comes to each place
        """
        indices = self.group.consumers[0].indices
        return _permutation(indices, order, self.consumer.shape[1])


def interchangeable(found: LayerGroups) -> list[Interchangeable]:
    """
    Find the channels of a layer that can change places.

    :param found: channel groups of the layer
    :return: all channels of each MLP, and the dimensions of the values within each
        head, where one operator alone reads them
    """
    sets = []
    for group in found.groups:
        if len(group.consumers) > 1:
            continue
        if group.kind == "channels":
            sets.append(Interchangeable(group, torch.arange(group.size)[None]))
        if group.kind == "values":
            consumer, columns = group.consumers[0]
            heads = [
                head.consumers[0].indices
                for head in found.of_kind("heads")
                if len(head.consumers) == 1 and head.consumers[0].operator is consumer
            ]
            within = _within(columns, torch.cat(heads)) if len(heads) == 1 else None
            if within is not None:
                sets.append(Interchangeable(group, within))
    return sets


def _within(columns: Tensor, heads: Tensor) -> Tensor | None:
    """
    Return the channels of each head, heads×size; None unless each channel lies in one
    head, and all heads have equally many.

    :param columns: the consumer's columns of each channel, channels×r
    :param heads: the consumer's columns of each head, heads×columns
    """
    head_of_column = torch.full((int(max(columns.max(), heads.max())) + 1,), -1)
    head_of_column[heads] = torch.arange(len(heads))[:, None]
    head_of = head_of_column[columns]
    first = head_of[:, 0]
    counts = torch.bincount(first.clamp(min=0), minlength=len(heads))
    if not bool((head_of == first[:, None]).all()) or bool((first < 0).any()):
        return None
    if not bool((counts == counts[0]).all()):
        return None
    return first.argsort(stable=True).view(len(heads), -1)


def reordered(
    channels: Interchangeable,
    order: Tensor,
    weights: Mapping[Operator, Tensor] = UNCHANGED,
    biases: Mapping[Operator, Tensor] = UNCHANGED,
) -> tuple[dict[Operator, Tensor], dict[Operator, Tensor]]:
    """
    Return the weights and biases of a group's operators with its channels in another
    order.

    :param channels: channels of a layer
    :param order: long, the channel that comes to each place
    :param weights: out×in weights of operators that have others than the model's own
    :param biases: biases of operators that have others than the model's own
    :return: weights and biases of the producers and the consumer in the new order;
        biases of the producers that have one
    """
    found: dict[Operator, Tensor] = {}
    changed: dict[Operator, Tensor] = {}
    for operator, rows in channels.group.producers:
        weight = weights.get(operator, operator.weight)
        places = _permutation(rows, order, len(weight)).to(weight.device)
        found[operator] = weight[places]
        own = operator.module.bias
        if own is not None:
            changed[operator] = biases.get(operator, own.data)[places.to(own.device)]
    consumer = channels.consumer
    weight = found.get(consumer, weights.get(consumer, consumer.weight))
    found[consumer] = weight[:, channels.columns_in(order).to(weight.device)]
    return found, changed


def _permutation(indices: Tensor, order: Tensor, size: int) -> Tensor:
    """
    Return the row or column that comes to each place.

    :param indices: the rows or columns of each channel, channels×r
    :param order: the channel that comes to each place of a channel
    :param size: number of rows or columns
    :return: long, of that size
    """
    places = torch.arange(size)
    places[indices] = indices[order.cpu()]
    return places


def check_order(
    channels: Iterable[Interchangeable], call: LayerCall
) -> list[Interchangeable]:
    """
    Find the channels with which a layer computes the same in another order. For this
    test the channels of each set are put in reverse order.

    :param channels: interchangeable channels of the layer
    :param call: a call of the layer; the layer is the same afterwards
    :return: the channels with which the layer computes the same
    """
    with torch.no_grad():
        expected = call.run()
    sound = []
    for one in channels:
        order = torch.arange(one.group.size)
        order[one.sets] = one.sets.flip(1)
        with torch.no_grad(), replaced_weights(*reordered(one, order)):
            found = call.run()
        if same_output(found, expected):
            sound.append(one)
    return sound
