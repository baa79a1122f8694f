"""Algorithm 1: from a dense weight and Gram matrices to the pruned weight."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fista_modifier.solver.fista import fista
from fista_modifier.solver.gram import GramStatistics
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.patterns import SparsityPattern, project
from fista_modifier.solver.support import fill_support
from fista_modifier.solver.tuning import LambdaBisection, lambda_unit
from fista_modifier.solver.warm_start import WarmStart, warm_start

__all__ = ["PrunedWeight", "SolverOptions", "prune_weight"]


@dataclass(frozen=True)
class SolverOptions:
    """
    Algorithm 1's inputs, by the paper's symbols (section 4.1 gives its values).

    :param lambda_init: λ₀, the first and smallest λ, in units of
        :func:`~fista_modifier.solver.tuning.lambda_unit`
    :param lambda_max: M, the largest λ, in the same units
    :param max_iterations: K, FISTA iterations for one λ
    :param patience: T, consecutive values of λ without improvement that end the search
    :param epsilon: ε, relative improvement below which the search ends
    :param xi: ξ: λ grows while rounding causes more than this share of the error
    :param start: the warm start W₀*
    :param block_size: columns that a SparseGPT warm start prunes at once
    :param dampening_frac: damping of a SparseGPT warm start
    """

    lambda_init: float = 1e-5
    lambda_max: float = 1e2
    max_iterations: int = 20
    patience: int = 3
    epsilon: float = 1e-3
    xi: float = 0.3
    start: WarmStart = "sparsegpt"
    block_size: int = 128
    dampening_frac: float = 0.01


@dataclass(frozen=True)
class Trial:
    """
    One round of Algorithm 1.

    :param penalty: λ, in units of :func:`~fista_modifier.solver.tuning.lambda_unit`
    :param iterations: FISTA iterations done
    :param error: 𝓔_total = ‖W_{K+1}* X* − W X‖_F after rounding
    :param rounding: 𝓔_round / 𝓔_total
    :param best_error: lowest error so far, the warm start's included
    """

    penalty: float
    iterations: int
    error: float
    rounding: float
    best_error: float


@dataclass(frozen=True)
class PrunedWeight:
    """
    :param weight: W*, m×n, with the pattern, in the dtype asked for
    :param error: ‖W* X* − W X‖_F of exactly this weight
    :param start_error: the same of the warm start, after rounding and the cast
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
        return self.error / self.output_norm if self.output_norm else 0.0

    @property
    def relative_start_error(self) -> float:
        """start_error / ‖WX‖_F"""
        return self.start_error / self.output_norm if self.output_norm else 0.0


def prune_weight(
    weight: Tensor,
    statistics: GramStatistics,
    pattern: SparsityPattern,
    options: SolverOptions | None = None,
) -> PrunedWeight:
    """
    Prune one linear operator by Algorithm 1 of the paper.

    Every candidate is judged by its true error after it was cast to the dtype of
    ``weight``, so the result is never worse than its warm start in the checkpoint
    either. As in section 3.5's text (and unlike the listing, which never resets t),
    T counts consecutive rounds without improvement. Rounds that repeat the same λ are
    not idle: FISTA goes on from the best weight so far, and its support may change.

    :param weight: dense weight W, m×n, of any floating dtype
    :param statistics: Gram matrices of its inputs, n×n
    :param pattern: sparsity asked for; W* has exactly its zeros (an unstructured
        result has more only where fewer entries of W itself are non-zero)
    :param options: parameters of the algorithm, by default the paper's
    :return: W* in the dtype and on the device of ``weight``
    :raises ValueError: if the pattern does not fit the width of W
    """
    options = options or SolverOptions()
    pattern.check_columns(weight.shape[1])
    objective = LayerObjective(weight, statistics)

    def feasible(candidate: Tensor) -> Tensor:
        rounded = project(candidate, pattern)
        return rounded.to(weight.dtype).to(torch.float32)

    start = warm_start(
        options.start,
        objective.weight,
        objective.gram,
        pattern,
        block_size=options.block_size,
        dampening_frac=options.dampening_frac,
    )
    best = feasible(start)
    start_error = best_error = objective.error(best)
    # a dense start is FISTA's first iterate as it is, though only its rounding counts
    iterate = start if options.start == "dense" else best

    unit = lambda_unit(objective)
    search = LambdaBisection(options.lambda_init, options.lambda_max)
    trials: list[Trial] = []
    failures = 0
    while failures < options.patience:
        penalty = search.value
        solution = fista(objective, penalty * unit, iterate, options.max_iterations)
        candidate = feasible(solution.weight)
        error = objective.error(candidate)
        rounding = error - objective.error(solution.weight)
        improvement = (best_error - error) / best_error if best_error else 0.0
        if improvement > 0:
            iterate = best = candidate
            best_error = error
            failures = 0
        else:
            failures += 1
        share = rounding / error if error else 0.0
        trials.append(
            Trial(penalty, solution.iterations, error, share, best_error)
        )
        if 0 < improvement < options.epsilon:
            break
        search.update(increase=share > options.xi)

    result = fill_support(objective, best, pattern).to(weight.dtype)
    return PrunedWeight(
        weight=result.to(weight.device),
        error=objective.error(result.to(objective.weight)),
        start_error=start_error,
        output_norm=objective.output_norm,
        trials=trials,
    )
