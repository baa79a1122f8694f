"""The operators of a report, by layer and kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from fista_modifier.pruning.results import OperatorResult

__all__ = ["OperatorGrid"]


@dataclass(frozen=True)
class OperatorGrid:
    """
    The operators of a report, in a grid of layers and kinds.

    :param layers: names of the layers, such as "model.layers.0", in the order of
        pruning; the name is empty for operators outside any layer
    :param kinds: names of the operators within their layer, such as "self_attn.q_proj"
    :param cells: the operators of each layer and kind: one, or all experts
    """

    layers: Sequence[str]
    kinds: Sequence[str]
    cells: dict[tuple[str, str], list[OperatorResult]]

    @classmethod
    def of(cls, operators: Sequence[OperatorResult]) -> OperatorGrid:
        """
        Sort operators by layer and kind. Of several steps of a recipe that pruned the
        same operator, the last has the result, and its time is that of them all.

        :param operators: the results of the operators, in the order of pruning
        :return: the grid
        """
        last: dict[str, OperatorResult] = {}
        for one in operators:
            before = last[one.name].seconds if one.name in last else 0.0
            last[one.name] = replace(one, seconds=before + one.seconds)
        cells: dict[tuple[str, str], list[OperatorResult]] = {}
        for operator in last.values():
            cells.setdefault(_place(operator.name), []).append(operator)
        layers = dict.fromkeys(layer for layer, _ in cells)
        kinds = dict.fromkeys(kind for _, kind in cells)
        return cls(list(layers), list(kinds), cells)

    @property
    def layer_labels(self) -> list[str]:
        """The layers' numbers, or their names if numbers would be ambiguous."""
        return _shortest(self.layers)

    @property
    def kind_labels(self) -> list[str]:
        """The last parts of the kinds, or the whole kinds if parts were ambiguous."""
        return _shortest(self.kinds)

    @property
    def operators(self) -> list[OperatorResult]:
        """All operators, each once."""
        return [operator for cell in self.cells.values() for operator in cell]

    def of_kind(self, kind: str) -> list[OperatorResult]:
        """
        Return the operators of a kind.

        :param kind: one of ``kinds``
        :return: its operators in all layers
        """
        return [
            operator
            for layer in self.layers
            for operator in self.cells.get((layer, kind), [])
        ]

    def along_layers(
        self, kind: str, measure: Callable[[OperatorResult], float]
    ) -> list[float]:
        """
        Measure the operators of a kind along the layers.

        :param kind: one of ``kinds``
        :param measure: returns a figure of one operator, NaN if it is not known
        :return: the mean for each layer, NaN if the layer has no such operator of which
            it is known
        """
        figures = [
            [measure(one) for one in self.cells.get((layer, kind), [])]
            for layer in self.layers
        ]
        known = [[one for one in cell if not math.isnan(one)] for cell in figures]
        return [fmean(cell) if cell else math.nan for cell in known]


def _place(name: str) -> tuple[str, str]:
    """
    Return the layer and the kind of an operator. The first number in its name is that
    of the layer, as in every model with a list of layers. Later numbers, those of
    experts, are left out of the kind.
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if number is None:
        return "", name
    kind = [part for part in parts[number + 1 :] if not part.isdecimal()]
    return ".".join(parts[: number + 1]), ".".join(kind)


def _shortest(names: Sequence[str]) -> list[str]:
    last = [name.rpartition(".")[2] for name in names]
    return last if len(set(last)) == len(last) else list(names)
