"""Algorithm 1: from a dense weight and Gram matrices to the pruned weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from fista_modifier.solver.admm import ADMM
from fista_modifier.solver.fista import fista
from fista_modifier.solver.gram import GramStatistics
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.patterns import SparsityPattern, Within
from fista_modifier.solver.quadratic import Quadratic
from fista_modifier.solver.support import fill_support, refit_
from fista_modifier.solver.trials import Trial
from fista_modifier.solver.tuning import LambdaBisection, lambda_unit
from fista_modifier.solver.warm_start import OneShot, warm_start

WarmStart = Literal["dense", OneShot, "admm"]
"""W₀*: a one-shot method, the dense weights, or the ADMM of this package"""

Starter = Callable[[LayerObjective, SparsityPattern], Tensor]
"""finds W₀* for an operator, in scaled columns; the dense weights lack the pattern"""

REFIT_TOLERANCE = 1e-3
"""a refit ends where a step lowers the squared error by less than this share"""

MAX_ROUNDS = 100
"""of the search for λ. With fewer tokens than features an error of zero can be had, and
each round may come a little closer to it"""

RESOLUTION = 1e-3
"""errors that differ by less than this share of ‖WX‖_F are equal: squares of float32"""

__all__ = [
    "FAST",
    "PAPER",
    "PrunedWeight",
    "SolverOptions",
    "StageSolver",
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
    :param column_scaling: solve for V diag(G)^½ (G with its damping), so that the ℓ1
        penalty and the rounding weigh an entry by its feature's norm, as Wanda does,
        and the problem is better conditioned
    :param refit: after each rounding, give the kept entries their least squares values
        (:func:`~fista_modifier.solver.support.refit_`), free of the ℓ1 term's shrinkage
    :param dampening_frac: damping of the whole problem (with ``refit``), as a fraction
        of :attr:`~fista_modifier.solver.gram.GramStatistics.typical_power`, and of a
        SparseGPT warm start, as a fraction of the mean of diag(G)
    :param block_size: columns that a SparseGPT warm start prunes at once
    :param preserve_sparsity_mask: whether zeros of W stay zero, as of a model that is
        sparse already; otherwise the pattern is found anew, and they may get values
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
    preserve_sparsity_mask: bool = False


FAST = SolverOptions(patience=0, dampening_frac=0.15)
"""ADMM and a refit, without FISTA, for layers that are not reconstructed."""

PAPER = SolverOptions(
    lambda_init=1e-5,
    max_iterations=20,
    patience=3,
    start="sparsegpt",
    column_scaling=False,
    refit=False,
    dampening_frac=0.01,
)
"""Algorithm 1 as published, λ in this project's unit. Section 4.1 has ε = 1e-6 for OPT,
and for LLaMA starts from Wanda."""


@dataclass(frozen=True)
class PrunedWeight:
    """
    :param weight: W*, m×n, with the pattern, in the dtype asked for
    :param error: ‖W* X* − W X‖_F of exactly this weight
    :param start_error: the same of the warm start, rounded and cast but not refitted
    :param output_norm: ‖W X‖_F, the yardstick of relative errors
    :param trials: the rounds of Algorithm 1, in order
    """

    weight: Tensor
    error: float
    start_error: float
    output_norm: float
    trials: list[Trial] = field(default_factory=list)

    @property
    def relative_error(self) -> float:
        """error / ‖WX‖_F; 0 where the operator puts nothing out"""
        return self.relative(self.error)

    @property
    def relative_start_error(self) -> float:
        """start_error / ‖WX‖_F"""
        return self.relative(self.start_error)

    def relative(self, error: float) -> float:
        """
        :param error: such as that of a trial
        :return: error / ‖WX‖_F; 0 where the operator puts nothing out
        """
        return error / self.output_norm if self.output_norm else 0.0

    def moved_to(self, device: torch.device | str) -> PrunedWeight:
        """:return: the same, with the weight on a device"""
        return replace(self, weight=self.weight.to(device))


def prune_weight(
    weight: Tensor,
    statistics: GramStatistics,
    pattern: SparsityPattern,
    options: SolverOptions | None = None,
) -> PrunedWeight:
    """
    Prune one linear operator.

    :param weight: dense weight W, m×n, of any floating dtype
    :param statistics: Gram matrices of its inputs, n×n
    :param pattern: sparsity asked for; W* has exactly its zeros (an unstructured
        result has more only where fewer entries of W itself are non-zero, or where
        values of the dtype could only raise the error)
    :param options: parameters of the algorithm
    :return: W* in the dtype and on the device of ``weight``
    :raises ValueError: if the pattern does not fit the width of W
    """
    solver = StageSolver(statistics, pattern, options or SolverOptions())
    return solver.prune([weight])[0]


class StageSolver:
    """
    Algorithm 1 of the paper, for all operators that share an input.

    Every candidate is judged by its true error after it was cast to the dtype of the
    weight, so the result is never worse than its warm start in the checkpoint either.
    As in section 3.5's text (and unlike the listing, which never resets t), T counts
    consecutive rounds without improvement. Rounds that repeat the same λ are not idle:
    FISTA goes on from the best weight so far, and its support may change. There are 100
    at most, a bound that the paper does not have.

    :param statistics: Gram matrices of the shared input, n×n
    :param pattern: sparsity asked for
    :param options: parameters of the algorithm
    :raises ValueError: if the pattern does not fit the width n
    """

    def __init__(
        self,
        statistics: GramStatistics,
        pattern: SparsityPattern,
        options: SolverOptions,
    ) -> None:
        pattern.check_columns(statistics.features)
        self.pattern = pattern
        self.options = options
        self._device = statistics.execution_device
        # one-shot methods have a damping of their own; nothing else needs it unscaled
        one_shot = options.start in get_args(OneShot)
        self._raw_gram = statistics.gram if one_shot else None
        self._scale: Tensor | None = None
        damping: Tensor | None = None
        if options.refit:
            damping = torch.full_like(statistics.gram[0], self._ridge(statistics))
        if options.column_scaling:
            self._scale = statistics.column_scale(damping)
            statistics = statistics.scaled(self._scale)
            damping = None if damping is None else damping / self._scale.square()
            self._scale = self._scale.to(self._device)
        self._quadratic = Quadratic(statistics, damping)

    def prune(self, weights: Sequence[Tensor]) -> list[PrunedWeight]:
        """
        :param weights: dense weight W, m×n, of each operator, of any floating dtype
        :return: W* of each, in the dtype and on the device of its W
        """
        # the last one used takes with it what they share, such as an inverse of G
        starters = [self._starter()] * len(weights)
        return [self._prune(weight, starters) for weight in weights]

    def _ridge(self, statistics: GramStatistics) -> float:
        """What damping adds to each entry of diag(G)."""
        return self.options.dampening_frac * statistics.typical_power

    def _prune(self, weight: Tensor, starters: list[Starter]) -> PrunedWeight:
        """Algorithm 1 and what comes before and after it, for one operator."""
        objective = LayerObjective(
            self._scaled(weight.to(self._device, torch.float32)), self._quadratic
        )
        pattern = self._pattern_of(weight)
        start = starters.pop()(objective, pattern)
        support = pattern.support(start.abs())
        best = self._cast(start * support, weight.dtype)
        del start
        start_error = best_error = objective.error(best)
        if self.options.refit:
            refitted = self._refit_(objective, best.clone(), support, start_error)
            refitted = self._cast(refitted, weight.dtype)
            refitted_error = objective.error(refitted)
            if refitted_error < start_error:
                best, best_error = refitted, refitted_error
        # FISTA starts from dense weights as they are, though only their rounding counts
        iterate = objective.weight if self.options.start == "dense" else best
        best, best_error, trials = self._search(
            objective, pattern, best, best_error, iterate, weight.dtype
        )
        best, best_error = self._filled(
            objective, pattern, best, best_error, weight.dtype
        )
        return PrunedWeight(
            weight=self._unscaled(best).add(0.0).to(weight),  # and no zero is negative
            error=best_error,
            start_error=start_error,
            output_norm=objective.output_norm,
            trials=trials,
        )

    def _pattern_of(self, weight: Tensor) -> SparsityPattern:
        if not self.options.preserve_sparsity_mask:
            return self.pattern
        allowed = weight != 0
        return self.pattern if bool(allowed.all()) else Within(self.pattern, allowed)

    def _filled(
        self,
        objective: LayerObjective,
        pattern: SparsityPattern,
        best: Tensor,
        best_error: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, float]:
        """The non-zeros that are left to the weight put to use, and its error."""
        # damping would have the last entries move towards W, at the cost of the error
        undamped = LayerObjective(
            objective.weight, Quadratic(self._quadratic.statistics)
        )
        filled = fill_support(undamped, best, pattern)
        if filled is best:
            return best, best_error
        filled = self._cast(filled, dtype)
        error = objective.error(filled)
        # few tokens may ask for values that half precision cannot hold
        if error > max(best_error, RESOLUTION * objective.output_norm):
            return best, best_error
        return filled, error

    def _search(
        self,
        objective: LayerObjective,
        pattern: SparsityPattern,
        best: Tensor,
        best_error: float,
        iterate: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, float, list[Trial]]:
        """The loop of Algorithm 1: W*_best, its error, the rounds that led to it."""
        options = self.options
        unit = lambda_unit(objective)
        search = LambdaBisection(options.lambda_init, options.lambda_max)
        trials: list[Trial] = []
        failures = 0
        while failures < options.patience and len(trials) < MAX_ROUNDS:
            penalty = search.value
            solution = fista(objective, penalty * unit, iterate, options.max_iterations)
            unrounded_error = objective.error(solution.weight)
            candidate = self._feasible_(
                objective, pattern, solution.weight, best_error, dtype
            )
            error = objective.error(candidate)
            improvement = (best_error - error) / best_error if best_error else 0.0
            if improvement > 0:
                iterate = best = candidate
                best_error = error
                failures = 0
            else:
                failures += 1
            share = (error - unrounded_error) / error if error else 0.0
            trials.append(Trial(penalty, error, best_error, solution.iterations, share))
            if 0 < improvement < options.epsilon:
                break
            search.update(increase=share > options.xi)
        return best, best_error, trials

    def _starter(self) -> Starter:
        kind = self.options.start
        if kind == "dense":
            return lambda objective, _: objective.weight
        if kind == "admm":
            return ADMM(self._quadratic, self.options.admm_steps)
        assert self._raw_gram is not None  # kept for these starts
        return partial(self._one_shot, kind, self._raw_gram.to(self._device))

    def _one_shot(
        self,
        kind: OneShot,
        gram: Tensor,
        objective: LayerObjective,
        _pattern: SparsityPattern,
    ) -> Tensor:
        return self._scaled(
            warm_start(
                kind,
                self._unscaled(objective.weight),
                gram,
                self.pattern,
                block_size=self.options.block_size,
                dampening_frac=self.options.dampening_frac,
            )
        )

    def _feasible_(
        self,
        objective: LayerObjective,
        pattern: SparsityPattern,
        iterate: Tensor,
        best_error: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Round and refit in place, and cast as the checkpoint will."""
        support = pattern.support(iterate.abs())
        iterate.mul_(support)
        if self.options.refit:
            self._refit_(objective, iterate, support, best_error)
        return self._cast(iterate, dtype)

    def _refit_(
        self,
        objective: LayerObjective,
        weight: Tensor,
        support: Tensor,
        best_error: float,
    ) -> Tensor:
        tolerance = REFIT_TOLERANCE * best_error**2 / 2
        return refit_(objective, weight, support, tolerance=tolerance)

    def _cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """What a weight in scaled columns is worth once it was stored in ``dtype``."""
        return self._scaled(self._unscaled(weight).to(dtype).to(torch.float32))

    def _scaled(self, weight: Tensor) -> Tensor:
        return weight if self._scale is None else weight * self._scale

    def _unscaled(self, weight: Tensor) -> Tensor:
        return weight if self._scale is None else weight / self._scale
