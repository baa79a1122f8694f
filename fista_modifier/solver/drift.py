"""
The drift Δ = X* − X: the change of an operator's inputs by the pruning before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fista_modifier.solver.blocks import add_gram, add_product, product

__all__ = ["Drift", "FeatureDrift", "OutputDrift", "inner", "narrows"]


def narrows(rows: int, columns: int) -> bool:
    """
    Say whether the drift of a lone operator is better summed in its outputs
    (:class:`OutputDrift`) than in its inputs (:class:`FeatureDrift`).

    :param rows: m, the out features
    :param columns: n, the in features
    :return: whether it is better summed in the outputs
    """
    return rows <= columns


class Drift(Protocol):
    """Sums over the tokens that give W Δ X*ᵀ and ‖W Δ‖_F² for a weight W."""

    def accumulate(self, drift: Tensor, pruned: Tensor) -> None:
        """
        Add the tokens of one batch.

        :param drift: drift of the inputs, Δᵀ of the batch, float32 tokens×n; or drift
            of the outputs, (W Δ)ᵀ, tokens×m
        :param pruned: X*ᵀ of the same tokens, float32 tokens×n
        """
        ...

    def scaled(self, scale: Tensor) -> Drift:
        """
        Return the sums of inputs divided by a scale, for weights multiplied by it.

        :param scale: n, positive
        :return: the scaled sums
        """
        ...

    def of(self, weight: Tensor) -> tuple[Tensor, float]:
        """
        Return what the drift adds to the problem of a weight.

        :param weight: W, float32 m×n
        :return: W Δ X*ᵀ, m×n, and ‖W Δ‖_F²
        """
        ...

    def in_outputs(self, drift: Tensor, weight: Tensor) -> Tensor:
        """
        Return a drift of the outputs for a drift of what is summed here.

        :param drift: drift of what is summed here for one token, or a mean of it,
            float32
        :param weight: W, float32 m×n
        :return: drift of the outputs, m
        """
        ...

    def sums(self) -> list[Tensor]:
        """
        Return the tensors that are to be added up over ranks, in place.

        :return: the tensors
        """
        ...


@dataclass
class FeatureDrift:
    """
    The drift of the inputs, for any weight: sums over products of features.

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
        return product(weight, self.cross), inner(weight, product(weight, self.gram))

    def in_outputs(self, drift: Tensor, weight: Tensor) -> Tensor:
        return weight @ drift

    def sums(self) -> list[Tensor]:
        return [self.cross, self.gram]


@dataclass
class OutputDrift:
    """
    The drift of the outputs, for one operator with no more outputs than inputs, such as
    a down projection. It takes less work and memory than the products of features.

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
    Return the inner product ⟨A, B⟩ of two matrices.

    :param a: A, m×n
    :param b: B, m×n
    :return: ⟨A, B⟩, summed in float32 within the rows and in float64 over them
    """
    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))
