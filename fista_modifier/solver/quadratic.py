"""The curvature of the problem: one matrix for all operators with the same input."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from fista_modifier.solver.blocks import product
from fista_modifier.solver.factorisation import cholesky
from fista_modifier.solver.gram import GramStatistics

__all__ = ["LANCZOS_STEPS", "Quadratic", "unit_of"]

LANCZOS_STEPS = 50
"""The most products with G that are made to estimate its largest eigenvalue."""


class Quadratic:
    """
    The quadratic form ⟨V, V G⟩ that all operators of a stage share.

    With damping δ, G stands for X* X*ᵀ + diag(δ): see :class:`LayerObjective`. The sum
    is never stored, as nothing in a layer is as large as X* X*ᵀ of a down projection.

    Products with n×n matrices are those of
    :func:`~fista_modifier.solver.blocks.product`, so that these may stay in main
    memory.

    :param statistics: Gram matrices of the shared input, each n×n
    :param damping: δ ≥ 0 of each feature, n, in the units of G; None is zero
    """

    def __init__(
        self, statistics: GramStatistics, damping: Tensor | None = None
    ) -> None:
        self.statistics = statistics
        self.device = statistics.execution_device
        if damping is None:
            damping = torch.zeros_like(statistics.gram[0])
        self.damping = damping.to(self.device)

    @cached_property
    def diagonal(self) -> Tensor:
        """diag(G), n, on the device of the weights."""
        return self.statistics.gram.diagonal().to(self.device) + self.damping

    def times_gram(self, weight: Tensor) -> Tensor:
        """
        Multiply a weight with G, damping included.

        :param weight: V, m×n
        :return: V G, m×n
        """
        return self.times_undamped(weight).addcmul_(weight, self.damping)

    def times_undamped(self, weight: Tensor) -> Tensor:
        """
        Multiply a weight with X* X*ᵀ, without damping.

        :param weight: V, m×n
        :return: V X* X*ᵀ, m×n
        """
        return product(weight, self.statistics.gram)

    @cached_property
    def lipschitz(self) -> float:
        """L, an upper estimate of λ_max(G); the step length of FISTA is 1/L."""
        return largest_eigenvalue(self.statistics.gram, self.damping)

    def shifted(self, rho: float) -> Tensor:
        """
        Add ρ to the diagonal of G.

        :param rho: ρ ≥ 0
        :return: G + ρ I, n×n, a new matrix where that of the statistics is
        """
        matrix = self.statistics.gram.clone()
        matrix.diagonal().add_(self.damping.to(matrix.device) + rho)
        return matrix

    def resolvent(self, rho: float) -> Tensor:
        """
        Invert G + ρ I.

        :param rho: ρ > 0
        :return: (G + ρ I)⁻¹, n×n, where G is
        """
        # The matrix is freed before the inverse is made, in the place of its factor.
        factor = cholesky(self.shifted(rho))
        return torch.cholesky_inverse(factor, out=factor)


def unit_of(diagonal: Tensor) -> float:
    """
    Return a power of four near the largest entry of diag(G). To divide by it (or by its
    root) rounds nothing.

    :param diagonal: diag(G), n
    :return: the power of four; 1 for G = 0
    """
    return 4.0 ** (math.frexp(float(diagonal.amax()))[1] // 2)


def largest_eigenvalue(
    gram: Tensor, damping: Tensor, iterations: int = LANCZOS_STEPS
) -> float:
    """
    Estimate λ_max of G + diag(δ), positive semidefinite, by Lanczos' iteration: the
    largest Ritz value θ of the Krylov space of a random vector. (Power iteration with
    as many products is several per cent too low where the largest eigenvalues lie close
    together.) The residual ‖Gv + δv − θv‖ bounds the distance from θ to an eigenvalue.
    Adding it makes the estimate err to the safe side (a step of 1/L must not be too
    long).

    :param gram: G, n×n
    :param damping: δ, n
    :param iterations: products with G at most
    :return: θ + ‖Gv + δv − θv‖; 0 for G = 0 and δ = 0
    """
    features = gram.shape[0]
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(features, generator=generator, dtype=torch.float32).to(gram)
    basis = gram.new_zeros(min(iterations, features), features)
    images = torch.zeros_like(basis)
    rounding = torch.finfo(gram.dtype).eps
    damping = damping.to(gram.device)
    # The squares in a norm would overflow long before G does.
    unit = unit_of(gram.diagonal() + damping)
    for step in range(len(basis)):
        basis[step] = vector / vector.norm().clamp_min(1e-30)
        images[step] = (gram @ basis[step] + damping * basis[step]) / unit
        vector = images[step]
        for _ in range(2):  # One pass leaves rounding errors, and two are enough.
            vector = vector - (basis @ vector) @ basis
        # The space is exhausted where nothing but rounding is left. Zeros do no harm.
        exhausted = vector.norm() <= features * rounding * images[step].norm()
        vector = vector.masked_fill(exhausted, 0)
    values, vectors = torch.linalg.eigh(basis @ images.T)
    ritz, image = vectors[:, -1] @ basis, vectors[:, -1] @ images
    return unit * float(values[-1] + (image - values[-1] * ritz).norm())
