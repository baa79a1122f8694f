"""Restorers: the consumers' weights on the channels that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fista_modifier.solver.factorisation import cholesky
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.structured.problem import ChannelProblem

__all__ = [
    "DAMPENING",
    "BiasCompensation",
    "KeptWeights",
    "LeastSquares",
    "Restored",
    "Restorer",
    "least_squares",
]

DAMPENING = 0.15
"""
The damping as a fraction of the features' typical power. It is that of the solver's
fast preset.
"""


class Restored(NamedTuple):
    """
    The weights that a restorer found.

    :param weight: weight of the kept columns in ascending order, float32 m×k·r
    :param bias: what is to be added to the consumers' bias, float32 m; None is nothing
    """

    weight: Tensor
    bias: Tensor | None


class Restorer(Protocol):
    """
    A method that gives the consumers the weights that make up for the channels that
    leave.
    """

    def __call__(self, problem: ChannelProblem, kept: Tensor) -> Restored:
        """
        Find the consumers' weights on the channels that stay.

        :param problem: W and the sums over its inputs
        :param kept: channels that stay, long k
        :return: the smaller weight and the change of the bias
        """
        ...


@dataclass(frozen=True)
class KeptWeights:
    """
    The restorer that changes nothing: W_S stays as it is, as after Wanda's score alone.
    """

    def __call__(self, problem: ChannelProblem, kept: Tensor) -> Restored:
        return Restored(problem.objective.weight[:, problem.kept_columns(kept)], None)


@dataclass(frozen=True)
class BiasCompensation:
    """
    FLAP's restorer (An et al. 2024). W_S stays as it is, and the mean of what the
    removed channels put out goes into the bias: b + W_R mean(X_R). Where X* ≠ X, the
    bias also takes the mean drift of the outputs, W mean(X) − W_S mean(X*_S), so that
    the mean of the outputs is that of the dense model.
    """

    def __call__(self, problem: ChannelProblem, kept: Tensor) -> Restored:
        weight = KeptWeights()(problem, kept).weight
        return Restored(weight, problem.best_bias(problem.widened(weight, kept)))


@dataclass(frozen=True)
class LeastSquares:
    """
    FASP's restorer. It fits the kept columns to the dense output by least squares,

        W_S = (B + δ W)_S (G_SS + δ I)⁻¹,  B = W X X*ᵀ.

    The damping δ is this project's. It draws W_S to its dense values and not to zero:
    with all channels kept and X* = X, the weight does not change. Where the consumers
    have a bias, all sums are of centred data, and the bias is exactly the least squares
    intercept.

    :param dampening_frac: δ, as a fraction of the features' typical power
    """

    dampening_frac: float = DAMPENING

    def __call__(self, problem: ChannelProblem, kept: Tensor) -> Restored:
        objective = problem.damped(self.dampening_frac)
        weight = least_squares(objective, problem.kept_columns(kept))
        if not problem.intercept:
            return Restored(weight, None)
        return Restored(weight, problem.best_bias(problem.widened(weight, kept)))


def least_squares(objective: LayerObjective, columns: Tensor) -> Tensor:
    """
    Minimise f among weights that are zero off some columns S.

    :param objective: f with damping, whose G + δ I has an inverse
    :param columns: S, long s
    :return: the minimiser B_S (G_SS + δ I)⁻¹, m×s; B is the objective's, damping
        included
    """
    quadratic = objective.quadratic
    rows = columns.to(quadratic.statistics.gram.device)
    gram = quadratic.statistics.gram[rows[:, None], rows].to(quadratic.device)
    gram.diagonal().add_(quadratic.damping[columns])
    factor = cholesky(gram)
    return torch.cholesky_solve(objective.target[:, columns].T, factor).T.contiguous()
