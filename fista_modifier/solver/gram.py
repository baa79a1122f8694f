"""Second moments of an operator's inputs: all that the solver needs of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fista_modifier.solver.blocks import add_gram
from fista_modifier.solver.drift import Drift, FeatureDrift, OutputDrift, narrows
from fista_modifier.solver.precision import Precision, matmul_precision

__all__ = ["GramStatistics"]


@dataclass
class GramStatistics:
    """
    Second moments of X* (inputs in the partly pruned layer) and of the drift Δ = X* − X
    from the dense layer's inputs X. Memory does not grow with the number p of
    calibration tokens.

    With a weight W, the sums carry the same information as X Xᵀ, X X*ᵀ and X* X*ᵀ, but
    Δ is formed before anything is squared. So where X* is close to X, the error of the
    pruned operator is not lost in the difference of two large sums. Where X* = X the
    drift is exactly zero, and nothing is stored of it.

    :param gram: G = X* X*ᵀ, float32 n×n; may lie on another device than that which
        executes the operators
    :param drift: sums of Δ, or None where X* = X
    :param tokens: p, the number of tokens summed so far
    :param weight: W, float32 m×n, if these are the inputs of a single operator whose
        drift is better summed in its outputs; otherwise None
    :param device: the device that executes the operators; None if it is that of G
    :param total: Σ X* over the tokens, float64 n, for means; None before the first
    :param drift_total: Σ of what the drift is summed from, float64 n or m; None where
        X* = X
    """

    gram: Tensor
    drift: Drift | None = None
    tokens: int = 0
    weight: Tensor | None = None
    device: torch.device | None = None
    total: Tensor | None = None
    drift_total: Tensor | None = None

    @classmethod
    def empty(
        cls,
        features: int,
        device: torch.device | None = None,
        weights: Sequence[Tensor] = (),
        offload: bool = False,
    ) -> GramStatistics:
        """
        Return statistics of zero tokens.

        :param features: n, the operators' input width
        :param device: the device that executes the operators, and keeps the sums
        :param weights: weights, out×in, of all operators that will use the statistics;
            if there is just one, with no more rows than columns, the statistics are for
            it alone
        :param offload: whether to keep n×n matrices in main memory instead
        :return: the statistics
        """
        single = None
        if len(weights) == 1 and narrows(weights[0].shape[0], features):
            single = weights[0].to(device, torch.float32)
        place = "cpu" if offload else device
        gram = torch.zeros(features, features, dtype=torch.float32, device=place)
        return cls(gram, weight=single, device=device)

    @property
    def execution_device(self) -> torch.device:
        """The device that tokens come from and weights are on."""
        return self.device or self.gram.device

    @property
    def features(self) -> int:
        """n, the operator's input width."""
        return self.gram.shape[0]

    @property
    def dead(self) -> Tensor:
        """Features that no calibration token excites (G_jj = 0), bool n."""
        return self.gram.diagonal() == 0

    @property
    def typical_power(self) -> float:
        """
        The geometric mean of diag(G) over features that are not dead (0 if all are
        dead). A few features of great power have little hold on it.
        """
        powers = self.gram.diagonal()[~self.dead].double()
        return float(powers.log().mean().exp()) if len(powers) else 0.0

    def accumulate(
        self,
        pruned: Tensor,
        dense: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> None:
        """
        Add the tokens of one batch. Products and sums are float32 whatever the dtype
        of the activations, so the result depends on the batch size only by rounding.
        Products of 16-bit activations, and of the 16-bit weights that go with them, may
        be computed in TensorFloat-32, which holds such values exactly. Where X* = X,
        neither ``dense`` nor ``outputs`` is given.

        :param pruned: X*ᵀ of the batch, tokens×n
        :param dense: Xᵀ of the same tokens, tokens×n
        :param outputs: (W X)ᵀ of the same tokens, tokens×m, which takes the place of X
            where these are the statistics of a single ``weight``
        """
        exact: Precision = "tf32" if pruned.element_size() == 2 else "float32"
        # a conversion on the way to a GPU would be the CPU's work
        pruned = pruned.to(self.execution_device).float()
        with matmul_precision(exact):
            add_gram(self.gram, pruned)
        self.tokens += pruned.shape[0]
        self.total = _plus(self.total, pruned)
        if outputs is not None:
            assert self.weight is not None, "the weight whose outputs they are"
            with matmul_precision(exact):
                drift = pruned @ self.weight.T
            drift -= outputs.to(pruned.device).float()
        elif dense is not None:
            drift = pruned - dense.to(pruned.device).float()
            if self.weight is not None:
                drift = drift @ self.weight.T
        else:
            return
        if self.drift is None:
            self.drift = self._no_drift()
        self.drift.accumulate(drift, pruned)
        self.drift_total = _plus(self.drift_total, drift)

    def _no_drift(self) -> Drift:
        if self.weight is None:
            return FeatureDrift(
                torch.zeros_like(self.gram), torch.zeros_like(self.gram)
            )
        power = self.weight.new_zeros((), dtype=torch.float64)
        return OutputDrift(torch.zeros_like(self.weight), power)

    def fill(self, with_drift: bool) -> None:
        """
        Make the sums that no token has made yet, all zero.

        :param with_drift: whether those of a drift are among them
        """
        if self.total is None:
            self.total = self._zeros(self.features)
        if with_drift and self.drift is None:
            self.drift = self._no_drift()
            width = self.features if self.weight is None else len(self.weight)
            self.drift_total = self._zeros(width)

    def _zeros(self, width: int) -> Tensor:
        return torch.zeros(width, dtype=torch.float64, device=self.execution_device)

    def sums(self) -> list[Tensor]:
        """
        Return the tensors that are to be added up over ranks, in place. The number of
        tokens is to be added up, too.

        :return: the tensors
        """
        totals = [one for one in (self.total, self.drift_total) if one is not None]
        return [self.gram, *(self.drift.sums() if self.drift else []), *totals]

    def column_scale(self, damping: Tensor | None = None) -> Tensor:
        """
        Return the norm of each input feature over all tokens.

        :param damping: δ, n, in the units of G; None is zero
        :return: (diag(G) + δ)^½, n; a tiny number instead of 0, so that it can be
            divided by
        """
        diagonal = self.gram.diagonal()
        floor = 1e-8 * diagonal.mean()
        if damping is not None:
            diagonal = diagonal + damping
        return torch.where(floor > 0, diagonal.clamp_min(floor), 1).sqrt()

    def scaled(self, scale: Tensor) -> GramStatistics:
        """
        Return the statistics of inputs divided by ``scale``, for weights multiplied by
        it. The outputs, and so all errors, are the same.

        :param scale: n, positive
        :return: statistics with new matrices
        """

        return GramStatistics(
            (self.gram / scale).div_(scale[:, None]),
            self.drift.scaled(scale) if self.drift else None,
            self.tokens,
            device=self.device,
        )

    def is_finite(self) -> bool:
        """
        Say whether no activation was NaN or infinite (or overflowed when squared).

        :return: whether all sums are finite
        """
        return all(bool(matrix.isfinite().all()) for matrix in self.sums())


def _plus(total: Tensor | None, tokens: Tensor) -> Tensor:
    summed = tokens.sum(0, dtype=torch.float64)
    return summed if total is None else total + summed
