"""The search for λ (section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fista_modifier.solver.objective import LayerObjective

__all__ = ["LambdaBisection", "lambda_unit"]


def lambda_unit(objective: LayerObjective) -> float:
    """
    Return the unit of λ in recipes: mean|W_ij| · mean(G_jj). The paper's λ₀ = 1e-5 and
    M = 1e6 have no units, and the λ that gives a certain sparsity grows with the number
    of tokens, the scale of the activations and that of the weights. In this unit it
    depends on none of them: for uncorrelated features of equal power, λ = 1 sets the
    weights of up to average magnitude to zero.

    :param objective: the operator's f
    :return: mean|W_ij| · mean(G_jj), in the units of ∇f
    """
    weights = objective.weight.abs().mean(dtype=torch.float64)
    return float(weights * objective.quadratic.diagonal.mean(dtype=torch.float64))


@dataclass
class LambdaBisection:
    """
    The bisection of the interval [λ₀, M]. It starts at the lower end. Useful values of
    λ differ by powers of ten, so the midpoint is geometric. The paper halves [0, M]
    arithmetically: λ = 1e-5 would be followed by M/2, M/4 and M/8, and at each of these
    everything is zero.

    :param low: λ₀ > 0, below or at the λ sought
    :param high: M, at or above the λ sought
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        self.value = self.low

    def update(self, *, increase: bool) -> None:
        """
        Halve the interval (on the scale of log λ).

        :param increase: whether λ must grow, because the solution is not sparse enough
            (Theorem 1), or because rounding caused more than the share ξ of its error
            (Algorithm 1)
        """
        if increase:
            self.low = self.value
        else:
            self.high = self.value
        self.value = (self.low * self.high) ** 0.5
