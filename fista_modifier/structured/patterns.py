"""How a smaller weight is named in reports, and checked in a checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fista_modifier.solver.patterns import register

__all__ = ["Smaller"]


@register(None)
@dataclass(frozen=True)
class Smaller:
    """
    A weight that has fewer rows or columns than in the dense model.

    :param kept: how many there are
    :param before: how many there were
    :param side: which of them
    """

    kept: int
    before: int
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
    def group(self) -> None:
        """None, as it is not n:m"""
        return None

    @property
    def tag(self) -> str:
        return "structured-pruning"

    @property
    def description(self) -> str:
        return f"{self.before - self.kept} {self.side} have left the model"

    def check_columns(self, columns: int) -> None:
        """Any width will do."""

    def support(self, scores: Tensor) -> Tensor:
        return torch.ones_like(scores, dtype=torch.bool)

    def holds(self, weight: Tensor) -> bool:
        return weight.shape[0 if self.side == "rows" else 1] == self.kept
