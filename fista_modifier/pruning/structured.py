"""Channels leave a decoder layer: selector, restorer, reconstruction, and the cut."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fista_modifier.calibration.channels import leaving, without_channels
from fista_modifier.models.operators import Operator
from fista_modifier.pruning.channels import ChannelPlan, GroupPlan
from fista_modifier.pruning.corrected import CorrectedProcedure
from fista_modifier.pruning.procedures import LayerTask, PrunedLayer
from fista_modifier.pruning.reconstruction import reconstructed
from fista_modifier.pruning.results import OperatorResult
from fista_modifier.solver import GramStatistics
from fista_modifier.structured import (
    ChannelProblem,
    FASPScore,
    FeatureMeans,
    KeptWeights,
    LeastSquares,
    Magnitude,
    PrunedChannels,
    Restorer,
    Selector,
    prune_channels,
)
from fista_modifier.structured.patterns import Smaller

__all__ = ["StructuredProcedure"]


@dataclass
class _Chosen:
    """
    :param plan: of a group
    :param pruned: its channels that stay, and the consumer's weight on them
    :param start_error: relative, without restoration
    :param tokens: that reach the consumer
    :param seconds: wall time
    """

    plan: GroupPlan
    pruned: PrunedChannels
    start_error: float
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StructuredProcedure(CorrectedProcedure):
    """
    Choose the channels of each group in the order in which their consumers run, give
    the consumers weights that make up for those that leave, train what is left, and cut
    rows and columns out. Until the cut, the consumers' columns of a channel that leaves
    are zero. The layer then computes the same as after the cut.

    :param plan: groups of each layer, and how many channels stay
    :param selector: chooses the channels
    :param restorer: finds the consumers' weights on them
    """

    plan: ChannelPlan = field(default_factory=ChannelPlan)
    selector: Selector = FASPScore()
    restorer: Restorer = LeastSquares()

    def prune(self, task: LayerTask) -> PrunedLayer:
        """
        :param task: a layer
        :return: smaller weights, alike on all ranks
        :raises ValueError: if an activation is NaN or infinite
        """
        weights: dict[Operator, Tensor] = {}
        biases: dict[Operator, Tensor] = {}
        chosen = self._chosen(task, weights, biases)
        for one in chosen:
            for operator, rows in leaving(one.plan.group.producers, one.pruned.kept):
                weight = weights.get(operator, operator.weight).clone()
                weight[rows] = 0
                weights[operator] = weight
        outcome = None
        errors: dict[str, float] = {}
        if self.trains(task.layer):
            everything = {one: weights.get(one, one.weight) for one in task.operators}
            weights, outcome = reconstructed(
                everything, task, self.reconstruction, biases
            )
            errors = outcome.operator_errors
        for one in chosen:
            smaller, shorter = without_channels(
                one.plan.group, one.pruned.kept, weights, biases
            )
            weights |= smaller
            biases |= shorter
        results = []
        for one in chosen:
            result = _result(one, weights[one.plan.consumer.operator])
            results.append(replace(result, reconstructed_error=errors.get(result.name)))
            task.on_operator(results[-1])
        return PrunedLayer(
            {operator.name: weight for operator, weight in weights.items()},
            results,
            outcome,
            {operator.name: bias for operator, bias in biases.items()},
        )

    def _chosen(
        self,
        task: LayerTask,
        weights: dict[Operator, Tensor],
        biases: dict[Operator, Tensor],
    ) -> list[_Chosen]:
        """The choice for each group. Adds the consumers' weights, of the old shapes."""
        plans = {
            one.consumer.operator: one for one in self.plan.groups[task.layer.name]
        }
        chosen = []

        def add(operator: Operator, statistics: GramStatistics) -> None:
            started = time.perf_counter()
            problem = _problem(plans[operator], statistics)
            selector = self.selector if statistics.tokens else Magnitude()
            restorer = self.restorer if statistics.tokens else KeptWeights()
            pruned = prune_channels(problem, selector, restorer)
            kept = KeptWeights()(problem, pruned.kept).weight
            start = problem.error(problem.widened(kept, pruned.kept))
            weights[operator] = problem.widened(pruned.weight, pruned.kept).to(
                operator.weight
            )
            if pruned.bias is not None:
                own = operator.module.bias.data
                biases[operator] = (own + pruned.bias.to(own.device)).to(own)
            chosen.append(
                _Chosen(
                    plans[operator],
                    pruned,
                    start / pruned.output_norm if pruned.output_norm else 0.0,
                    statistics.tokens,
                    time.perf_counter() - started,
                )
            )

        for wave, statistics in self.sums(task, list(plans), weights, biases):
            for stage in wave:
                sums = statistics.pop(0)
                for operator in stage.operators:
                    add(operator, sums)
        for operator in plans:  # an expert that no token reaches
            if operator not in weights:
                add(operator, GramStatistics.empty(operator.weight.shape[1]))
        return chosen


def _problem(plan: GroupPlan, statistics: GramStatistics) -> ChannelProblem:
    operator, columns = plan.consumer
    has_bias = operator.module.bias is not None and statistics.tokens > 0
    return ChannelProblem(
        operator.weight,
        statistics,
        columns,
        plan.keep,
        _means(operator, statistics) if statistics.tokens else None,
        has_bias,
        _norms(plan),
    )


def _means(operator: Operator, statistics: GramStatistics) -> FeatureMeans:
    assert statistics.total is not None  # there are tokens
    tokens = statistics.tokens
    drift = None
    if statistics.drift_total is not None:
        assert statistics.drift is not None  # of which this is the total
        mean = (statistics.drift_total / tokens).float()
        weight = operator.weight.to(mean.device, torch.float32)
        drift = statistics.drift.in_outputs(mean, weight)
    return FeatureMeans((statistics.total / tokens).float(), tokens, drift)


def _norms(plan: GroupPlan) -> Tensor:
    """The norm of all producers' rows of each channel"""
    squares = [
        one.weight.float().square().sum(1)[indices.to(one.weight.device)].sum(1)
        for one, indices in plan.group.producers
    ]
    return (
        torch.stack([square.to(squares[0].device) for square in squares]).sum(0).sqrt()
    )


def _result(chosen: _Chosen, weight: Tensor) -> OperatorResult:
    operator, indices = chosen.plan.consumer
    rows, columns = weight.shape
    return OperatorResult(
        name=operator.name,
        shape=(rows, columns),
        pattern=str(Smaller(columns, indices.numel(), "columns")),
        zeros=int((weight == 0).sum()),
        relative_error=chosen.pruned.relative_error,
        relative_start_error=chosen.start_error,
        penalty=0.0,
        trials=0,
        iterations=0,
        tokens=chosen.tokens,
        seconds=chosen.seconds,
    )
