"""One decoder layer: X and X* in, sparse weights out, stage by stage."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Literal

from loguru import logger
from torch import Tensor

from fista_modifier.calibration.recording import Recording
from fista_modifier.calibration.replay import LayerInputs
from fista_modifier.calibration.stages import (
    Stage,
    agreed,
    find_stages,
    used_without_a_call,
    waves,
)
from fista_modifier.calibration.statistics import wave_statistics
from fista_modifier.distributed import ALONE, Ranks, shared_out
from fista_modifier.models.operators import Operator, replaced_weights
from fista_modifier.pruning.reconstruction import Reconstruction, reconstruct
from fista_modifier.pruning.results import OperatorResult, ReconstructionResult
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
    "PrunedLayer",
    "prune_layer",
]

ErrorCorrection = Literal["none", "intra", "full"]


@dataclass(frozen=True)
class PrunedLayer:
    """
    :param weights: out×in weight of each operator by its name, in the dtype of the
        module
    :param operators: what became of each
    :param reconstruction: what became of the layer, if it was reconstructed
    """

    weights: dict[str, Tensor]
    operators: list[OperatorResult]
    reconstruction: ReconstructionResult | None = None

    def on_cpu(self) -> PrunedLayer:
        """:return: the same, to be sent to another process or to disk"""
        weights = {name: weight.cpu() for name, weight in self.weights.items()}
        return replace(self, weights=weights)


def prune_layer(
    operators: Sequence[Operator],
    recording: Recording,
    pruned_inputs: LayerInputs,
    patterns: Mapping[str, SparsityPattern],
    options: SolverOptions,
    *,
    correct_errors: bool,
    reconstruction: Reconstruction | None = None,
    on_batch: Callable[[], object] = lambda: None,
    on_operator: Callable[[OperatorResult], object] = lambda _: None,
    ranks: Ranks = ALONE,
    offload: bool = False,
) -> PrunedLayer:
    """
    Prune the operators of one decoder layer in the order in which they run, then train
    what was kept. The model is not changed: the caller stores the result when it suits
    the pipeline.

    :param operators: the layer's operators that are to be pruned
    :param recording: what the layer was called with in the dense model
    :param pruned_inputs: its inputs for X* (``recording.inputs`` for independent
        layers)
    :param patterns: sparsity asked for, of each operator by its name
    :param options: parameters of Algorithm 1
    :param correct_errors: whether X* follows the operators pruned before (otherwise
        X* = X at every stage)
    :param reconstruction: how to train the layer afterwards; None leaves it
    :param on_batch: called after each batch of each wave and of the reconstruction
    :param on_operator: called with the result of each operator, as soon as it is known
    :param ranks: that prune this layer together, each with batches of its own: sums go
        over all of them, operators are shared out, and rank 0 reconstructs
    :param offload: keep n×n matrices in main memory
    :return: weights, and what became of the operators and the layer, alike on all ranks
    :raises ValueError: if an activation is NaN or infinite
    """
    pruned: dict[Operator, Tensor] = {}
    results: list[OperatorResult] = []

    def add(operator: Operator, solution: PrunedWeight, result: OperatorResult) -> None:
        if result.tokens and not solution.output_norm:
            logger.warning(
                f"{operator.name} puts out nothing for all {result.tokens} tokens: any "
                "weight has error 0, and what is pruned of it rests on no data"
            )
        pruned[operator] = solution.weight
        results.append(result)
        on_operator(result)

    corrected = pruned if correct_errors else {}
    stages = agreed(find_stages(operators, recording.inputs), operators, ranks)
    for wave, dense_inputs, inputs in _with_inputs(
        stages, recording, pruned_inputs, corrected
    ):
        statistics = wave_statistics(
            wave,
            dense_inputs,
            inputs,
            corrected,
            recording.real_tokens,
            recording.take_outputs(wave[0]) if len(wave) == 1 else None,
            on_batch,
            ranks,
            offload,
        )
        for operator, solution, tokens, seconds in _solve(
            wave, statistics, patterns, options, ranks
        ):
            pattern = patterns[operator.name]
            add(
                operator,
                solution,
                _result(operator, pattern, solution, tokens, seconds),
            )
    uncalled = [operator for operator in operators if operator not in pruned]
    by_others = used_without_a_call(uncalled, recording.inputs[0]) if uncalled else []
    for operator in uncalled:
        if operator in by_others:
            logger.warning(
                f"{operator.name} stays dense: its weight is read by another module, "
                "which does not call it, so that its inputs are not known"
            )
        else:
            logger.warning(
                f"No calibration token reaches {operator.name}: pruned by magnitude"
            )
            pattern = patterns[operator.name]
            no_data = GramStatistics.empty(operator.weight.shape[1])
            by_magnitude = replace(
                PAPER,
                start="magnitude",
                preserve_sparsity_mask=options.preserve_sparsity_mask,
            )
            solution = prune_weight(operator.weight, no_data, pattern, by_magnitude)
            add(operator, solution, _result(operator, pattern, solution, 0, 0.0))
    outcome = None
    if reconstruction is not None:
        pruned, outcome = _reconstructed(
            pruned, recording, pruned_inputs, reconstruction, on_batch, ranks
        )
        errors = outcome.operator_errors
        results = [
            replace(result, reconstructed_error=errors.get(result.name))
            for result in results
        ]
    weights = {operator.name: weight for operator, weight in pruned.items()}
    return PrunedLayer(weights, results, outcome)


def _with_inputs(
    stages: Sequence[Stage],
    recording: Recording,
    pruned_inputs: LayerInputs,
    pruned: dict[Operator, Tensor],
) -> Iterator[tuple[list[Stage], LayerInputs, LayerInputs]]:
    """
    The stages of each wave, with the smallest run that shows their inputs, dense and
    partly pruned. The inputs of a block in the partly pruned layer are kept from wave
    to wave, until an operator before the block is pruned that they depend on.

    A block that routes its tokens (a mixture of experts) is always run from its inputs
    in the dense model: from those of the pruned one other experts would get the tokens,
    and X and X* be those of different tokens. Inside an expert, X* still follows from
    what was pruned before.

    What a block was called with is forgotten when its last wave is done.
    """
    runs = [
        (dense_inputs, list(group))
        for wave in waves(stages)
        for dense_inputs, group in groupby(wave, recording.of_stage)
    ]
    left = Counter(id(dense_inputs) for dense_inputs, _ in runs)
    routed = {id(source) for source, group in runs for one in group if one.routed}
    before = _operators_before(runs)
    of_block: dict[int, tuple[int, LayerInputs]] = {}
    for dense_inputs, group in runs:
        block = id(dense_inputs)
        in_layer = dense_inputs is recording.inputs
        inputs = pruned_inputs
        if any(one.routed for one in group) or (block in routed and not in_layer):
            inputs = dense_inputs
        elif not pruned and pruned_inputs is recording.inputs:
            inputs = dense_inputs
        elif not in_layer and (left[block] > 1 or block in of_block):
            done = sum(operator.name in before[block] for operator in pruned)
            if of_block.get(block, (-1,))[0] != done:
                with replaced_weights(pruned):
                    inputs = pruned_inputs.of_block(dense_inputs.layer)
                of_block[block] = done, inputs
            inputs = of_block[block][1]
        yield group, dense_inputs, inputs
        left[block] -= 1
        if not left[block] and not in_layer:
            for used in (dense_inputs, inputs):
                if used is not pruned_inputs:
                    used.clear()


def _operators_before(
    runs: Sequence[tuple[LayerInputs, list[Stage]]],
) -> dict[int, set[str]]:
    """Outside each block, those on which what is run in it depends."""
    inside: defaultdict[int, set[str]] = defaultdict(set)
    follows: defaultdict[int, set[str]] = defaultdict(set)
    for inputs, group in runs:
        for stage in group:
            inside[id(inputs)] |= {operator.name for operator in stage.operators}
            follows[id(inputs)] |= stage.follows
    return {block: follows[block] - inside[block] for block in follows}


def _solve(
    wave: Sequence[Stage],
    statistics: list[GramStatistics],
    patterns: Mapping[str, SparsityPattern],
    options: SolverOptions,
    ranks: Ranks,
) -> Iterator[tuple[Operator, PrunedWeight, int, float]]:
    """
    Solution, tokens and seconds of each operator; the work is shared out. Uses the
    statistics up, as nothing else in a layer is as large.
    """
    # operators of a stage share inverses, so stages are split only if they are few
    split = len(wave) < ranks.size
    tasks = [
        (operators, sums)
        for stage, sums in zip(wave, statistics, strict=True)
        for operators in (
            [[one] for one in stage.operators]
            if split
            else _of_one_pattern(stage.operators, patterns)
        )
    ]
    statistics.clear()
    costs = [sum(one.weight.numel() for one in operators) for operators, _ in tasks]
    owners = shared_out(costs, ranks)
    tokens = {one: sums.tokens for operators, sums in tasks for one in operators}

    def solve_mine() -> dict[str, tuple[PrunedWeight, float]]:
        solved = {}
        for owner in owners:
            operators, sums = tasks.pop(0)
            if owner != ranks.rank:
                continue
            started = time.perf_counter()
            solver = StageSolver(sums, patterns[operators[0].name], options)
            del sums
            solutions = solver.prune([operator.weight for operator in operators])
            seconds = time.perf_counter() - started
            rows = sum(solution.weight.shape[0] for solution in solutions)
            for operator, solution in zip(operators, solutions, strict=True):
                share = seconds * solution.weight.shape[0] / rows
                if ranks.size > 1:
                    solution = solution.moved_to("cpu")
                solved[operator.name] = solution, share
        return solved

    solved = dict(chain(*(part.items() for part in ranks.each(solve_mine))))
    for operator, count in tokens.items():
        solution, seconds = solved[operator.name]
        yield operator, solution.moved_to(operator.weight.device), count, seconds


def _of_one_pattern(
    operators: Sequence[Operator], patterns: Mapping[str, SparsityPattern]
) -> list[list[Operator]]:
    groups: dict[str, list[Operator]] = {}
    for operator in operators:
        groups.setdefault(str(patterns[operator.name]), []).append(operator)
    return list(groups.values())


def _reconstructed(
    pruned: dict[Operator, Tensor],
    recording: Recording,
    pruned_inputs: LayerInputs,
    options: Reconstruction,
    on_batch: Callable[[], object],
    ranks: Ranks,
) -> tuple[dict[Operator, Tensor], ReconstructionResult]:
    """Train on the batches of all ranks, on rank 0: a step follows the one before."""
    whole, inputs = _collected(recording, pruned_inputs, ranks)

    def train() -> tuple[list[Tensor], ReconstructionResult] | None:
        if ranks.rank:
            return None
        weights, outcome = reconstruct(whole, inputs, pruned, options, on_batch)
        return [weights[operator].cpu() for operator in pruned], outcome

    trained = ranks.each(train)[0]
    assert trained is not None  # rank 0 has it
    weights, outcome = trained
    return {
        operator: weight.to(pruned[operator])
        for operator, weight in zip(pruned, weights, strict=True)
    }, outcome


def _collected(
    recording: Recording, pruned_inputs: LayerInputs, ranks: Ranks
) -> tuple[Recording, LayerInputs]:
    """What all ranks recorded, on rank 0."""
    whole = recording.gathered(ranks, 0)
    if pruned_inputs is recording.inputs:
        return whole, whole.inputs
    return whole, pruned_inputs.gathered(ranks, 0)


def _result(
    operator: Operator,
    pattern: SparsityPattern,
    solution: PrunedWeight,
    tokens: int,
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
        tokens=tokens,
        seconds=seconds,
        search=tuple(
            trial.in_units_of(solution.output_norm) for trial in solution.trials
        ),
    )
