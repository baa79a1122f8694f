"""Zeros in the operators of a decoder layer: Gram matrices, solver, reconstruction."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from loguru import logger
from torch import Tensor

from fista_modifier.calibration.stages import Stage, used_without_a_call
from fista_modifier.channels.orders import Interchangeable, reordered
from fista_modifier.distributed import Ranks, shared_out
from fista_modifier.models.operators import Operator
from fista_modifier.pruning.corrected import CorrectedProcedure
from fista_modifier.pruning.orders import best_order
from fista_modifier.pruning.procedures import LayerTask, PrunedLayer
from fista_modifier.pruning.reconstruction import reconstruct_on_first_rank
from fista_modifier.pruning.results import OperatorResult
from fista_modifier.solver import (
    GramStatistics,
    PrunedWeight,
    Reordered,
    SolverFactory,
    SolverOptions,
    SparsityPattern,
    Within,
    project,
)

__all__ = ["SparseProcedure"]

Ordered = tuple[Interchangeable, Tensor]
"""The channels that may change places, and the channel that comes to each place."""


@dataclass(frozen=True)
class _Solved:
    """
    The solution of one operator.

    :param solution: the operator's new weight and its errors
    :param tokens: number of tokens that reach the operator
    :param seconds: wall time
    :param orders: orders of the channels that may change places before the operator,
        one for each of its entries in ``interchangeable``
    """

    solution: PrunedWeight
    tokens: int = 0
    seconds: float = 0.0
    orders: Sequence[Tensor] = ()


@dataclass(frozen=True, kw_only=True)
class SparseProcedure(CorrectedProcedure):
    """
    The procedure that prunes the operators of a decoder layer in the order in which
    they run, and then trains what was kept.

    :param patterns: the pattern that each operator is to have, by the operator's name
    :param solver: makes the solver of a stage; SolverOptions are such a factory
    :param preserve_sparsity_mask: whether zeros of W stay zero, as in a model that is
        sparse already; otherwise the pattern is found anew, and they may get values
    :param interchangeable: channels that may change places before an operator, so that
        its n:m pattern costs less
    """

    patterns: Mapping[str, SparsityPattern] = field(default_factory=dict)
    solver: SolverFactory = SolverOptions()
    preserve_sparsity_mask: bool = False
    interchangeable: Mapping[Operator, Sequence[Interchangeable]] = field(
        default_factory=dict
    )

    @property
    def options(self) -> SolverOptions:
        """
        The options of Algorithm 1.

        :raises TypeError: if the solver is another
        """
        if not isinstance(self.solver, SolverOptions):
            raise TypeError(f"{self.solver} is not Algorithm 1")
        return self.solver

    def prune(self, task: LayerTask) -> PrunedLayer:
        """
        Prune the operators of a layer.

        :param task: the task of the layer
        :return: weights, and what became of the operators and the layer, alike on all
            ranks
        :raises ValueError: if an activation is NaN or infinite
        """
        pruned, results, orders = self._solved(task)
        outcome = None
        if self.trains(task.layer):
            pruned, outcome = reconstruct_on_first_rank(
                pruned, task, self.reconstruction
            )
            trained, errors = _by_name(pruned), outcome.operator_errors
            results = [
                replace(
                    result,
                    reconstructed_error=errors.get(result.name),
                    # in float16 a small weight may be rounded to zero
                    zeros=int((trained[result.name] == 0).sum()),
                )
                for result in results
            ]
        biases: dict[Operator, Tensor] = {}
        for channels, order in orders:
            weights, changed = reordered(channels, order, pruned, biases)
            pruned |= weights
            biases |= changed
        return PrunedLayer(_by_name(pruned), results, outcome, _by_name(biases))

    def _solved(
        self, task: LayerTask
    ) -> tuple[dict[Operator, Tensor], list[OperatorResult], list[Ordered]]:
        """
        Return the new weights, with rows and columns in the order of the model as it
        is, the results of the operators, and the orders that they are to get.
        """
        pruned: dict[Operator, Tensor] = {}
        results: list[OperatorResult] = []
        orders: list[Ordered] = []
        for operator, solved in self._in_turn(task, pruned):
            _warn_of_no_data(operator, solved)
            pruned[operator] = solved.solution.weight
            results.append(self._result(operator, solved))
            task.on_operator(results[-1])
            if solved.orders:
                channels = self.interchangeable[operator]
                orders += zip(channels, solved.orders, strict=True)
        return pruned, results, orders

    def _in_turn(
        self, task: LayerTask, pruned: Mapping[Operator, Tensor]
    ) -> Iterator[tuple[Operator, _Solved]]:
        """
        Yield all operators with their solutions. The caller adds to ``pruned`` between
        the steps.
        """
        for wave, statistics, _ in self.sums(task, task.operators, pruned):
            yield from self._solve(wave, statistics, task.ranks)
        yield from self._uncalled(task, pruned)

    def _uncalled(
        self, task: LayerTask, called: Collection[Operator]
    ) -> Iterator[tuple[Operator, _Solved]]:
        """
        Yield the operators that no token reaches, pruned by magnitude, without those
        whose weight another module reads.
        """
        uncalled = [one for one in task.operators if one not in called]
        by_others = (
            used_without_a_call(uncalled, task.recording.inputs[0]) if uncalled else []
        )
        for operator in uncalled:
            if operator in by_others:
                logger.warning(
                    f"{operator.name} stays dense: its weight is read by another "
                    "module, which does not call it, so that its inputs are not known"
                )
                continue
            weight = project(operator.weight, self._pattern(operator))
            # after the addition no zero is negative
            yield operator, _Solved(PrunedWeight(weight.add(0.0), 0.0, 0.0, 0.0))

    def _pattern(
        self, operator: Operator, orders: Sequence[Tensor] = ()
    ) -> SparsityPattern:
        pattern = self.patterns[operator.name]
        if orders:
            columns = torch.arange(operator.shape[1])
            for channels, order in zip(
                self.interchangeable[operator], orders, strict=True
            ):
                columns = columns[channels.columns_in(order)]
            pattern = Reordered(pattern, columns)
        if not self.preserve_sparsity_mask:
            return pattern
        allowed = operator.weight != 0
        return pattern if bool(allowed.all()) else Within(pattern, allowed)

    def _solve(
        self,
        wave: Sequence[Stage],
        statistics: list[GramStatistics],
        ranks: Ranks,
    ) -> Iterator[tuple[Operator, _Solved]]:
        """
        Yield each operator with its solution. The work is shared out over the ranks.
        The list of statistics is emptied, as nothing else in a layer is as large.
        """
        # Operators of a stage share inverses, so stages are split only if they are few.
        split = len(wave) < ranks.size
        tasks = [
            (operators, sums)
            for stage, sums in zip(wave, statistics, strict=True)
            for operators in (
                [[one] for one in stage.operators] if split else [stage.operators]
            )
        ]
        statistics.clear()
        costs = [sum(math.prod(one.shape) for one in group) for group, _ in tasks]
        owners = shared_out(costs, ranks)
        tokens = {one: sums.tokens for operators, sums in tasks for one in operators}

        def solve_mine() -> dict[str, _Solved]:
            solved = {}
            for owner in owners:
                operators, sums = tasks.pop(0)
                if owner != ranks.rank:
                    continue
                started = time.perf_counter()
                orders = [self._orders(operator, sums) for operator in operators]
                solver = self.solver(sums)
                del sums
                solutions = solver.prune(
                    [operator.weight for operator in operators],
                    [*map(self._pattern, operators, orders)],
                )
                seconds = time.perf_counter() - started
                rows = sum(solution.weight.shape[0] for solution in solutions)
                for operator, solution, own in zip(
                    operators, solutions, orders, strict=True
                ):
                    share = seconds * solution.weight.shape[0] / rows
                    if ranks.size > 1:
                        solution = solution.moved_to("cpu")
                    solved[operator.name] = _Solved(
                        solution, tokens[operator], share, own
                    )
            return solved

        solved = dict(chain(*(part.items() for part in ranks.each(solve_mine))))
        for operator in tokens:
            one = solved[operator.name]
            solution = one.solution.moved_to(operator.weight.device)
            yield operator, replace(one, solution=solution)

    def _orders(self, operator: Operator, statistics: GramStatistics) -> list[Tensor]:
        """
        Return the best orders of the channels that may change places before an
        operator, one for each of its entries in ``interchangeable``.
        """
        pattern = self.patterns[operator.name]
        return [
            best_order(channels, statistics, pattern)
            for channels in self.interchangeable.get(operator, ())
        ]

    def _result(self, operator: Operator, solved: _Solved) -> OperatorResult:
        solution = solved.solution
        best = min(solution.trials, key=lambda trial: trial.error, default=None)
        improved = best is not None and best.error < solution.start_error
        rows, columns = solution.weight.shape
        return OperatorResult(
            name=operator.name,
            shape=(rows, columns),
            pattern=str(self.patterns[operator.name]),
            zeros=int((solution.weight == 0).sum()),
            relative_error=solution.relative_error,
            relative_start_error=solution.relative_start_error,
            penalty=best.penalty if best is not None and improved else 0.0,
            trials=len(solution.trials),
            iterations=sum(trial.iterations for trial in solution.trials),
            tokens=solved.tokens,
            seconds=solved.seconds,
            search=tuple(
                trial.in_units_of(solution.output_norm) for trial in solution.trials
            ),
        )


def _warn_of_no_data(operator: Operator, solved: _Solved) -> None:
    """
    Warn of an operator that no token reaches, or whose inputs or weights are such that
    no error can show.
    """
    solution = solved.solution
    if not solved.tokens:
        logger.warning(
            f"No calibration token reaches {operator.name}: pruned by magnitude"
        )
    elif not solution.output_norm:
        logger.warning(
            f"the output of {operator.name} is zero for all {solved.tokens} tokens: "
            "any weight has error 0, and what is pruned of it rests on no data"
        )
    elif not solution.error and _changed(operator, solution):
        logger.warning(
            f"{operator.name} is pruned without any error for all {solved.tokens} "
            "tokens: they do not excite the inputs whose weights are zero now, "
            "and what other data would need of these is lost"
        )


def _changed(operator: Operator, solution: PrunedWeight) -> bool:
    return not torch.equal(solution.weight, operator.weight.to(solution.weight))


def _by_name(weights: Mapping[Operator, Tensor]) -> dict[str, Tensor]:
    return {operator.name: weight for operator, weight in weights.items()}
