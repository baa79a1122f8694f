"""
SPAP's penalty method (Hu & Yuan 2025), as far as its abstract tells, and what is ours.

The abstract has a mixed-integer model of which channels stay, a penalty method that
makes the choice, and alternating minimisation over the weights. It gives no formulas.

The model is ours: z ∈ {0,1}ⁿ with Σ z = k says which channels stay, and D_z is the
diagonal matrix with z_i at the r columns of channel i. The integers are relaxed, and a
penalty takes their place:

    min over z and V   ‖V D_z X* − W X‖² + δ Σ_i z_i ‖V_i − W_i‖²
                       + ρ Σ_i z_i (1 − z_i) ‖V_i X*_i‖²
    subject to         0 ≤ z_i ≤ 1,  Σ_i z_i = k,

where V_i and X*_i are the columns and rows of channel i. At a binary z this is the
damped error of :class:`~fista_modifier.structured.restoration.LeastSquares`. The
penalty z (1 − z) is weighed by the power of a channel's output, for this reason: if
each channel stays with probability z_i, independently of the others, the sum at ρ = 1
is the expected damped error of one V for all choices. So V has to be good without a
channel even before that channel leaves. If the penalty did not depend on V, V could
undo any z > 0, and z would mean nothing.

The steps are ours, too: ρ grows by a constant factor from round to round. A round first
solves for V given z, which is least squares. With bd(G) the r×r diagonal blocks of G,

    V D_z^½ = (B + δ W) D_z^½ (D_z^½ G D_z^½ + ρ (I − D_z) bd(G) + δ I)⁻¹.

Given V, the sum is zᵀ Q z + ρ Σ z_i (1 − z_i) Q_ii − 2 cᵀ z and a constant. Q sums
VᵀV ∘ G over the columns of the channels. A step of projected gradient follows, in the
metric diag(Q). In this metric, channels of little power take steps as long as others,
and the projection onto the capped simplex is exact. The step is judged with V refitted:
if the sum has not risen, the step counts and the next one is twice as long. Otherwise
the next one is half as long. A bound from Q alone would allow only far shorter steps,
since V makes up for most of what a step does. Once ρ is above
λ_max(diag(Q)^-½ Q diag(Q)^-½), the sum is concave in z, and its minima are vertices:
binary choices of k channels. Channels that are exactly alike may be left with equal z.
The first of them then stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fista_modifier.solver.factorisation import cholesky
from fista_modifier.solver.quadratic import unit_of
from fista_modifier.structured.problem import ChannelProblem
from fista_modifier.structured.restoration import DAMPENING
from fista_modifier.structured.selection import highest
from fista_modifier.structured.simplex import project_to_capped_simplex

__all__ = ["PenaltyMethod", "Relaxation"]

BINARY = 1e-4
"""The greatest z (1 − z) of a channel at which z counts as binary."""

TINY = 1e-6
"""
The least z by whose root V is divided, and the least power of a channel as a share of
the mean power. They take the place of zeros.
"""

FIRST_STEP = 0.1
"""
The length of the first step. It has no unit, because the powers of the channels are the
metric.
"""


@dataclass(frozen=True)
class PenaltyMethod:
    """
    The penalty method that this module describes.

    :param dampening_frac: δ, as a fraction of the features' typical power
    :param rho: ρ of the first round; without a unit
    :param growth: factor between the ρ of two rounds
    :param max_rounds: rounds at most, should z not become binary
    """

    dampening_frac: float = DAMPENING
    rho: float = 1e-3
    growth: float = 1.3
    max_rounds: int = 60

    def __call__(self, problem: ChannelProblem) -> Tensor:
        return highest(self.relaxed(problem), problem.keep)

    def relaxed(self, problem: ChannelProblem) -> Tensor:
        """
        Solve the relaxed problem.

        :param problem: W and the sums over its inputs
        :return: z of the last round, float32 n; binary unless ``max_rounds`` ended it
        """
        relaxation = Relaxation(problem, self.dampening_frac)
        shares, rho, length = relaxation.start(), self.rho, FIRST_STEP
        for _ in range(self.max_rounds):
            relaxation.refit(shares, rho)
            moved = relaxation.step(shares, rho, length)
            length *= 0.5 if moved is shares else 2.0
            shares = moved
            if float((shares * (1 - shares)).amax()) <= BINARY:
                break
            rho *= self.growth
        return shares


class Relaxation:
    """
    The relaxed problem, and the weights V of the last refit.

    Columns are in the order of the channels here, and squared errors in units of a
    power of four.

    :param problem: W and the sums over its inputs
    :param dampening_frac: δ, as a fraction of the features' typical power
    """

    def __init__(self, problem: ChannelProblem, dampening_frac: float) -> None:
        objective = problem.damped(dampening_frac)
        quadratic = objective.quadratic
        unit = unit_of(quadratic.diagonal)
        order = problem.columns.flatten()
        place = order.to(quadratic.statistics.gram.device)
        gram = quadratic.statistics.gram[place[:, None], place]
        order = order.to(quadratic.device)
        self.keep, self.shape = problem.keep, problem.columns.shape
        self.gram = gram.to(quadratic.device) / unit
        self.ridge = quadratic.damping[order] / unit
        self.dense = objective.weight[:, order]
        self.target = objective.target[:, order] / unit
        self.hold(self.dense)

    def start(self) -> Tensor:
        """
        Return the first z.

        :return: k/n for all channels
        """
        channels = self.shape[0]
        return self.gram.new_full((channels,), self.keep / channels)

    def refit(self, shares: Tensor, rho: float) -> None:
        """
        Give V its least squares values.

        :param shares: z, n
        :param rho: ρ
        """
        shares = shares.clamp_min(TINY)
        roots = shares.sqrt().repeat_interleave(self.shape[1])
        gram = self.gram * roots * roots[:, None]
        self._blocks(gram).add_(self._blocks(self.gram) * (rho * (1 - shares)))
        gram.diagonal().add_(self.ridge)
        factor = cholesky(gram)
        self.hold(torch.cholesky_solve((self.target * roots).T, factor).T / roots)

    def hold(self, weight: Tensor) -> None:
        """
        Take a weight as V, and find Q, n×n, and c, n, for it. What damping adds is
        linear in z.

        :param weight: m×N
        """
        channels, size = self.shape
        products = (weight.T @ weight).mul_(self.gram)
        damping = (weight.square() + self.dense.square()).sum(0) * self.ridge
        linear = (weight * self.target).sum(0) - damping / 2
        self.weight = weight
        self.curvature = products.view(channels, size, channels, size).sum((1, 3))
        self.linear = linear.view(channels, size).sum(1)

    def step(self, shares: Tensor, rho: float, length: float) -> Tensor:
        """
        Take one step of projected gradient.

        :param shares: z, n
        :param rho: ρ
        :param length: length of the step, without a unit
        :return: another z, for which :meth:`value` is not higher after the refit that
            comes with it; or ``shares`` itself, and V stays
        """
        power = self.curvature.diagonal()
        metric = power.clamp_min(TINY * float(power.mean()) or 1.0) / length
        gradient = self.curvature @ shares - self.linear + rho * power * (0.5 - shares)
        moved = project_to_capped_simplex(shares - gradient / metric, self.keep, metric)
        before, weight = self.value(shares, rho), self.weight
        self.refit(moved, rho)
        if self.value(moved, rho) <= before:
            return moved
        self.hold(weight)
        return shares

    def value(self, shares: Tensor, rho: float) -> float:
        """
        Return what is minimised.

        :param shares: z, n
        :param rho: ρ
        :return: the sum, less the constant ‖W X‖², in this object's unit
        """
        penalty = rho * self.curvature.diagonal() @ (shares * (1 - shares))
        error = shares @ (self.curvature @ shares) - 2 * self.linear @ shares
        return float(error + penalty)

    def _blocks(self, matrix: Tensor) -> Tensor:
        """Return a view of the diagonal blocks of the channels, r×r×n."""
        channels, size = self.shape
        square = matrix.view(channels, size, channels, size)
        return square.diagonal(dim1=0, dim2=2)
