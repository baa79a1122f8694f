"""
Two ADMM pruners from the literature, written from their papers, as solvers: they are
given the same Gram matrices of X and X*, the same stages and the same error correction.

Both minimise f(V) subject to V having the pattern, by ADMM with multiplier U:

    V ← (G + ρI)⁻¹ applied to B + ρ(Z − U),   Z ← H(V + U),   U ← U + V − Z.

They differ in damping, in ρ, in how the support comes about and in what follows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fista_modifier.solver import (
    GramStatistics,
    PrunedWeight,
    SparsityPattern,
    Unstructured,
)
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.patterns import project
from fista_modifier.solver.quadratic import Quadratic
from fista_modifier.solver.stage import OperatorProblem, StageProblem


class Peer(ABC):
    """
    A solver that prunes one operator of a stage after the other.

    :param stage: the problem that the operators of the stage share
    """

    def __init__(self, stage: StageProblem) -> None:
        self._stage = stage

    def prune(
        self, weights: Sequence[Tensor], patterns: Sequence[SparsityPattern]
    ) -> list[PrunedWeight]:
        """Prune the operators, as :class:`~fista_modifier.solver.Solver` says."""
        return [
            self._pruned(self._stage.operator(weight, pattern))
            for weight, pattern in zip(weights, patterns, strict=True)
        ]

    @abstractmethod
    def _pruned(self, problem: OperatorProblem) -> PrunedWeight: ...


class ALPS(Peer):
    """
    The solver of Meng et al., "ALPS: Improved optimization for highly sparse one-shot
    pruning for large language models", NeurIPS 2024. ρ starts at 0.1 and grows with the
    number of entries of the support that changed in three steps. When none did,
    conjugate gradients on the support give the weights. The damping is 0.01 of the mean
    of diag(G); columns are then scaled to norm one.

    :param statistics: Gram matrices of the input of a stage
    """

    DAMPING = 0.01
    FIRST_RHO = 0.1
    MOST_STEPS = 300
    STEPS_PER_RHO = 3

    def __init__(self, statistics: GramStatistics) -> None:
        mean = float(statistics.gram.diagonal().mean())
        super().__init__(StageProblem(statistics, damping=self.DAMPING * mean))
        shifted = self._stage.quadratic.shifted(0.0)
        self._values, self._vectors = torch.linalg.eigh(shifted)

    def _pruned(self, problem: OperatorProblem) -> PrunedWeight:
        sparse = self._sparse(problem.objective, problem.pattern)
        start = problem.rounded(sparse)
        best = problem.refit(start, problem.pattern.support(sparse.abs()))
        return problem.solution(problem.filled(best), start.error)

    def _sparse(self, objective: LayerObjective, pattern: SparsityPattern) -> Tensor:
        values, vectors = self._values, self._vectors
        rho = self.FIRST_RHO
        sparse = objective.weight
        multiplier = torch.zeros_like(sparse)  # ρU
        support = pattern.support(sparse.abs())
        for step in range(1, self.MOST_STEPS + 1):
            pull = objective.target - multiplier + rho * sparse
            weight = (pull @ vectors / (values + rho)) @ vectors.T
            sparse = project(weight + multiplier / rho, pattern)
            multiplier += rho * (weight - sparse)
            if step % self.STEPS_PER_RHO == 0:
                previous, support = support, sparse != 0
                growth = self._growth(int((support ^ previous).sum()), support)
                if growth is None:
                    break
                rho *= growth
        return sparse

    @staticmethod
    def _growth(changed: int, support: Tensor) -> float | None:
        """Return the factor by which ρ grows; None ends the search for the support."""
        kept = int(support.sum())
        if changed >= 0.1 * kept:
            return 1.3
        if changed >= 0.005 * kept:
            return 1.2
        return 1.1 if changed else None


class Boza(Peer):
    """
    The solver of Boža, "Fast and effective weight update for pruned large language
    models", TMLR 2024. It has ρ = 1, columns scaled to norm one, and a damping of 0.1
    of the scaled G. Over 15 steps the sparsity grows to the one asked for (cubically
    and unstructured; n:m at once). In 5 more steps the support is held.

    :param statistics: Gram matrices of the input of a stage
    """

    STEPS, GROWING_STEPS = 20, 15
    DAMPING = 0.1

    def __init__(self, statistics: GramStatistics) -> None:
        super().__init__(StageProblem(statistics))
        scaled = self._stage.quadratic.statistics
        damping = torch.full_like(scaled.gram[0], self.DAMPING)
        self._stage.quadratic = Quadratic(scaled, damping)
        self._resolvent = self._stage.quadratic.resolvent(1.0)

    def _pruned(self, problem: OperatorProblem) -> PrunedWeight:
        start = problem.rounded(self._sparse(problem.objective, problem.pattern))
        return problem.solution(problem.filled(start), start.error)

    def _sparse(self, objective: LayerObjective, pattern: SparsityPattern) -> Tensor:
        weight = objective.weight
        multiplier = torch.zeros_like(weight)
        for step in range(1, self.STEPS + 1):
            moved = weight + multiplier
            if step <= self.GROWING_STEPS:
                support = self._pattern_at(step, pattern).support(moved.abs())
            sparse = moved * support
            multiplier = moved - sparse
            weight = (objective.target + sparse - multiplier) @ self._resolvent
        return (weight + multiplier) * support

    def _pattern_at(self, step: int, pattern: SparsityPattern) -> SparsityPattern:
        if pattern.group or step == self.GROWING_STEPS:
            return pattern
        share = 1 - (1 - step / self.GROWING_STEPS) ** 3
        return Unstructured(pattern.sparsity * share)
