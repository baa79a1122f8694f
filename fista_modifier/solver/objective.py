"""The smooth part of the problem: the output error of one linear operator."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fista_modifier.solver.gram import GramStatistics

__all__ = ["LayerObjective"]


class LayerObjective:
    """
    f(V) = ½‖V X* − W X‖_F² of Eq. (3) in Gram form. With the drift Δ = X* − X,

        V X* − W X = (V − W) X* + W Δ,
        ‖V X* − W X‖_F² = ⟨V − W, (V − W) G + 2 W Δ X*ᵀ⟩ + ⟨W, W Δ Δᵀ⟩,
        ∇f(V) = V G − B,  B = W (G − Δ X*ᵀ).

    Matrix products are float32 and the inner products are summed in float64.

    :param weight: dense weight W, m×n
    :param statistics: Gram matrices of the operator's inputs, each n×n
    """

    def __init__(self, weight: Tensor, statistics: GramStatistics) -> None:
        self.weight = weight.to(statistics.gram.device, torch.float32)
        self.gram = statistics.gram
        self._drift: Tensor | None = None
        self._drift_error = 0.0
        if statistics.drift_cross is not None and statistics.drift_gram is not None:
            self._drift = self.weight @ statistics.drift_cross
            self._drift_error = inner(self.weight, self.weight @ statistics.drift_gram)

    @cached_property
    def target(self) -> Tensor:
        """B = W X X*ᵀ, m×n: the linear term of f"""
        product = self.weight @ self.gram
        return product if self._drift is None else product.sub_(self._drift)

    @cached_property
    def lipschitz(self) -> float:
        """L, an upper estimate of λ_max(G): the step length of FISTA is 1/L"""
        return largest_eigenvalue(self.gram)

    @cached_property
    def output_norm(self) -> float:
        """‖W X‖_F, the size of the dense output: the yardstick of relative errors"""
        squared = inner(self.weight, self.weight @ self.gram) + self._drift_error
        if self._drift is not None:
            squared -= 2 * inner(self.weight, self._drift)
        return max(squared, 0.0) ** 0.5

    def gradient(self, candidate: Tensor) -> Tensor:
        """
        :param candidate: V, m×n
        :return: ∇f(V) = V G − B, m×n
        """
        return torch.addmm(self.target, candidate, self.gram, beta=-1)

    def error(self, candidate: Tensor) -> float:
        """
        :param candidate: V, m×n
        :return: ‖V X* − W X‖_F over all calibration tokens
        """
        difference = candidate - self.weight
        product = difference @ self.gram
        if self._drift is not None:
            product.add_(self._drift, alpha=2)
        return max(inner(difference, product) + self._drift_error, 0.0) ** 0.5


def inner(a: Tensor, b: Tensor) -> float:
    """⟨A, B⟩, summed in float64"""
    return float((a * b).sum(dtype=torch.float64))


def largest_eigenvalue(gram: Tensor, iterations: int = 50) -> float:
    """
    λ_max of a positive semidefinite matrix by power iteration. The residual ‖Gv − θv‖
    bounds the distance from the Rayleigh quotient θ to an eigenvalue; adding it makes
    the estimate err to the safe side (a step of 1/L must not be too long).

    :param gram: G, n×n
    :return: θ + ‖Gv − θv‖; 0 for G = 0
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(gram.shape[0], generator=generator).to(gram)
    for _ in range(iterations):
        vector = gram @ (vector / vector.norm().clamp_min(1e-30))
    vector = vector / vector.norm().clamp_min(1e-30)
    product = gram @ vector
    rayleigh = vector @ product
    return float(rayleigh + (product - rayleigh * vector).norm())
