"""The problem: which channels of a group stay, and the consumers' outputs then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fista_modifier.solver.gram import GramStatistics
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.quadratic import Quadratic
from fista_modifier.structured.means import FeatureMeans

__all__ = ["ChannelProblem", "damped_quadratic"]


@dataclass(frozen=True, eq=False)
class ChannelProblem:
    """
    The problem to find ``keep`` of n channels, and weights V of the consumers on them,
    so that

        ‖V X* + c 1ᵀ − W X‖_F

    is small. V is zero in the columns of the channels that leave, and the bias change c
    is zero unless the consumers have a bias. A channel owns r columns of W, which leave
    together with the rows of the producers that make their inputs.

    :param weight: W, m×N of any floating dtype, all consumers stacked by rows
    :param statistics: sums over the consumers' input X* and its drift
    :param columns: long n×r, the columns that each channel owns. Each column of W
        belongs to one channel. r is 1 in an MLP, the number of query heads that share a
        value head for its dimensions, and more for whole heads
    :param keep: k, how many channels stay
    :param means: first moments of the same tokens; FLAP's method and a bias need them
    :param intercept: whether the consumers have a bias, into which constants may go
    :param producer_norms: the norm of the producers' rows of each channel, n; magnitude
        pruning counts them if they are given
    :raises ValueError: if the statistics do not have the width of W, if the channels do
        not divide the columns, if ``keep`` is not between 1 and n, or if means are
        missing or of other tokens
    """

    weight: Tensor
    statistics: GramStatistics
    columns: Tensor
    keep: int
    means: FeatureMeans | None = None
    intercept: bool = False
    producer_norms: Tensor | None = None

    def __post_init__(self) -> None:
        width = self.weight.shape[1]
        if self.statistics.features != width:
            raise ValueError(
                f"statistics of {self.statistics.features} features do not fit a "
                f"weight of {width} columns"
            )
        owned = self.columns.flatten().cpu().sort().values
        if not torch.equal(owned, torch.arange(width)):
            raise ValueError(
                f"each of {width} columns must belong to exactly one channel"
            )
        if not 1 <= self.keep <= self.channels:
            raise ValueError(
                f"{self.keep} channels cannot be kept out of {self.channels}"
            )
        if self.intercept and self.means is None:
            raise ValueError("a bias needs the means of the features")
        if self.means and self.means.tokens != self.statistics.tokens:
            raise ValueError(
                f"means of {self.means.tokens} tokens do not belong to statistics of "
                f"{self.statistics.tokens}"
            )
        if self.means and (self.means.drift is None) != (self.statistics.drift is None):
            raise ValueError("means and statistics must both have a drift, or neither")

    @property
    def channels(self) -> int:
        """n, the number of channels."""
        return self.columns.shape[0]

    @property
    def device(self) -> torch.device:
        """The device that executes the operators, and on which all here is computed."""
        return self.statistics.execution_device

    @cached_property
    def objective(self) -> LayerObjective:
        """½‖V X* − W X‖_F², without damping or bias."""
        return LayerObjective(self.weight, Quadratic(self.statistics))

    @cached_property
    def fitted(self) -> GramStatistics:
        """The statistics to fit weights to: centred if there is a bias."""
        if self.means is None or not self.intercept:
            return self.statistics
        return self.means.centred(self.objective.weight, self.statistics)

    def damped(self, dampening_frac: float) -> LayerObjective:
        """
        Return the objective for the best bias, with damping, which draws V to W.

        :param dampening_frac: damping, as a fraction of
            :attr:`~fista_modifier.solver.gram.GramStatistics.typical_power`
        :return: the damped objective
        """
        quadratic = damped_quadratic(self.fitted, dampening_frac, self.statistics)
        return LayerObjective(self.weight, quadratic)

    def per_channel(self, values: Tensor) -> Tensor:
        """
        Sum values of columns over the columns of each channel.

        :param values: a value for each column, N
        :return: the sums, n
        """
        return values[self.columns.to(values.device)].sum(1)

    def kept_columns(self, kept: Tensor) -> Tensor:
        """
        Return the columns of the channels that stay, which are those of the smaller
        weight.

        :param kept: channels that stay, long k
        :return: the columns in ascending order, long k·r
        """
        columns: Tensor = self.columns[kept.to(self.columns.device)].flatten().sort()[0]
        return columns.to(self.device)

    def widened(self, weight: Tensor, kept: Tensor) -> Tensor:
        """
        Give a smaller weight its old shape.

        :param weight: weight of the kept columns in ascending order, m×k·r
        :param kept: channels that stay, long k
        :return: V, float32 m×N, with zeros for the channels that left
        """
        wide = torch.zeros_like(self.objective.weight)
        wide[:, self.kept_columns(kept)] = weight.to(wide)
        return wide

    def best_bias(self, candidate: Tensor) -> Tensor:
        """
        Return the change of the bias with the least error for a weight.

        :param candidate: V, float32 m×N
        :return: the bias change c, m
        :raises ValueError: if the consumers have no bias
        """
        if self.means is None or not self.intercept:
            raise ValueError("the consumers have no bias to put a constant in")
        return self.means.best_bias(self.objective.weight, candidate)

    def error(self, candidate: Tensor, bias: Tensor | None = None) -> float:
        """
        Return the output error of a weight and a change of the bias.

        :param candidate: V, float32 m×N
        :param bias: c, m; None is zero
        :return: ‖V X* + c 1ᵀ − W X‖_F over all calibration tokens
        :raises ValueError: if there is a bias change and no bias
        """
        if bias is None:
            return self.objective.error(candidate)
        constant = (bias - self.best_bias(candidate)).double().norm()
        centred = LayerObjective(self.weight, Quadratic(self.fitted)).error(candidate)
        return math.hypot(centred, math.sqrt(self.statistics.tokens) * float(constant))


def damped_quadratic(
    statistics: GramStatistics,
    dampening_frac: float,
    summed: GramStatistics | None = None,
) -> Quadratic:
    """
    Add damping to statistics. The damping has a floor, the rounding of G, so that G + δ
    I has an inverse whatever the data: without data the solution is W itself.

    :param statistics: statistics of N features
    :param dampening_frac: δ as a fraction of the features' typical power
    :param summed: the statistics as they were summed, with the rounding of these sums,
        if the others are centred
    :return: G + δ I
    """
    trace = float((summed or statistics).gram.trace())
    rounding = torch.finfo(torch.float32).eps * trace
    ridge = max(dampening_frac * statistics.typical_power, rounding) or 1.0
    return Quadratic(statistics, torch.full_like(statistics.gram[0], ridge))
