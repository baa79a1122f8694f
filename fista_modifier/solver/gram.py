"""Second moments of an operator's inputs: all that the solver needs of the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GramStatistics"]


@dataclass
class GramStatistics:
    """
    Gram matrices of X* (inputs in the partly pruned layer) and of the drift
    Δ = X* − X from the dense layer's inputs X; each is n×n for n input features, so
    memory does not grow with the number p of calibration tokens.

    The three matrices carry the same information as X Xᵀ, X X*ᵀ and X* X*ᵀ, but Δ is
    formed before anything is squared: where X* is close to X, the error of the pruned
    operator is not lost in the difference of two large sums, and where X* = X both
    drift terms are exactly zero (they are then not stored at all).

    :param gram: G = X* X*ᵀ, float32 n×n
    :param drift_cross: Δ X*ᵀ, float32 n×n, or None where X* = X
    :param drift_gram: Δ Δᵀ, float32 n×n, or None where X* = X
    :param tokens: p, the number of tokens summed so far
    """

    gram: Tensor
    drift_cross: Tensor | None = None
    drift_gram: Tensor | None = None
    tokens: int = 0

    @classmethod
    def empty(cls, features: int, device: torch.device | None = None) -> GramStatistics:
        """
        :param features: n, the operator's input width
        :param device: device on which the sums are kept
        :return: statistics of zero tokens
        """
        return cls(torch.zeros(features, features, device=device))

    @property
    def features(self) -> int:
        """n, the operator's input width"""
        return self.gram.shape[0]

    @property
    def dead(self) -> Tensor:
        """bool n: features that no calibration token excites (G_jj = 0)"""
        return self.gram.diagonal() == 0

    def accumulate(self, pruned: Tensor, dense: Tensor | None = None) -> None:
        """
        Add the tokens of one batch. Products and sums are float32 whatever the dtype
        of the activations, so the result depends on the batch size only by rounding.

        :param pruned: X*ᵀ of the batch, tokens×n
        :param dense: Xᵀ of the same tokens, tokens×n; None where X* = X
        """
        pruned = pruned.to(self.gram.device, torch.float32)
        _add_gram(self.gram, pruned)
        self.tokens += pruned.shape[0]
        if dense is None:
            return
        drift = pruned - dense.to(pruned.device, torch.float32)
        if self.drift_cross is None or self.drift_gram is None:
            self.drift_cross = torch.zeros_like(self.gram)
            self.drift_gram = torch.zeros_like(self.gram)
        self.drift_cross.addmm_(drift.T, pruned)
        _add_gram(self.drift_gram, drift)

    def column_scale(self, damping: Tensor | None = None) -> Tensor:
        """
        :param damping: δ, n, in the units of G
        :return: (diag(G) + δ)^½, n: the norm of each input feature over all tokens;
            a tiny number instead of 0, so that it can be divided by
        """
        diagonal = self.gram.diagonal()
        floor = 1e-8 * diagonal.mean()
        if damping is not None:
            diagonal = diagonal + damping
        return torch.where(floor > 0, diagonal.clamp_min(floor), 1).sqrt()

    def scaled(self, scale: Tensor) -> GramStatistics:
        """
        The statistics of inputs divided by ``scale``, for weights multiplied by it: the
        outputs, and so all errors, are the same.

        :param scale: n, positive
        :return: statistics with new matrices
        """

        def divide(matrix: Tensor | None) -> Tensor | None:
            return None if matrix is None else matrix / scale / scale[:, None]

        return GramStatistics(
            self.gram / scale / scale[:, None],
            divide(self.drift_cross),
            divide(self.drift_gram),
            self.tokens,
        )

    def is_finite(self) -> bool:
        """
        :return: whether no activation was NaN or infinite (or overflowed when squared)
        """
        return bool(self.gram.isfinite().all()) and (
            self.drift_gram is None or bool(self.drift_gram.isfinite().all())
        )


def _add_gram(gram: Tensor, tokens: Tensor) -> None:
    """
    Add XᵀX of tokens×n to a symmetric sum: only blocks on and above the diagonal are
    computed (10/16 of the work with four blocks a side), the others are their copies.
    """
    features = gram.shape[0]
    width = -(-features // 4)
    for start in range(0, features, width):
        end = min(start + width, features)
        block = tokens[:, start:end].T @ tokens[:, start:]
        gram[start:end, start:] += block
        gram[end:, start:end] += block[:, width:].T
