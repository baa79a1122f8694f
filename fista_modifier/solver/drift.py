"""What the operators pruned before an operator did to its inputs: Δ = X* − X."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fista_modifier.solver.blocks import add_gram, add_product, times

__all__ = ["Drift", "FeatureDrift", "OutputDrift", "inner", "narrows"]


def narrows(rows: int, columns: int) -> bool:
    """
    :param rows: m
    :param columns: n
    :return: whether the drift of a lone operator of this shape is better summed in its
        outputs (:class:`OutputDrift`) than in its inputs (:class:`FeatureDrift`)
    """
    return rows <= columns


class Drift(Protocol):
    """
    Sums over the tokens that give W Δ X*ᵀ and ‖W Δ‖_F² for a weight W.
    """

    def accumulate(self, drift: Tensor, pruned: Tensor) -> None:
        """
        :param drift: of the inputs, Δᵀ of a batch, float32 tokens×n; or of the outputs,
            (W Δ)ᵀ, tokens×m
        :param pruned: X*ᵀ of the same tokens, float32 tokens×n
        """
        ...

    def scaled(self, scale: Tensor) -> Drift:
        """
        :param scale: n, positive
        :return: the sums of inputs divided by it, for weights multiplied by it
        """
        ...

    def of(self, weight: Tensor) -> tuple[Tensor, float]:
        """
        :param weight: W, float32 m×n
        :return: W Δ X*ᵀ, m×n, and ‖W Δ‖_F²
        """
        ...

    def in_outputs(self, drift: Tensor, weight: Tensor) -> Tensor:
        """
        :param drift: of what is summed here for one token, or a mean of it, float32
        :param weight: W, float32 m×n
        :return: of the outputs, m
        """
        ...

    def sums(self) -> list[Tensor]:
        """:return: what is to be added up over ranks, in place"""
        ...


@dataclass
class FeatureDrift:
    """
    For any weight, from the drift of the inputs: sums over products of features.

    :param cross: Δ X*ᵀ, float32 n×n, where G is
    :param gram: Δ Δᵀ, float32 n×n, where G is
    """

    cross: Tensor
    gram: Tensor

    def accumulate(self, drift: Tensor, pruned: Tensor) -> None:
        add_product(self.cross, drift, pruned)
        add_gram(self.gram, drift)

    def scaled(self, scale: Tensor) -> FeatureDrift:
        return FeatureDrift(
            (self.cross / scale).div_(scale[:, None]),
            (self.gram / scale).div_(scale[:, None]),
        )

    def of(self, weight: Tensor) -> tuple[Tensor, float]:
        return times(weight, self.cross), inner(weight, times(weight, self.gram))

    def in_outputs(self, drift: Tensor, weight: Tensor) -> Tensor:
        return weight @ drift

    def sums(self) -> list[Tensor]:
        return [self.cross, self.gram]


@dataclass
class OutputDrift:
    """
    For one operator with no more outputs than inputs, such as a down projection, from
    the drift of its outputs: less work and memory than the products of features.

    :param cross: W Δ X*ᵀ, float32 m×n
    :param power: ‖W Δ‖_F², a float64 scalar
    """

    cross: Tensor
    power: Tensor

    def accumulate(self, drift: Tensor, pruned: Tensor) -> None:
        add_product(self.cross, drift, pruned)
        self.power += torch.linalg.vecdot(drift, drift).sum(dtype=torch.float64)

    def scaled(self, scale: Tensor) -> OutputDrift:
        return OutputDrift(self.cross / scale.to(self.cross.device), self.power)

    def of(self, weight: Tensor) -> tuple[Tensor, float]:
        return self.cross, float(self.power)

    def in_outputs(self, drift: Tensor, weight: Tensor) -> Tensor:
        return drift

    def sums(self) -> list[Tensor]:
        return [self.cross, self.power]


def inner(a: Tensor, b: Tensor) -> float:
    """
    :param a: m×n
    :param b: m×n
    :return: ⟨A, B⟩, summed in float32 within the rows and in float64 over them
    """
    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))
