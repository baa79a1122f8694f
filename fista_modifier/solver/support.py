"""Least squares on a given support."""

from __future__ import annotations

import torch
from torch import Tensor

from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.patterns import SparsityPattern

__all__ = ["fill_support", "refit"]


def refit(
    objective: LayerObjective, weight: Tensor, free: Tensor, iterations: int = 10
) -> Tensor:
    """
    Minimise f over the entries in ``free``, all others held at their values, by
    conjugate gradients with a Jacobi preconditioner. The rows are independent
    problems that share G: each takes its own step lengths, and one product with G a
    step serves all of them. f falls in every row at every step.

    :param objective: f
    :param weight: V, m×n, float32
    :param free: bool m×n, the entries that may change
    :param iterations: steps
    :return: m×n, equal to V off ``free``
    """
    diagonal = objective.gram.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0) * free
    solution = weight.clone()
    residual = -objective.gradient(weight) * free
    scaled = residual * inverse
    direction = scaled
    power = (residual * scaled).sum(1, keepdim=True)
    for _ in range(iterations):
        curved = (direction @ objective.gram) * free
        length = _ratio(power, (direction * curved).sum(1, keepdim=True))
        solution.addcmul_(direction, length)
        residual = torch.addcmul(residual, curved, length, value=-1)
        scaled = residual * inverse
        previous, power = power, (residual * scaled).sum(1, keepdim=True)
        direction = torch.addcmul(scaled, direction, _ratio(power, previous))
    return solution


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """a/b, and 0 where b is not positive: a row that has converged stands still."""
    return torch.where(denominator > 0, numerator / denominator, 0)


def fill_support(
    objective: LayerObjective, weight: Tensor, pattern: SparsityPattern
) -> Tensor:
    """
    Use up the non-zeros that the pattern allows. A weight may come with more zeros
    than asked for (SparseGPT's kernel prunes one entry more in each block, a large λ
    many more); the entries that lower f most get their least-squares values, and
    those of features that no token excites keep their dense values.

    :param objective: f
    :param weight: V with the pattern, m×n, float32
    :param pattern: sparsity asked for
    :return: V with as many non-zeros as the pattern allows, f not higher
    """
    zero = weight == 0
    if not (pattern.support(weight.abs()) & zero).any():
        return weight  # every entry that the pattern keeps is in use
    diagonal = objective.gram.diagonal().expand_as(weight)
    dead = diagonal <= 0
    gain = objective.gradient(weight).square() / diagonal
    dense = objective.weight.abs()
    # features without data come last, the largest dense weights among them first
    gain = torch.where(dead, -1 / (1 + dense), gain)
    added = pattern.support(torch.where(zero, gain, torch.inf)) & zero
    filled = refit(objective, weight, added & ~dead)
    return torch.where(added & dead, objective.weight, filled)
