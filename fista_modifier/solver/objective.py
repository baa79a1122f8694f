"""The smooth part of the problem: the output error of one linear operator."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from fista_modifier.solver.drift import inner
from fista_modifier.solver.precision import Precision, matmul_precision
from fista_modifier.solver.quadratic import Quadratic

__all__ = ["LayerObjective"]


class LayerObjective:
    """
    The function f(V) = ½‖V X* − W X‖_F² of Eq. (3) in Gram form. With the drift
    Δ = X* − X,

        V X* − W X = (V − W) X* + W Δ,
        ‖V X* − W X‖_F² = ⟨V − W, (V − W) G + 2 W Δ X*ᵀ⟩ + ⟨W, W Δ Δᵀ⟩,
        ∇f(V) = V G − B,  B = W (G − Δ X*ᵀ).

    Matrix products are float32, inner products float32 along a row and float64 over
    the rows.

    With damping δ the gradient is that of f(V) + ½ Σ_j δ_j ‖V_j − W_j‖², j running over
    the columns. For that, δ is added to the diagonal of G and W diag(δ) to B. This
    holds back directions that the data hardly determine. Errors are always those of f
    itself.

    :param weight: dense weight W, m×n
    :param quadratic: G and the other sums over the tokens of the operator's input
    """

    def __init__(self, weight: Tensor, quadratic: Quadratic) -> None:
        self.weight = weight.to(quadratic.device, torch.float32)
        self.quadratic = quadratic

    @cached_property
    def _drift(self) -> tuple[Tensor | None, float]:
        """
        W Δ X*ᵀ, m×n, and ‖W Δ‖_F², the error of W itself; None and 0 where X* = X.
        """
        drift = self.quadratic.statistics.drift
        return (None, 0.0) if drift is None else drift.of(self.weight)

    @cached_property
    def target(self) -> Tensor:
        """B = W X X*ᵀ, m×n, the linear term of f."""
        product, (drift, _) = self.quadratic.times_gram(self.weight), self._drift
        return product if drift is None else product.sub_(drift)

    @cached_property
    def output_norm(self) -> float:
        """
        ‖W X‖_F, the size of the dense output and the yardstick of relative errors.
        """
        drift, own_error = self._drift
        squared = self._form(self.weight) + own_error
        if drift is not None:
            squared -= 2 * inner(self.weight, drift)
        return math.sqrt(max(squared, 0.0))

    def gradient(
        self,
        candidate: Tensor,
        rows: slice = slice(None),
        precision: Precision = "float32",
    ) -> Tensor:
        """
        Return the gradient of f.

        :param candidate: V, m×n, or some of its rows
        :param rows: the rows that ``candidate`` has
        :param precision: the lowest precision that will do for V G; B is always float32
        :return: ∇f(V) = V G − B, for these rows
        """
        target = self.target[rows]
        with matmul_precision(precision):
            return self.quadratic.times_gram(candidate).sub_(target)

    def error(self, candidate: Tensor) -> float:
        """
        Return the output error of a weight.

        :param candidate: V, m×n
        :return: ‖V X* − W X‖_F over all calibration tokens
        """
        drift, own_error = self._drift
        difference = candidate - self.weight
        squared = self._form(difference) + own_error
        if drift is not None:
            squared += 2 * inner(difference, drift)
        return math.sqrt(max(squared, 0.0))

    def _form(self, weight: Tensor) -> float:
        """Return ⟨V, V X* X*ᵀ⟩ for a weight V."""
        return inner(weight, self.quadratic.times_undamped(weight))
