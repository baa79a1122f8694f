"""Channel groups: the channels of a layer that can leave the model together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from torch import Tensor

from fista_modifier.models.operators import Operator

__all__ = ["ChannelGroup", "Kind", "LayerGroups", "Members"]

Kind = Literal["channels", "values", "heads"]


class Members(NamedTuple):
    """
    The rows, or the columns, that channels have in one operator.

    :param operator: the operator
    :param indices: channels×r: the rows, or columns, of each channel, in ascending
        order
    """

    operator: Operator
    indices: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """
    Channels inside a layer. Any number of them can leave the model, each with all of
    its rows and columns, without a change for the others, because only the consumers
    read them.

    :param kind: "channels" if the consumers read nothing else, as in an MLP; "values"
        if other rows (queries and keys) reach the consumers too. Attention then expects
        heads of one size, so that the channels can be set to zero, but not cut; "heads"
        if each channel is a whole head for keys and values with its queries
    :param producers: operators with the channels' output rows, and biases
    :param consumers: operators with the channels' input columns
    :param linear: for "channels", rows of a producer, one for each channel, such that
        what the consumers read is linear in the outputs of these rows, as in those of
        up_proj; None if there are none, as where an activation follows each producer
    """

    kind: Kind
    producers: tuple[Members, ...]
    consumers: tuple[Members, ...]
    linear: Members | None = None

    @property
    def size(self) -> int:
        """The number of channels."""
        return len(self.consumers[0].indices)

    @property
    def operators(self) -> set[Operator]:
        """All producers and consumers."""
        return {operator for operator, _ in (*self.producers, *self.consumers)}

    def moved(self, operator_of: Callable[[Operator], Operator]) -> ChannelGroup:
        """
        Return the group of the same channels in another layer.

        :param operator_of: returns the other layer's operator in the place of one of
            this layer
        :return: the other layer's group
        """

        def moved(members: Sequence[Members]) -> tuple[Members, ...]:
            return tuple(Members(operator_of(one), indices) for one, indices in members)

        linear = None if self.linear is None else moved([self.linear])[0]
        return replace(
            self,
            producers=moved(self.producers),
            consumers=moved(self.consumers),
            linear=linear,
        )


@dataclass
class LayerGroups:
    """
    The channel groups that were found in one layer.

    :param groups: the groups
    :param reasons: for operators, sentences that say why some or all of their rows or
        columns are in no group
    """

    groups: list[ChannelGroup] = field(default_factory=list)
    reasons: dict[Operator, list[str]] = field(default_factory=dict)

    def of_kind(self, kind: Kind) -> list[ChannelGroup]:
        """
        Return the groups of one kind.

        :param kind: the kind
        :return: its groups
        """
        return [group for group in self.groups if group.kind == kind]

    def why_not(self, operator: Operator) -> str:
        """
        Say why rows or columns of an operator are in no group.

        :param operator: an operator of the layer
        :return: sentences for a user, "" if there is nothing to say
        """
        return " ".join(self.reasons.get(operator, []))
