"""How a weight without channels is named in reports, and checked in a checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fista_modifier.solver.patterns import register

__all__ = ["Smaller", "ZeroColumns", "lost_channels"]


@dataclass(frozen=True)
class _LostChannels:
    """
    :param kept: how many rows or columns are left
    :param before: how many there were
    """

    kept: int
    before: int

    @property
    def group(self) -> None:
        """None, as it is not n:m"""
        return None

    @property
    def tag(self) -> str:
        return "structured-pruning"


@register(None)
@dataclass(frozen=True)
class Smaller(_LostChannels):
    """
    A weight that has fewer rows or columns than in the dense model.

    :param side: which of them
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
        """share of the zeros that it must have"""
        return 0.0

    @property
    def description(self) -> str:
        return f"{self.before - self.kept} {self.side} have left the model"

    def check_columns(self, columns: int) -> None:
        """Any width will do."""

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
        if match is None or not int(match[1]) < int(match[2]):
            return None
        return cls(int(match[1]), int(match[2]))

    @property
    def sparsity(self) -> float:
        """share of the zeros that it must have"""
        return 1 - self.kept / self.before

    @property
    def description(self) -> str:
        return f"{self.before - self.kept} columns are zeros in place"

    def check_columns(self, columns: int) -> None:
        """:raises ValueError: if there are not as many"""
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
    :param pattern: what a report calls it
    :return: whether it is one of an operator that lost whole channels
    """
    return bool(Smaller.parse(pattern) or ZeroColumns.parse(pattern))
