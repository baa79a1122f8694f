"""Least squares on a given support."""

from __future__ import annotations

import torch
from torch import Tensor

from fista_modifier.solver.blocks import row_blocks
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.patterns import SparsityPattern
from fista_modifier.solver.stopping import ended

__all__ = ["fill_support", "refit_"]

RIDGE = 0.01
"""
The share of the mean of diag(G) that is added to diag(G). It is SparseGPT's default
damping.
"""


def refit_(
    objective: LayerObjective,
    weight: Tensor,
    free: Tensor,
    *,
    iterations: int = 20,
    tolerance: float = 0.0,
) -> Tensor:
    """
    Minimise f over the entries in ``free``, all others held at their values, by
    conjugate gradients with a Jacobi preconditioner. The rows are independent problems
    that share G. Each row takes its own step lengths, and one product with G a step
    serves all of them. f falls in every row at every step.

    :param objective: f
    :param weight: V, m×n, float32, replaced by the result
    :param free: bool m×n, the entries that may change
    :param iterations: steps at most
    :param tolerance: a step that lowers f by less than this is the last. A large weight
        is solved in blocks of rows, and each block has its share of the tolerance
    :return: ``weight``, whose entries off ``free`` are still those of V
    """
    for rows in row_blocks(weight):
        block = weight[rows]
        share = len(block) / len(weight)
        _refit_(objective, rows, block, free[rows], iterations, share * tolerance)
    return weight


def _refit_(
    objective: LayerObjective,
    rows: slice,
    solution: Tensor,
    free: Tensor,
    iterations: int,
    tolerance: float,
) -> None:
    """Minimise f over the free entries of some rows, in place: see :func:`refit_`."""
    quadratic = objective.quadratic
    diagonal = quadratic.diagonal
    # The mask has numbers: a product with booleans takes 16 times as long on a CPU.
    mask = free.to(solution.dtype)
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    residual = objective.gradient(solution, rows).neg_().mul_(mask)
    direction = residual * inverse
    power = _row_products(residual, direction)
    done = torch.tensor(False, device=solution.device)
    for step in range(1, iterations + 1):
        curved = quadratic.times_gram(direction).mul_(mask)
        length = _ratio(power, _row_products(direction, curved)).masked_fill(done, 0)
        solution.addcmul_(direction, length)
        done |= (power * length).sum() < 2 * tolerance
        if ended(done, step):
            break
        residual.addcmul_(curved, length, value=-1)
        scaled = torch.mul(residual, inverse, out=curved)
        previous, power = power, _row_products(residual, scaled)
        direction.mul_(_ratio(power, previous)).add_(scaled)
        del curved, scaled  # The next product may have their memory.


def _row_products(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner product of each row with the other's, m×1."""
    products: Tensor = torch.linalg.vecdot(one, other)
    return products.unsqueeze(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """
    Return a/b, and 0 where b is not positive, so that a row that has converged stands
    still.
    """
    return torch.where(denominator > 0, numerator / denominator, 0)


def fill_support(
    objective: LayerObjective, weight: Tensor, pattern: SparsityPattern
) -> Tensor:
    """
    Use up the non-zeros that the pattern allows. A weight may come with more zeros than
    asked for (SparseGPT's kernel prunes one entry more in each block, a large λ many
    more). The entries that lower f most get their least-squares values, and those of
    features that no token excites get their dense values.

    :param objective: f
    :param weight: V with the pattern, m×n, float32
    :param pattern: the sparsity asked for
    :return: V with as many non-zeros as the pattern allows, f not higher; ``weight``
        itself if it has them
    """
    zero = weight == 0
    if not (pattern.support(weight.abs()) & zero).any():
        return weight  # Every entry that the pattern keeps is in use.
    diagonal = objective.quadratic.diagonal.expand_as(weight)
    dead = diagonal <= 0
    gradient = objective.gradient(weight)
    # With little data, entries of many features gain alike. Those of the weakest, which
    # would take huge values, come last.
    curvature = diagonal + RIDGE * diagonal.mean()
    gain = gradient * (gradient / curvature)  # The gradient's square might overflow.
    dense = objective.weight.abs()
    # Features without data come last, the largest dense weights among them first.
    gain = torch.where(dead, -1 / dense, gain)
    added = pattern.support(torch.where(zero, gain, torch.inf)) & zero
    filled = refit_(objective, weight.clone(), added & ~dead)
    return torch.where(added & dead, objective.weight, filled)
