"""
The procedure that removes channels: selector, restorer, reconstruction, and the cut.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch
from loguru import logger
from torch import Tensor

from fista_modifier.calibration.recording import Recorded
from fista_modifier.calibration.replays import Replays
from fista_modifier.calibration.sums import empty_statistics
from fista_modifier.channels.cuts import leaving, without_channels
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.operators import Operator
from fista_modifier.pruning.alternating import Alternated, alternated
from fista_modifier.pruning.channels import ChannelPlan, GroupPlan
from fista_modifier.pruning.corrected import CorrectedProcedure
from fista_modifier.pruning.procedures import LayerTask, PrunedLayer
from fista_modifier.pruning.reconstruction import reconstruct_on_first_rank
from fista_modifier.pruning.results import OperatorResult
from fista_modifier.solver import GramStatistics
from fista_modifier.structured import (
    Alternation,
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
from fista_modifier.structured.patterns import Smaller, ZeroColumns

__all__ = ["StructuredProcedure"]


@dataclass(frozen=True)
class _Chosen:
    """
    The channels of one group that were chosen to stay, and the consumer's weight on
    them.

    :param plan: the plan of the group
    :param pruned: the channels that stay, and the consumer's weight on them
    :param start_error: relative error without restoration
    :param tokens: number of tokens that reach the consumer
    :param seconds: wall time
    :param producer: what alternation found for the linear producer; None if that is as
        it was
    """

    plan: GroupPlan
    pruned: PrunedChannels
    start_error: float
    tokens: int
    seconds: float
    producer: Alternated | None = None

    def weights(self, problem: ChannelProblem) -> dict[Operator, Tensor]:
        """
        Return the new weights in their old shapes, with zeros for channels that leave.

        :param problem: the problem that the channels are chosen for
        :return: the weights of the consumer and of a changed producer
        """
        consumer = self.plan.consumer.operator
        wide = problem.widened(self.pruned.weight, self.pruned.kept)
        changed = {consumer: wide.to(consumer.weight)}
        if self.producer is not None:
            changed[self.producer.producer] = self.producer.weight
        return changed

    @property
    def biases(self) -> dict[Operator, Tensor]:
        """The new biases."""
        changed = {}
        if self.pruned.bias is not None:
            consumer = self.plan.consumer.operator
            own = consumer.module.bias.data
            changed[consumer] = (own + self.pruned.bias.to(own.device)).to(own)
        if self.producer is not None and self.producer.bias is not None:
            changed[self.producer.producer] = self.producer.bias
        return changed


@dataclass(frozen=True, kw_only=True)
class StructuredProcedure(CorrectedProcedure):
    """
    The procedure that removes channels. It chooses the channels of each group in the
    order in which their consumers run, gives the consumers weights that make up for
    those that leave, trains what is left, and cuts rows and columns out. Until the cut,
    the consumers' columns of a channel that leaves are zero. The layer then computes
    the same as after the cut. Dimensions of values are not cut: their rows, columns and
    biases stay, as zeros.

    :param plan: groups of each layer, and how many channels stay
    :param selector: chooses the channels
    :param restorer: finds the consumers' weights on them
    :param alternation: then alternates over the weights of the consumer and of the
        producer in which its input is linear, where there is one; None to do without
    """

    plan: ChannelPlan = field(default_factory=ChannelPlan)
    selector: Selector = FASPScore()
    restorer: Restorer = LeastSquares()
    alternation: Alternation | None = None

    @property
    def sums_in_pass(self) -> bool:
        """
        True unless layers depend on those before them: nothing is changed in a layer
        before its only consumer.
        """
        return not self.chains_layers

    def recorded(self, layer: DecoderLayer) -> Recorded:
        """
        Return what has to be recorded of a layer for its task.

        :param layer: a layer with operators that are to be pruned
        :return: what is recorded beside what the layer is called with
        """
        groups = self.plan.groups.get(layer.name, ())
        sums = [one.consumer.operator for one in groups]
        alone = len(sums) == 1 and self.sums_in_pass
        return replace(super().recorded(layer), sums=sums if alone else ())

    def prune(self, task: LayerTask) -> PrunedLayer:
        """
        Remove channels of a layer.

        :param task: the task of the layer
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
            weights, outcome = reconstruct_on_first_rank(
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
        """
        Return the choice for each group. The consumers' weights, in their old shapes,
        are added to ``weights``, and changed biases to ``biases``; with alternation, so
        are those of the linear producers.
        """
        plans = {
            one.consumer.operator: one for one in self.plan.groups[task.layer.name]
        }
        chosen: list[_Chosen] = []

        def add(one: _Chosen, problem: ChannelProblem) -> None:
            weights.update(one.weights(problem))
            biases.update(one.biases)
            chosen.append(one)

        for wave, statistics, replays in self.sums(task, list(plans), weights, biases):
            for stage in wave:
                sums = statistics.pop(0)
                for operator in stage.operators:
                    problem = _problem(plans[operator], sums)
                    one = self._choice(plans[operator], problem)
                    add(self._alternated(one, task, replays, stage.calls), problem)
        for operator, plan in plans.items():
            # No token reaches the operator, as it is an expert.
            if operator not in weights:
                empty = empty_statistics([operator], task.offload, drifts=False)
                problem = _problem(plan, empty)
                add(self._choice(plan, problem), problem)
        return chosen

    def _choice(self, plan: GroupPlan, problem: ChannelProblem) -> _Chosen:
        """Choose the channels of a group; by magnitude if the sums are of no token."""
        started = time.perf_counter()
        tokens = problem.statistics.tokens
        selector = self.selector if tokens else Magnitude()
        restorer = self.restorer if tokens else KeptWeights()
        if not tokens:
            logger.warning(
                f"No calibration token reaches {plan.consumer.operator.name}: its "
                "channels are chosen by magnitude"
            )
        own_bias = plan.consumer.operator.module.bias
        pruned = prune_channels(problem, selector, restorer, own_bias)
        kept = KeptWeights()(problem, pruned.kept).weight
        start = problem.error(problem.widened(kept, pruned.kept))
        return _Chosen(
            plan,
            pruned,
            start / pruned.output_norm if pruned.output_norm else 0.0,
            tokens,
            time.perf_counter() - started,
        )

    def _alternated(
        self, chosen: _Chosen, task: LayerTask, replays: Replays, calls: int
    ) -> _Chosen:
        """Train the weights of a group in turn, where the procedure and it allow it."""
        plan = chosen.plan
        if not (self.alternation and plan.group.linear and chosen.tokens):
            return chosen
        started = time.perf_counter()
        better = alternated(task, plan, chosen.pruned, replays, calls, self.alternation)
        if better is None:
            return chosen
        seconds = chosen.seconds + time.perf_counter() - started
        return replace(chosen, pruned=better.pruned, seconds=seconds, producer=better)


def _problem(plan: GroupPlan, statistics: GramStatistics) -> ChannelProblem:
    operator, columns = plan.consumer
    has_bias = operator.module.bias is not None and statistics.tokens > 0
    return ChannelProblem(
        operator.weight,
        statistics,
        columns,
        plan.keep,
        FeatureMeans.of(statistics, operator.weight) if statistics.tokens else None,
        has_bias,
        _norms(plan),
    )


def _norms(plan: GroupPlan) -> Tensor:
    """Return the norm of the rows of each channel, over all producers."""
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
    pattern: Smaller | ZeroColumns = Smaller(columns, indices.numel(), "columns")
    if chosen.plan.zeroes:
        pattern = ZeroColumns(chosen.plan.keep * indices.shape[1], columns)
    return OperatorResult(
        name=operator.name,
        shape=(rows, columns),
        pattern=str(pattern),
        zeros=int((weight == 0).sum()),
        relative_error=chosen.pruned.relative_error,
        relative_start_error=chosen.start_error,
        penalty=0.0,
        trials=0,
        iterations=0,
        tokens=chosen.tokens,
        seconds=chosen.seconds,
    )
