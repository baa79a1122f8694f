"""Names of weights that lost channels, for reports and for checks of checkpoints."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fista_modifier.solver.patterns import register

__all__ = ["Smaller", "ZeroColumns", "lost_channels"]


@dataclass(frozen=True)
class _LostChannels(ABC):
    """
    A weight that lost channels.

    :param kept: how many rows or columns are left
    :param before: how many there were
    """

    kept: int
    before: int

    @property
    def group(self) -> None:
        """None, as the weight has no n:m pattern."""
        return None

    @property
    def tag(self) -> str:
        return "structured-pruning"

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> _LostChannels | None:
        """Read the name of such a weight, as every registered pattern does."""


@register(None)
@dataclass(frozen=True)
class Smaller(_LostChannels):
    """
    A weight that has fewer rows or columns than in the dense model.

    :param side: which of them are fewer
    """

    side: Literal["rows", "columns"]

    def __str__(self) -> str:
        return f"{self.kept} of {self.before} {self.side}"

    @classmethod
    def parse(cls, text: str) -> Smaller | None:
        match = re.fullmatch(r"(\d+) of (\d+) (rows|columns)", text)
        if match is None:
            return None
        side: Literal["rows", "columns"] = "rows" if match[3] == "rows" else "columns"
        return cls(int(match[1]), int(match[2]), side)

    @property
    def sparsity(self) -> float:
        """The share of the zeros that the weight must have."""
        return 0.0

    @property
    def description(self) -> str:
        return f"{self.before - self.kept} {self.side} have left the model"

    def check_columns(self, columns: int) -> None:
        """Do nothing, as any width will do."""

    def support(self, scores: Tensor) -> Tensor:
        return torch.ones_like(scores, dtype=torch.bool)

    def holds(self, weight: Tensor) -> bool:
        return weight.shape[0 if self.side == "rows" else 1] == self.kept


@register(None)
@dataclass(frozen=True)
class ZeroColumns(_LostChannels):
    """
    A weight of which whole columns are zeros in place, since no loader would take it
    without them.
    """

    def __str__(self) -> str:
        return f"{self.kept} of {self.before} columns not zero"

    @classmethod
    def parse(cls, text: str) -> ZeroColumns | None:
        match = re.fullmatch(r"(\d+) of (\d+) columns not zero", text)
        if match is None or int(match[1]) > int(match[2]):
            return None
        return cls(int(match[1]), int(match[2]))

    @property
    def sparsity(self) -> float:
        """The share of the zeros that the weight must have."""
        return 1 - self.kept / self.before

    @property
    def description(self) -> str:
        return f"{self.before - self.kept} columns are zeros in place"

    def check_columns(self, columns: int) -> None:
        """
        Refuse a width other than the weight's own.

        :raises ValueError: if there are more or fewer columns
        """
        if columns != self.before:
            raise ValueError(f"has {columns} columns, and not {self.before}")

    def support(self, scores: Tensor) -> Tensor:
        kept = scores.sum(0).argsort(descending=True, stable=True)[: self.kept]
        columns = torch.zeros_like(scores[0], dtype=torch.bool)
        columns[kept] = True
        return columns.expand_as(scores).clone()

    def holds(self, weight: Tensor) -> bool:
        zero = int((weight == 0).all(0).sum())
        return weight.shape[1] == self.before and zero >= self.before - self.kept


def lost_channels(pattern: str) -> bool:
    """
    Say whether a pattern is that of an operator that lost whole channels.

    :param pattern: the name of the pattern in a report
    :return: whether it is
    """
    return any(kind.parse(pattern) for kind in _LostChannels.__subclasses__())
