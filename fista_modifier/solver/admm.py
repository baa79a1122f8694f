"""Support search by ADMM on the cardinality constraint itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fista_modifier.solver.blocks import times
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.patterns import SparsityPattern, project

__all__ = ["admm"]

RELAXATION = 1.5


def admm(
    objectives: Sequence[LayerObjective], pattern: SparsityPattern, steps: int
) -> list[Tensor]:
    """
    Minimise f(V) subject to V = Z and Z ∈ 𝒮, the weights with the pattern, by the
    alternating direction method of multipliers (Boyd et al. 2011, section 9.1; for
    pruning: Boža 2024, and ALPS, Meng et al. 2024). Steps, with multiplier U and
    over-relaxation α = 1.5 (section 3.4.3):

        V ← (B + ρ (Z − U)) (G + ρ I)⁻¹,   U ← U + α V + (1 − α) Z,
        Z ← H(U),   U ← U − Z.

    ρ is the mean of diag(G) and stays, so that one inverse serves all steps of all
    operators. The constraint is not convex, so this is a heuristic, and ρ is more than
    a matter of speed: with much less the support does not settle, and one that grows
    from less finds lower errors on the calibration data and worse models
    (docs/method.md).

    :param objectives: f of operators with one and the same G, best scaled so that
        diag(G) ≈ 1
    :param pattern: the sparsity asked for
    :param steps: number of steps. On 14 operators of SmolLM2-135M at 2:4 and 50 %, 10
        leave a squared error 0.1 % above that of 40, 5 one that is 0.6 to 0.7 % above
    :return: Z, m×n, with the pattern, of each operator
    """
    quadratic = objectives[0].quadratic
    penalty = float(quadratic.diagonal.mean()) or 1.0
    resolvent = quadratic.resolvent(penalty)
    return [
        _sparse_weight(objective, pattern, steps, penalty, resolvent)
        for objective in objectives
    ]


def _sparse_weight(
    objective: LayerObjective,
    pattern: SparsityPattern,
    steps: int,
    penalty: float,
    resolvent: Tensor,
) -> Tensor:
    sparse = project(objective.weight, pattern)
    multiplier = torch.zeros_like(sparse)
    for _ in range(steps):
        pull = (sparse - multiplier).mul_(penalty).add_(objective.target)
        multiplier.add_(times(pull, resolvent), alpha=RELAXATION)
        multiplier.add_(sparse, alpha=1 - RELAXATION)
        sparse = project(multiplier, pattern)
        multiplier.sub_(sparse)
    return sparse
