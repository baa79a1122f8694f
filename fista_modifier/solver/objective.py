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

    With damping δ the gradient is that of f(V) + ½ Σ_j δ_j ‖V_j − W_j‖², j running over
    the columns: δ is added to the diagonal of G and W diag(δ) to B, which holds back
    directions that the data hardly determine. Errors are always those of f itself.

    :param weight: dense weight W, m×n
    :param statistics: Gram matrices of the operator's inputs, each n×n
    :param damping: δ ≥ 0 of each column, n, in the units of G; None is zero
    """

    def __init__(
        self,
        weight: Tensor,
        statistics: GramStatistics,
        damping: Tensor | None = None,
    ) -> None:
        self.weight = weight.to(statistics.gram.device, torch.float32)
        self.gram = statistics.gram
        self.damping = damping
        if damping is not None:
            self.gram = self.gram + damping.diag()
        self._statistics = statistics

    @cached_property
    def _drift(self) -> Tensor | None:
        """W Δ X*ᵀ, m×n, or None where X* = X"""
        cross = self._statistics.drift_cross
        return None if cross is None else self.weight @ cross

    @cached_property
    def _drift_error(self) -> float:
        """‖W Δ‖_F², the error of W itself"""
        gram = self._statistics.drift_gram
        return 0.0 if gram is None else inner(self.weight, self.weight @ gram)

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
        squared = self._form(self.weight) + self._drift_error
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
        squared = self._form(difference) + self._drift_error
        if self._drift is not None:
            squared += 2 * inner(difference, self._drift)
        return max(squared, 0.0) ** 0.5

    def _form(self, weight: Tensor) -> float:
        """⟨V, V G⟩ with the undamped G"""
        squared = inner(weight, weight @ self.gram)
        if self.damping is not None:
            squared -= inner(weight, weight * self.damping)
        return squared


def inner(a: Tensor, b: Tensor) -> float:
    """⟨A, B⟩, summed in float64"""
    return float((a * b).sum(dtype=torch.float64))


def largest_eigenvalue(gram: Tensor, iterations: int = 50) -> float:
    """
    λ_max of a positive semidefinite matrix by Lanczos' iteration: the largest Ritz
    value θ of the Krylov space of a random vector. (Power iteration with as many
    products is several per cent too low where the largest eigenvalues lie close
    together.) The residual ‖Gv − θv‖ bounds the distance from θ to an eigenvalue;
    adding it makes the estimate err to the safe side (a step of 1/L must not be too
    long).

    :param gram: G, n×n
    :return: θ + ‖Gv − θv‖; 0 for G = 0
    """
    features = gram.shape[0]
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(features, generator=generator).to(gram)
    basis = gram.new_zeros(min(iterations, features), features)
    images = torch.zeros_like(basis)
    rounding = torch.finfo(gram.dtype).eps
    for step in range(len(basis)):
        basis[step] = vector / vector.norm().clamp_min(1e-30)
        images[step] = gram @ basis[step]
        vector = images[step]
        for _ in range(2):  # once leaves rounding errors, twice is enough
            vector = vector - (basis @ vector) @ basis
        # the space is exhausted where nothing but rounding is left: zeros do no harm
        exhausted = vector.norm() <= features * rounding * images[step].norm()
        vector = vector.masked_fill(exhausted, 0)
    values, vectors = torch.linalg.eigh(basis @ images.T)
    ritz, image = vectors[:, -1] @ basis, vectors[:, -1] @ images
    return float(values[-1] + (image - values[-1] * ritz).norm())
