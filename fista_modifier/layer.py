"""One decoder layer: X and X* in, sparse weights out, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, NamedTuple

from loguru import logger
from torch import Tensor

from fista_modifier.calibration.operators import Operator, replaced_weights
from fista_modifier.calibration.recording import Recording
from fista_modifier.calibration.replay import LayerInputs
from fista_modifier.calibration.stages import Stage, find_stages
from fista_modifier.calibration.statistics import stage_statistics
from fista_modifier.reconstruction import (
    Reconstruction,
    ReconstructionResult,
    reconstruct,
)
from fista_modifier.solver import (
    PAPER,
    GramStatistics,
    PrunedWeight,
    SolverOptions,
    SparsityPattern,
    StageSolver,
    prune_weight,
)

__all__ = [
    "ErrorCorrection",
    "OperatorResult",
    "PrunedLayer",
    "SearchStep",
    "prune_layer",
]

ErrorCorrection = Literal["none", "intra", "full"]


class SearchStep(NamedTuple):
    """
    One value of λ that was tried; errors are relative, as in :class:`OperatorResult`.

    :param penalty: λ, in units of ``lambda_unit``
    :param error: of the weight that it led to
    :param best_error: lowest so far, the warm start's included
    """

    penalty: float
    error: float
    best_error: float


@dataclass(frozen=True)
class OperatorResult:
    """
    What became of one operator.

    :param name: its module's name
    :param shape: (m, n), out and in features
    :param pattern: the sparsity asked for
    :param zeros: number of zero entries of W*
    :param relative_error: ‖W* X* − W X‖_F / ‖W X‖_F as the solver left the operator,
        over all calibration tokens; that is how it is stored, unless its layer was
        reconstructed
    :param relative_start_error: the same of the warm start
    :param penalty: λ of the best trial, in units of ``lambda_unit``; 0 if the warm
        start was never improved on
    :param trials: values of λ tried
    :param iterations: FISTA iterations in all
    :param tokens: calibration tokens that reached the operator
    :param seconds: wall time of the solver: of its stage, shared out by rows
    :param reconstructed_error: where its layer was reconstructed, the error of the
        weight as it is stored, over every sixteenth batch
    :param search: the values of λ, in the order in which they were tried
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
    reconstructed_error: float | None = None
    search: tuple[SearchStep, ...] = ()

    @property
    def stored_error(self) -> float:
        """of the weight as it is stored"""
        if self.reconstructed_error is None:
            return self.relative_error
        return self.reconstructed_error

    @property
    def sparsity(self) -> float:
        """share of zeros"""
        return self.zeros / (self.shape[0] * self.shape[1])

    @property
    def kind(self) -> str:
        """the last part of the name, such as "q_proj\""""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class PrunedLayer:
    """
    :param weights: out×in weight of each operator, in the dtype of the module
    :param operators: what became of each
    :param reconstruction: what became of the layer, if it was reconstructed
    """

    weights: dict[Operator, Tensor]
    operators: list[OperatorResult]
    reconstruction: ReconstructionResult | None = None


def prune_layer(
    operators: Sequence[Operator],
    recording: Recording,
    pruned_inputs: LayerInputs,
    pattern: SparsityPattern,
    options: SolverOptions,
    *,
    correct_errors: bool,
    reconstruction: Reconstruction | None = None,
    on_batch: Callable[[], object] = lambda: None,
    on_operator: Callable[[OperatorResult], object] = lambda _: None,
) -> PrunedLayer:
    """
    Prune the operators of one decoder layer in the order in which they run, then train
    what was kept. The model is not changed: the caller stores the result when it suits
    the pipeline.

    :param operators: the layer's operators that are to be pruned
    :param recording: what the layer was called with in the dense model
    :param pruned_inputs: its inputs for X* (``recording.inputs`` for independent
        layers)
    :param pattern: sparsity asked for
    :param options: parameters of Algorithm 1
    :param correct_errors: whether X* follows the operators pruned before (otherwise
        X* = X at every stage)
    :param reconstruction: how to train the layer afterwards; None leaves it
    :param on_batch: called after each batch of each stage and of the reconstruction
    :param on_operator: called with the result of each operator, as soon as it is known
    :return: weights, and what became of the operators and the layer
    :raises ValueError: if an activation is NaN or infinite
    """
    pruned: dict[Operator, Tensor] = {}
    results: list[OperatorResult] = []

    def add(operator: Operator, solution: PrunedWeight, result: OperatorResult) -> None:
        pruned[operator] = solution.weight
        results.append(result)
        on_operator(result)

    corrected = pruned if correct_errors else {}
    stages = find_stages(operators, recording.inputs)
    for stage, dense_inputs, inputs in _with_inputs(
        stages, recording, pruned_inputs, corrected
    ):
        statistics = stage_statistics(
            stage, dense_inputs, inputs, corrected, recording.real_tokens, on_batch
        )
        started = time.perf_counter()
        solutions = StageSolver(statistics, pattern, options).prune(
            [operator.weight for operator in stage.operators]
        )
        rows = sum(solution.weight.shape[0] for solution in solutions)
        seconds_per_row = (time.perf_counter() - started) / rows
        for operator, solution in zip(stage.operators, solutions, strict=True):
            seconds = seconds_per_row * solution.weight.shape[0]
            result = _result(operator, pattern, solution, statistics, seconds)
            add(operator, solution, result)
    for operator in operators:
        if operator not in pruned:
            logger.warning(
                f"No calibration token reaches {operator.name}: pruned by magnitude"
            )
            statistics = GramStatistics.empty(operator.weight.shape[1])
            by_magnitude = replace(PAPER, start="magnitude")
            solution = prune_weight(operator.weight, statistics, pattern, by_magnitude)
            result = _result(operator, pattern, solution, statistics, 0.0)
            add(operator, solution, result)
    if reconstruction is None:
        return PrunedLayer(pruned, results)
    pruned, outcome = reconstruct(
        recording, pruned_inputs, pruned, reconstruction, on_batch
    )
    errors = outcome.operator_errors
    results = [
        replace(result, reconstructed_error=errors.get(result.name))
        for result in results
    ]
    return PrunedLayer(pruned, results, outcome)


def _with_inputs(
    stages: Sequence[Stage],
    recording: Recording,
    pruned_inputs: LayerInputs,
    pruned: dict[Operator, Tensor],
) -> Iterator[tuple[Stage, LayerInputs, LayerInputs]]:
    """
    Each stage with the smallest run that shows its inputs, dense and partly pruned. The
    inputs of a block with several stages in the partly pruned layer are computed once:
    they are final when its first stage's turn comes.
    """
    for dense_inputs, group in groupby(stages, recording.of_stage):
        in_block = list(group)
        inputs = pruned_inputs
        if not pruned and pruned_inputs is recording.inputs:
            inputs = dense_inputs
        elif dense_inputs is not recording.inputs and len(in_block) > 1:
            with replaced_weights(pruned):
                inputs = pruned_inputs.of_block(dense_inputs.layer)
        for stage in in_block:
            yield stage, dense_inputs, inputs


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
        search=tuple(
            SearchStep(
                trial.penalty,
                solution.relative(trial.error),
                solution.relative(trial.best_error),
            )
            for trial in solution.trials
        ),
    )
