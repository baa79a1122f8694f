"""One decoder layer, pruned stage by stage: X and X* in, sparse weights out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loguru import logger
from torch import Tensor

from fista_modifier.calibration.operators import Operator
from fista_modifier.calibration.replay import LayerInputs
from fista_modifier.calibration.stages import find_stages
from fista_modifier.calibration.statistics import stage_statistics
from fista_modifier.solver import (
    PAPER,
    GramStatistics,
    PrunedWeight,
    SolverOptions,
    SparsityPattern,
    StageSolver,
    prune_weight,
)

__all__ = ["ErrorCorrection", "OperatorResult", "prune_layer"]

ErrorCorrection = Literal["none", "intra", "full"]


@dataclass(frozen=True)
class OperatorResult:
    """
    What became of one operator.

    :param name: its module's name
    :param shape: (m, n), out and in features
    :param pattern: the sparsity asked for
    :param zeros: number of zero entries of W*
    :param relative_error: ‖W* X* − W X‖_F / ‖W X‖_F of the weight as it is stored
    :param relative_start_error: the same of the warm start
    :param penalty: λ of the best trial, in units of ``lambda_unit``; 0 if the warm
        start was never improved on
    :param trials: values of λ tried
    :param iterations: FISTA iterations in all
    :param tokens: calibration tokens that reached the operator
    :param seconds: wall time of the solver: of its stage, shared out by rows
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    zeros: int
    relative_error: float
    relative_start_error: float
    penalty: float
    trials: int
    iterations: int
    tokens: int
    seconds: float

    @property
    def sparsity(self) -> float:
        """share of zeros"""
        return self.zeros / (self.shape[0] * self.shape[1])

    @property
    def kind(self) -> str:
        """the last part of the name, such as "q_proj\""""
        return self.name.rpartition(".")[2]


def prune_layer(
    operators: Sequence[Operator],
    dense_inputs: LayerInputs,
    pruned_inputs: LayerInputs,
    pattern: SparsityPattern,
    options: SolverOptions,
    *,
    correct_errors: bool,
    on_batch: Callable[[], object] = lambda: None,
    on_operator: Callable[[OperatorResult], object] = lambda _: None,
) -> dict[Operator, Tensor]:
    """
    Prune the operators of one decoder layer in the order in which they run. The model
    is not changed: the caller stores the result when it suits the pipeline.

    :param operators: the layer's operators that are to be pruned
    :param dense_inputs: the layer's inputs in the dense model
    :param pruned_inputs: its inputs for X* (the same object for independent layers)
    :param pattern: sparsity asked for
    :param options: parameters of Algorithm 1
    :param correct_errors: whether X* follows the operators pruned before (otherwise
        X* = X at every stage)
    :param on_batch: called after each batch of each stage
    :param on_operator: called with the result of each operator
    :return: out×in weight of each operator, in the dtype of the module
    :raises ValueError: if an activation is NaN or infinite
    """
    pruned: dict[Operator, Tensor] = {}
    for stage in find_stages(operators, dense_inputs):
        statistics = stage_statistics(
            stage,
            dense_inputs,
            pruned_inputs,
            pruned if correct_errors else {},
            on_batch,
        )
        started = time.perf_counter()
        solutions = StageSolver(statistics, pattern, options).prune(
            [operator.weight for operator in stage.operators]
        )
        rows = sum(solution.weight.shape[0] for solution in solutions)
        seconds_per_row = (time.perf_counter() - started) / rows
        for operator, solution in zip(stage.operators, solutions, strict=True):
            pruned[operator] = solution.weight
            seconds = seconds_per_row * solution.weight.shape[0]
            on_operator(_result(operator, pattern, solution, statistics, seconds))
    for operator in operators:
        if operator not in pruned:
            logger.warning(
                f"No calibration token reaches {operator.name}: pruned by magnitude"
            )
            statistics = GramStatistics.empty(operator.weight.shape[1])
            by_magnitude = replace(PAPER, start="magnitude")
            solution = prune_weight(operator.weight, statistics, pattern, by_magnitude)
            pruned[operator] = solution.weight
            on_operator(_result(operator, pattern, solution, statistics, 0.0))
    return pruned


def _result(
    operator: Operator,
    pattern: SparsityPattern,
    solution: PrunedWeight,
    statistics: GramStatistics,
    seconds: float,
) -> OperatorResult:
    best = min(solution.trials, key=lambda trial: trial.error, default=None)
    improved = best is not None and best.error < solution.start_error
    rows, columns = solution.weight.shape
    return OperatorResult(
        name=operator.name,
        shape=(rows, columns),
        pattern=str(pattern),
        zeros=int((solution.weight == 0).sum()),
        relative_error=solution.relative_error,
        relative_start_error=solution.relative_start_error,
        penalty=best.penalty if best is not None and improved else 0.0,
        trials=len(solution.trials),
        iterations=sum(trial.iterations for trial in solution.trials),
        tokens=statistics.tokens,
        seconds=seconds,
    )
