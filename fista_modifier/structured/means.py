"""First moments of the consumers' inputs, for what a bias can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fista_modifier.solver.drift import OutputDrift
from fista_modifier.solver.gram import GramStatistics

__all__ = ["FeatureMeans"]

ROUNDING = 1e-5
"""
The share of a feature's power up to which its variance counts as zero. The sums are
float32, so a smaller variance may be rounding.
"""


@dataclass(frozen=True)
class FeatureMeans:
    """
    Means over the tokens of :class:`~fista_modifier.solver.gram.GramStatistics`. They
    come from the same pass: X* is summed over the tokens together with G, and so are
    the outputs' drifts W X* − W X. (For inputs' drifts Δ, this sum is W times theirs.)
    Both sums are divided by the number of tokens.

    With a bias c, the best one for a weight V is c = W μ − V μ*, where μ and μ* are the
    means of X and X*. What then remains of the error is the error for centred data:
    G − t μ* μ*ᵀ in place of G, and likewise for the drift. So a bias is never searched
    for.

    :param means: μ*, the mean of X*, float32 N
    :param tokens: t, the number of tokens
    :param drift: the mean of W X* − W X, float32 m; None where X* = X
    """

    means: Tensor
    tokens: int
    drift: Tensor | None = None

    @classmethod
    def of(cls, statistics: GramStatistics, weight: Tensor) -> FeatureMeans:
        """
        Return the means over the tokens of statistics.

        :param statistics: statistics of one token or more
        :param weight: W, m×N of any floating dtype
        :return: the means
        """
        assert statistics.total is not None, "there are tokens"
        tokens = statistics.tokens
        drift = None
        if statistics.drift_total is not None:
            assert statistics.drift is not None, "of which this is the total"
            mean = (statistics.drift_total / tokens).float()
            dense = weight.to(mean.device, torch.float32)
            drift = statistics.drift.in_outputs(mean, dense)
        return cls((statistics.total / tokens).float(), tokens, drift)

    def best_bias(self, weight: Tensor, candidate: Tensor) -> Tensor:
        """
        Return the change of the bias with the least error for a weight.

        :param weight: W, float32 m×N
        :param candidate: V, float32 m×N
        :return: c = W μ − V μ*, m, the least squares intercept of V
        """
        bias = (weight - candidate) @ self.means.to(weight.device)
        return bias if self.drift is None else bias - self.drift.to(weight.device)

    def variances(self, statistics: GramStatistics) -> Tensor:
        """
        Return the variance of each feature of X*, times the number of tokens.

        :param statistics: statistics of the same tokens
        :return: t times the variances, N, where G is; exactly 0 where a feature is
            constant but for rounding
        """
        powers = statistics.gram.diagonal()
        centred = powers - self.tokens * self.means.to(powers.device).square()
        return torch.where(centred > ROUNDING * powers, centred, 0)

    def centred(self, weight: Tensor, statistics: GramStatistics) -> GramStatistics:
        """
        Return the statistics of the tokens less their means, for W alone. The
        difference of two large sums is float32, so a variance has an error of about
        1e-7 of the power.

        :param weight: W, float32 m×N
        :param statistics: statistics of the same tokens
        :return: the centred statistics
        """
        means = self.means.to(statistics.gram.device)
        gram = torch.addr(statistics.gram, means, means, alpha=-self.tokens)
        variances = self.variances(statistics)
        varies = (variances > 0).to(gram.dtype)
        gram.mul_(varies).mul_(varies[:, None]).diagonal().copy_(variances)
        return GramStatistics(
            gram,
            self._centred_drift(weight, statistics),
            statistics.tokens,
            device=statistics.device,
        )

    def _centred_drift(
        self, weight: Tensor, statistics: GramStatistics
    ) -> OutputDrift | None:
        if statistics.drift is None or self.drift is None:
            return None
        cross, power = statistics.drift.of(weight)
        drift = self.drift.to(cross.device)
        means = self.means.to(cross.device)
        power -= self.tokens * float(drift.double().square().sum())
        return OutputDrift(
            torch.addr(cross, drift, means, alpha=-self.tokens),
            torch.tensor(max(power, 0.0), dtype=torch.float64, device=cross.device),
        )
