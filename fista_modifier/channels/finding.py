"""The search for the channel groups of a layer, in runs of the layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fista_modifier.calibration.calls import LayerCall
from fista_modifier.channels.groups import (
    ChannelGroup,
    Kind,
    LayerGroups,
    Members,
)
from fista_modifier.channels.probing import Codes, Probe, shortened
from fista_modifier.models.operators import Operator

__all__ = ["find_groups"]


def find_groups(
    operators: Sequence[Operator], calls: Iterable[LayerCall]
) -> LayerGroups:
    """
    Find the channel groups of a layer by probing it. Guesses are made from what each
    input depends on. Only those are returned that hold in further runs: where channels
    are NaN, all of their columns are NaN, no other column is NaN, and nothing that the
    layer returns is NaN.

    A few tokens of one call are enough, unless they do not reach all operators.

    :param operators: all linear operators of one decoder layer
    :param calls: calls of the layer
    :return: groups, and reasons for what is in none
    """
    found = LayerGroups()
    unseen = set(operators)
    for call in calls:
        probe = _probe(call, operators)
        if unseen.isdisjoint(probe.operators):
            continue
        new = _Search(probe).groups()
        # a call may show a producer that other calls do not reach
        kept = [one for one in found.groups if not _within(one, new.groups)]
        kept += [one for one in new.groups if not _within(one, kept)]
        found.groups = kept
        found.reasons |= {
            operator: new.reasons[operator]
            for operator in new.reasons
            if operator in unseen
        }
        unseen -= set(probe.operators)
        if not unseen:
            break
    for operator in unseen:
        found.reasons[operator] = [f"The layer does not call {operator.name}."]
    return found


def _probe(call: LayerCall, operators: Sequence[Operator]) -> Probe:
    """
    Return a probe with few tokens, or with the whole call if the layer takes no less.
    """
    try:
        return Probe(shortened(call), operators)
    except Exception:  # noqa: BLE001 - whatever a layer says to arguments cut short
        return Probe(call, operators)


def _within(group: ChannelGroup, others: Iterable[ChannelGroup]) -> bool:
    """
    Say whether another group of the same kind has all operators of a group, or more.
    """
    return any(
        group.kind == other.kind and group.operators <= other.operators
        for other in others
    )


class _Search:
    """
    The search for the groups that one probe shows.

    Rows and columns are the nodes of a graph. An edge joins a row and a column in two
    cases. In the first, the row reaches no other column of that operator. This holds
    for rows of gates, and not for rows of keys. In the second, the column shows no
    other row when all else is zero. This holds for columns that read values. The
    channels are the connected components.

    :param probe: a probe of the layer
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._found = LayerGroups()
        self._places = {one: place for place, one in enumerate(probe.operators)}
        # rows that each operator's input depends on, if there are any that can leave
        self._before: dict[Operator, Tensor] = {}
        for operator in probe.operators:
            rows = probe.rows_before(probe.columns_of(operator))
            if bool((rows & ~probe.returned).any()):
                self._before[operator] = rows

    def groups(self) -> LayerGroups:
        """Return the groups, and reasons for operators that are in none."""
        channels = self._proved(self._components(*self._edges()))
        mixed = self._mixed(channels)
        channels = [replace(one, kind=self._kind(one, mixed)) for one in channels]
        for group, linear in zip(channels, self._linear(channels), strict=True):
            self._add(replace(group, linear=linear))
        self._find_heads([self._rows(group) for group in channels])
        self._explain()
        return self._found

    def _edges(self) -> tuple[Tensor, Tensor]:
        """Return the row and the column of each edge."""
        edges = [self._values()]
        for consumers in _apart(self._before):
            edges += self._lone_columns(consumers)
        rows = torch.cat([some for some, _ in edges])
        columns = torch.cat([some for _, some in edges])
        stay = self._probe.returned[rows]
        return rows[~stay], columns[~stay]

    def _lone_columns(
        self, consumers: list[Operator]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """
        Yield, for each consumer, the rows that reach only one of its columns, and that
        column of each row.

        :param consumers: consumers of which no two depend on the same row
        """
        columns = [self._probe.columns_of(one).nonzero()[:, 0] for one in consumers]
        codes = Codes(max(map(len, columns)))
        shown = []
        for bit in codes.bits:
            chosen = [some[bit[: len(some)]] for some in columns]
            mask = _mask_at(torch.cat(chosen), sum(self._probe.column_counts))
            shown.append(self._probe.rows_before(mask))
        patterns = torch.stack(shown)
        for consumer, some in zip(consumers, columns, strict=True):
            rows = self._before[consumer].nonzero()[:, 0]
            places = codes.decode(patterns[:, rows])
            yield rows[places >= 0], some[places[places >= 0]]

    def _values(self) -> tuple[Tensor, Tensor]:
        """
        Find the columns that exactly one row changes if all else is zero. Return that
        row of each such column, and the columns.
        """
        rows = (~self._probe.returned).nonzero()[:, 0]
        if not len(rows):
            return rows, rows
        codes = Codes(len(rows))
        masks = torch.zeros(codes.length, len(self._probe.returned), dtype=torch.bool)
        masks[:, rows] = codes.bits
        places = codes.decode(self._probe.columns_changed(masks))
        columns = (places >= 0).nonzero()[:, 0]
        return rows[places[columns]], columns

    def _components(self, rows: Tensor, columns: Tensor) -> list[ChannelGroup]:
        """
        Return the connected components as channels. Channels that have members in the
        same places are in one group.
        """
        probe = self._probe
        label_of_row = torch.arange(len(probe.returned))
        label_of_column = torch.full((sum(probe.column_counts),), len(label_of_row))
        before = None
        while before is None or not torch.equal(before, label_of_row):
            before = label_of_row.clone()
            label_of_column.scatter_reduce_(0, columns, label_of_row[rows], "amin")
            label_of_row.scatter_reduce_(0, rows, label_of_column[columns], "amin")
        label_of_column[label_of_column == len(label_of_row)] = -1
        label_of_row[_mask_at(rows, sum(probe.row_counts)).logical_not()] = -1
        return self._labelled(label_of_row, label_of_column, "channels")

    def _labelled(
        self, of_rows: Tensor, of_columns: Tensor, kind: Kind
    ) -> list[ChannelGroup]:
        """
        Group the channels that have as many members in the same operators.

        :param of_rows: the channel of each row, -1 if it is in none
        :param of_columns: the channel of each column, -1 if it is in none
        :param kind: the kind of the groups
        :return: the groups
        """
        labels = torch.cat([of_rows, of_columns])
        node = (labels >= 0).nonzero()[:, 0]
        names, channel = torch.unique(labels[node], return_inverse=True)
        # a place is the rows of one operator; behind these come the columns of each
        counts = torch.tensor([*self._probe.row_counts, *self._probe.column_counts])
        ends = counts.cumsum(0)
        place = torch.searchsorted(ends, node, right=True)
        index = node - (ends - counts)[place]
        # each place has a random number; their sum says where a channel has members
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randint(2**62, counts.shape, generator=generator)
        sums = torch.zeros_like(names).scatter_add_(0, channel, numbers[place])
        _, group = torch.unique(sums[channel], return_inverse=True)
        order = torch.argsort(group * len(names) + channel, stable=True)
        groups = []
        for some in torch.split(order, torch.bincount(group).tolist()):
            size = len(torch.unique(channel[some]))
            members = {
                int(one): index[some][place[some] == one].view(size, -1)
                for one in torch.unique(place[some])
            }
            groups.append(self._group(kind, members))
        return groups

    def _group(self, kind: Kind, members: dict[int, Tensor]) -> ChannelGroup:
        """
        Return the group of some members, given by the number of the place they are in.
        """
        operators = self._probe.operators
        half = len(operators)
        producers = [
            Members(operators[place], indices)
            for place, indices in members.items()
            if place < half
        ]
        consumers = [
            Members(operators[place - half], indices)
            for place, indices in members.items()
            if place >= half
        ]
        return ChannelGroup(kind, tuple(producers), tuple(consumers))

    def _proved(self, groups: list[ChannelGroup]) -> list[ChannelGroup]:
        """
        Return the groups that hold. If they do not hold together, each is tried alone.
        """
        if not groups or self._fault(groups) is None:
            return groups
        proved = []
        for group in groups:
            fault = self._fault([group])
            if fault is None:
                proved.append(group)
            else:
                self._refuse(group, fault)
        return proved

    def _fault(self, groups: list[ChannelGroup]) -> str | None:
        """Say why some of these groups do not hold. Return None if all of them do."""
        probe = self._probe
        sizes = [group.size for group in groups]
        for bit in Codes(sum(sizes)).bits:
            rows = torch.zeros(sum(probe.row_counts), dtype=torch.bool)
            columns = torch.zeros(sum(probe.column_counts), dtype=torch.bool)
            for group, chosen in zip(groups, torch.split(bit, sizes), strict=True):
                rows |= self._rows(group, chosen)
                columns |= self._columns(group, chosen)
            found, returned = probe.columns_behind(rows)
            if returned:
                return "something else in the layer reads them"
            if not torch.equal(found, columns):
                return "channels reach inputs of other channels"
        return None

    def _mixed(self, groups: list[ChannelGroup]) -> Tensor:
        """
        Return the mask of the columns that depend on rows in no group, whether autograd
        sees it or not.
        """
        rows = ~self._probe.returned
        for group in groups:
            rows &= ~self._rows(group)
        return self._probe.columns_behind(rows)[0]

    def _kind(self, group: ChannelGroup, mixed: Tensor) -> Kind:
        columns = self._columns(group)
        others = self._probe.rows_before(columns) & ~self._rows(group)
        return "values" if bool(others.any() or (mixed & columns).any()) else "channels"

    def _linear(self, groups: list[ChannelGroup]) -> list[Members | None]:
        """
        Find, for each group, rows in which its columns are linear. Rows of all groups
        are tried together, since none of them reaches columns of another group.
        """
        candidates = [_candidates(group) for group in groups]
        found: list[Members | None] = [None] * len(groups)
        for place in range(max(map(len, candidates), default=0)):
            tried = [some[place : place + 1] for some in candidates]
            rows = self._members_mask(
                [one for some in tried for one in some], self._probe.row_counts, None
            )
            linear = self._probe.columns_linear_in(rows)
            for index, group in enumerate(groups):
                fits = bool(linear[self._columns(group)].all())
                if tried[index] and fits and found[index] is None:
                    found[index] = tried[index][0]
        return found

    def _find_heads(self, tried: list[Tensor]) -> None:
        """
        Find heads where other rows reach a consumer's columns too. A head is a
        connected component of the columns and all rows that reach them.

        :param tried: masks of the rows of each group of single channels
        """
        probe, found = self._probe, list(self._found.groups)
        whole = torch.zeros(sum(probe.column_counts), dtype=torch.bool)
        for group in self._found.of_kind("channels"):
            whole |= self._columns(group)
        for consumer, before in self._before.items():
            remaining = probe.columns_of(consumer) & ~whole
            if not bool(remaining.any()):
                continue
            allowed = before & ~probe.returned & ~self._shared(remaining)
            of_rows = torch.full_like(before, -1, dtype=torch.long)
            of_columns = torch.full_like(remaining, -1, dtype=torch.long)
            head = 0
            while bool(remaining.any()):
                rows, columns = self._component(_first(remaining), allowed)
                of_rows[rows], of_columns[columns] = head, head
                whole |= columns
                remaining &= ~columns
                head += 1
            groups = self._labelled(of_rows, of_columns, "heads")
            if head == 1 and any(consumer in one.operators for one in found):
                self._refuse(groups[0], "there is one, or each depends on all")
            groups = [group for group in groups if group.size > 1]
            for group in self._proved(groups):
                # where heads share queries and keys, they are single values again
                if not any(torch.equal(self._rows(group), one) for one in tried):
                    self._add(group)

    def _component(self, columns: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """
        Return the masks of all allowed rows and all columns that are connected with
        some columns.
        """
        while True:
            rows = self._probe.rows_before(columns) & allowed
            reached = self._probe.columns_behind(rows)[0] | columns
            if torch.equal(reached, columns):
                return rows, columns
            columns = reached

    def _shared(self, columns: Tensor) -> Tensor:
        """
        Return the mask of the rows of operators that reach all heads alike, such as one
        key for all queries. It is empty if all rows do so.
        """
        first = self._probe.rows_before(_first(columns))
        last = self._probe.rows_before(_first(columns.flip(0)).flip(0))
        counts = self._probe.row_counts
        shared = torch.cat(
            [
                one if torch.equal(one, other) else torch.zeros_like(one)
                for one, other in zip(
                    torch.split(first, counts), torch.split(last, counts), strict=True
                )
            ]
        )
        everything = torch.equal(first | last, shared)
        return torch.zeros_like(shared) if everything else shared

    def _add(self, group: ChannelGroup) -> None:
        """
        Add a group, unless something would be left of its channels, or other entries
        would have to be cut with them.
        """
        if group.kind != "channels" and self._leaves_something(group):
            self._refuse(group, "they are not zero where their rows are")
            return
        if group.kind != "values" and (own := self._own_entries(group)):
            self._refuse(group, f"{', '.join(own)} would have to be cut with them")
            return
        self._found.groups.append(group)

    def _leaves_something(self, group: ChannelGroup) -> bool:
        """Say whether consumers read something of channels whose rows are zero."""
        left = self._probe.columns_left(self._rows(group))
        return bool((left & self._columns(group)).any())

    def _own_entries(self, group: ChannelGroup) -> list[str]:
        """
        Return the names of parameters and arguments, besides the operators', that would
        have to be cut with the channels.
        """
        half = torch.arange(group.size) % 2 == 0
        some = self._probe.others_before(self._columns(group, half))
        every = self._probe.others_before(self._columns(group))
        return [name for name in every if not torch.equal(some[name], every[name])]

    def _refuse(self, group: ChannelGroup, why: str) -> None:
        producers = ", ".join(operator.name for operator, _ in group.producers)
        consumers = ", ".join(operator.name for operator, _ in group.consumers)
        sentence = f"The {group.kind} of {producers} cannot leave {consumers}: {why}."
        for operator in group.operators:
            self._found.reasons.setdefault(operator, []).append(sentence)

    def _explain(self) -> None:
        """Give a reason for each operator that is in no group."""
        probe, reasons = self._probe, self._found.reasons
        known = {one for group in self._found.groups for one in group.operators}
        for place, operator in enumerate(probe.operators):
            if operator in known or operator in reasons:
                continue
            returned = torch.split(probe.returned, probe.row_counts)[place]
            readers = [
                consumer.name
                for consumer, rows in self._before.items()
                if bool(torch.split(rows, probe.row_counts)[place].any())
            ]
            if operator in self._before:
                why = f"Each input of {operator.name} depends on several channels."
            elif bool(returned.any()):
                why = f"The layer returns the output of {operator.name}."
            elif readers:
                why = (
                    f"Each channel of {operator.name} reaches several inputs of "
                    f"{', '.join(readers)}."
                )
            else:
                why = f"No operator reads the output of {operator.name}."
            reasons[operator] = [why]

    def _rows(self, group: ChannelGroup, chosen: Tensor | None = None) -> Tensor:
        """
        Return the mask of the rows of a group's chosen channels; None chooses all.
        """
        return self._members_mask(group.producers, self._probe.row_counts, chosen)

    def _columns(self, group: ChannelGroup, chosen: Tensor | None = None) -> Tensor:
        return self._members_mask(group.consumers, self._probe.column_counts, chosen)

    def _members_mask(
        self, members: Sequence[Members], counts: list[int], chosen: Tensor | None
    ) -> Tensor:
        mask = torch.zeros(sum(counts), dtype=torch.bool)
        for operator, indices in members:
            some = indices if chosen is None else indices[chosen]
            place = self._places[operator]
            mask[some + sum(counts[:place])] = True
        return mask


def _candidates(group: ChannelGroup) -> list[Members]:
    """
    Return sets of rows, one row for each channel, in which the group's columns may be
    linear. There are none if a channel has several columns.
    """
    columns = [indices.shape[1] for _, indices in group.consumers]
    if group.kind != "channels" or columns != [1]:
        return []
    return [
        Members(operator, rows)
        for operator, indices in group.producers
        for rows in torch.split(indices, 1, dim=1)
    ]


def _mask_at(indices: Tensor, size: int) -> Tensor:
    """Return the mask of some entries, bool size."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[indices] = True
    return mask


def _first(mask: Tensor) -> Tensor:
    """Return the mask of the first entry of a mask."""
    only = torch.zeros_like(mask)
    only[mask.nonzero()[0]] = True
    return only


def _apart(before: dict[Operator, Tensor]) -> Iterator[list[Operator]]:
    """Yield lists of consumers. Within a list, no two depend on the same row."""
    remaining = dict(before)
    while remaining:
        chosen: list[Operator] = []
        taken = torch.zeros_like(next(iter(remaining.values())))
        for consumer, rows in list(remaining.items()):
            if not bool((rows & taken).any()):
                taken |= rows
                chosen.append(consumer)
                del remaining[consumer]
        yield chosen
