"""Algorithm 1: from a dense weight and Gram matrices to the pruned weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from torch import Tensor

from fista_modifier.solver.admm import ADMM
from fista_modifier.solver.fista import fista
from fista_modifier.solver.gram import GramStatistics
from fista_modifier.solver.interface import PrunedWeight, SolverFactory
from fista_modifier.solver.patterns import SparsityPattern
from fista_modifier.solver.stage import Candidate, OperatorProblem, StageProblem
from fista_modifier.solver.trials import Trial
from fista_modifier.solver.tuning import LambdaBisection, lambda_unit
from fista_modifier.solver.warm_start import OneShot, warm_start

WarmStart = Literal["dense", OneShot, "admm"]
"""
The name of the warm start W₀*. It is a one-shot method, the dense weights, or the ADMM
of this package.
"""

Starter = Callable[[OperatorProblem], Tensor]
"""
A function that finds W₀* for an operator, in scaled columns. W₀* has the pattern,
unless it is the dense weights.
"""

MAX_ROUNDS = 100
"""
The most rounds of the search for λ. With fewer tokens than features the error can reach
zero, and each round may come a little closer to it.
"""

__all__ = [
    "FAST",
    "FISTAPruner",
    "PAPER",
    "SolverOptions",
    "WarmStart",
    "prune_weight",
]


@dataclass(frozen=True)
class SolverOptions:
    """
    Parameters of Algorithm 1, by the paper's symbols, and of what this project adds.

    :param lambda_init: λ₀, the first and smallest λ, in units of
        :func:`~fista_modifier.solver.tuning.lambda_unit`
    :param lambda_max: M, the largest λ, in the same units
    :param max_iterations: K, FISTA iterations for one λ
    :param patience: T, consecutive values of λ without improvement that end the search
        (0: no search, the result is the warm start, refitted)
    :param epsilon: ε, relative improvement below which the search ends
    :param xi: ξ: λ grows while rounding causes more than this share of the error
    :param start: the warm start W₀*
    :param admm_steps: steps of an ADMM warm start
    :param column_scaling: whether to solve for V diag(G)^½ (G with its damping), so
        that the ℓ1 penalty and the rounding weigh an entry by its feature's norm, as
        Wanda does, and the problem is better conditioned
    :param refit: whether to give the kept entries their least squares values after each
        rounding (:func:`~fista_modifier.solver.support.refit_`), free of the ℓ1 term's
        shrinkage
    :param dampening_frac: damping of the whole problem (with ``refit``), as a fraction
        of :attr:`~fista_modifier.solver.gram.GramStatistics.typical_power`, and of a
        SparseGPT warm start, as a fraction of the mean of diag(G)
    :param block_size: columns that a SparseGPT warm start prunes at once
    """

    lambda_init: float = 0.03
    lambda_max: float = 1e2
    max_iterations: int = 10
    patience: int = 1
    epsilon: float = 1e-3
    xi: float = 0.3
    start: WarmStart = "admm"
    admm_steps: int = 10
    column_scaling: bool = True
    refit: bool = True
    dampening_frac: float = 0.45
    block_size: int = 128

    def __call__(self, statistics: GramStatistics) -> FISTAPruner:
        """
        Make the solver of a stage.

        :param statistics: Gram matrices of the input of the stage, n×n
        :return: Algorithm 1 with these parameters, for the operators of the stage
        """
        return FISTAPruner(statistics, self)


FAST = SolverOptions(patience=0, dampening_frac=0.15)
"""
The options for layers that are not reconstructed. They have ADMM and a refit, without
FISTA.
"""

PAPER = SolverOptions(
    lambda_init=1e-5,
    max_iterations=20,
    patience=3,
    start="sparsegpt",
    column_scaling=False,
    refit=False,
    dampening_frac=0.01,
)
"""
The options of Algorithm 1 as published, with λ in this project's unit. Section 4.1 has
two other settings: ε = 1e-6 for OPT, and a start from Wanda for LLaMA.
"""


def prune_weight(
    weight: Tensor,
    statistics: GramStatistics,
    pattern: SparsityPattern,
    options: SolverFactory | None = None,
) -> PrunedWeight:
    """
    Prune one linear operator.

    :param weight: dense weight W, m×n, of any floating dtype
    :param statistics: Gram matrices of its inputs, n×n
    :param pattern: sparsity asked for; W* has exactly its zeros (an unstructured
        result has more only where fewer entries of W itself are non-zero, or where
        values of the dtype could only raise the error)
    :param options: parameters of Algorithm 1, or another solver
    :return: W* in the dtype and on the device of ``weight``
    :raises ValueError: if the pattern does not fit the width of W
    """
    solver = (options or SolverOptions())(statistics)
    return solver.prune([weight], [pattern])[0]


@dataclass
class Incumbent:
    """
    The best candidate so far, in a place of its own. No caller holds a candidate that a
    better one has replaced.

    :param best: the candidate of lowest error
    """

    best: Candidate


class FISTAPruner:
    """
    Algorithm 1 of the paper, for all operators that share an input.

    The result is never worse than its warm start, and this holds in the checkpoint,
    too. As in section 3.5's text (and unlike the listing, which never resets t), T
    counts consecutive rounds without improvement. Rounds that repeat the same λ are not
    idle: FISTA goes on from the best weight so far, and its support may change. There
    are at most 100 rounds, a bound that the paper does not have.

    :param statistics: Gram matrices of the shared input, n×n
    :param options: parameters of the algorithm
    """

    def __init__(self, statistics: GramStatistics, options: SolverOptions) -> None:
        self._options = options
        # One-shot methods have a damping of their own. Only they need G unscaled.
        one_shot = options.start in get_args(OneShot)
        self._raw_gram = statistics.gram if one_shot else None
        ridge = options.dampening_frac * statistics.typical_power
        self._stage = StageProblem(
            statistics,
            damping=ridge if options.refit else None,
            column_scaling=options.column_scaling,
        )

    def prune(
        self, weights: Sequence[Tensor], patterns: Sequence[SparsityPattern]
    ) -> list[PrunedWeight]:
        """
        Prune each operator to its pattern.

        :param weights: dense weight W, m×n, of each operator, of any floating dtype
        :param patterns: the pattern that each operator is to have
        :return: W* of each operator, in the dtype and on the device of its W
        :raises ValueError: if a pattern does not fit the width n
        """
        starter = self._starter()
        solutions = []
        for number, (weight, pattern) in enumerate(zip(weights, patterns, strict=True)):
            problem = self._stage.operator(weight, pattern)
            start = starter(problem)
            if number == len(weights) - 1:
                del starter  # Its inverse of G is not needed any longer.
            support = pattern.support(start.abs())
            incumbent = Incumbent(problem.cast(start * support))
            del start
            start_error = incumbent.best.error
            if self._options.refit:
                incumbent.best = problem.refit(incumbent.best, support)
            del support
            trials = self._search(problem, incumbent)
            best = problem.filled(incumbent.best)
            solutions.append(problem.solution(best, start_error, trials))
            del problem, incumbent, best  # The next operator needs as much memory.
        return solutions

    def _search(self, problem: OperatorProblem, incumbent: Incumbent) -> list[Trial]:
        """
        Run the loop of Algorithm 1.

        :param incumbent: holds the start, and in the end W*_best
        :return: the rounds that led to it
        """
        options, objective = self._options, problem.objective
        unit = lambda_unit(objective)
        search = LambdaBisection(options.lambda_init, options.lambda_max)
        # FISTA starts from dense weights as they are, but only their rounding counts.
        from_dense = options.start == "dense"
        iterate = objective.weight if from_dense else incumbent.best.weight
        trials: list[Trial] = []
        failures = 0
        while failures < options.patience and len(trials) < MAX_ROUNDS:
            penalty = search.value
            solution = fista(objective, penalty * unit, iterate, options.max_iterations)
            unrounded_error = objective.error(solution.weight)
            candidate = self._feasible_(problem, solution.weight, incumbent.best.error)
            error = candidate.error
            before = incumbent.best.error
            improvement = (before - error) / before if before else 0.0
            if improvement > 0:
                incumbent.best = candidate
                iterate = candidate.weight
                failures = 0
            else:
                failures += 1
            share = (error - unrounded_error) / error if error else 0.0
            lowest = incumbent.best.error
            trials.append(Trial(penalty, error, lowest, solution.iterations, share))
            if 0 < improvement < options.epsilon:
                break
            search.update(increase=share > options.xi)
        return trials

    def _feasible_(
        self, problem: OperatorProblem, iterate: Tensor, best_error: float
    ) -> Candidate:
        """
        Round and refit an iterate in place, and return it cast as the checkpoint will
        have it.
        """
        support = problem.pattern.support(iterate.abs())
        iterate.mul_(support)
        if self._options.refit:
            problem.refitted_(iterate, support, best_error)
        return problem.cast(iterate)

    def _starter(self) -> Starter:
        kind = self._options.start
        if kind == "dense":
            return lambda problem: problem.objective.weight
        if kind == "admm":
            admm = ADMM(self._stage.quadratic, self._options.admm_steps)
            return lambda problem: admm(problem.objective, problem.pattern)
        assert self._raw_gram is not None  # It was kept for these starts.
        return partial(self._one_shot, kind, self._raw_gram.to(self._stage.device))

    def _one_shot(
        self, kind: OneShot, gram: Tensor, problem: OperatorProblem
    ) -> Tensor:
        return self._stage.scaled(
            warm_start(
                kind,
                self._stage.unscaled(problem.objective.weight),
                gram,
                problem.pattern,
                block_size=self._options.block_size,
                dampening_frac=self._options.dampening_frac,
            )
        )
