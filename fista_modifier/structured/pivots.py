"""Least squares on a set of channels, kept up to date as channels leave and return."""

from __future__ import annotations

import torch
from torch import Tensor

from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.quadratic import unit_of

__all__ = ["PivotTable"]


class PivotTable:
    """
    A table of the least squares fit on the kept channels. Let S be the columns of the
    kept channels and R the others, H = G + δ I, B the target of f, V = B_S H_SS⁻¹ the
    least squares weight on S. The table is the symmetric sweep (Goodnight 1979) of H on
    S, with B as further rows:

        on S×S: −H_SS⁻¹                 on S×R: H_SS⁻¹ H_SR
        on R×R: H_RR − H_RS H_SS⁻¹ H_SR  (what of R is not explained by S)
        B's rows on S: V                 B's rows on R: B_R − V H_SR  (residuals)

    Let D_g be the r×r diagonal block of a channel g and Y_g its columns in B's rows. If
    g leaves S, this raises the damped error

        E(S) = min over V_S of ‖V_S X*_S − W X‖² + δ ‖V_S − W_S‖²

    by tr(Y_g |D_g|⁻¹ Y_gᵀ) − δ ‖W_g‖². The first term is optimal brain surgeon's exact
    cost with all other weights refitted (Hassibi & Stork 1993; for groups: ZipLM,
    Kurtić et al. 2023). The second is there because damping holds kept columns only.
    For a channel in R the same expression is what E falls by if it returns. Either move
    is one pivot, an exact change of rank r of the table.

    Columns are in the order of the channels. E is in units of a power of four near the
    largest entry of diag(H), which changes no choice and avoids overflow.

    :param objective: f with damping
    :param columns: long n×r
    :param kept: bool n, the channels in S
    """

    def __init__(
        self, objective: LayerObjective, columns: Tensor, kept: Tensor
    ) -> None:
        quadratic = objective.quadratic
        self.channels, self.size = columns.shape
        self.kept = kept.to(quadratic.device, copy=True)
        unit = unit_of(quadratic.diagonal)
        order = columns.flatten().to(quadratic.device)
        place = order.to(quadratic.statistics.gram.device)
        gram = quadratic.statistics.gram[place[:, None], place].to(quadratic.device)
        gram.diagonal().add_(quadratic.damping[order])
        self.table = torch.cat([gram, objective.target[:, order]]).div_(unit)
        squares = objective.weight.square().sum(0) * (quadratic.damping / unit)
        self._damped = squares[order].view(self.channels, self.size).sum(1)
        self._sweep(self.kept.repeat_interleave(self.size))

    def _sweep(self, inside: Tensor) -> None:
        """Turn the table of no channels into that of S."""
        kept, others = inside.nonzero().squeeze(1), (~inside).nonzero().squeeze(1)
        square = self.table[kept[:, None], kept]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(square))
        coefficients = self.table[:, kept] @ inverse
        self.table[:, others] -= coefficients @ self.table[kept[:, None], others]
        self.table[:, kept] = coefficients
        self.table[kept[:, None], others] = coefficients[others].T
        self.table[kept[:, None], kept] = -inverse

    @property
    def outputs(self) -> Tensor:
        """Y, m×N: V on S, and residuals on R."""
        return self.table[len(self.table[0]) :]

    @property
    def blocks(self) -> Tensor:
        """|D|, n×r×r, positive definite."""
        count, size = self.channels, self.size
        square = self.table[: count * size].view(count, size, count, size)
        blocks = square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return torch.where(self.kept[:, None, None], -blocks, blocks)

    def worths(self) -> Tensor:
        """
        Return by how much E would rise if a kept channel left, or fall if a removed one
        returned.

        :return: the change for each channel, n
        """
        return energies(self.outputs, self.blocks) - self._damped

    def worths_without(self, channel: Tensor, removed: Tensor) -> Tensor:
        """
        Return by how much E would fall if a channel left and a removed one then
        returned. The fall is to be compared with the worth of ``channel``.

        :param channel: the channel that would leave S, a scalar
        :param removed: the channels in R
        :return: by how much E would fall if each of them returned
        """
        columns = self._columns(removed)
        own = self._columns(channel.reshape(1))
        ties = self.table[own[:, None], columns]
        shares = torch.linalg.solve(-self.table[own[:, None], own], ties)
        outputs = self.outputs[:, columns] + self.outputs[:, own] @ shares
        split = (self.size, len(removed), self.size)
        freed = torch.einsum("iar,ias->ars", ties.view(split), shares.view(split))
        gains = energies(outputs, self.blocks[removed] + freed)
        return gains - self._damped[removed]

    def flip(self, channel: Tensor) -> None:
        """
        Take a channel out of S, or into it.

        :param channel: the index of the channel, a scalar (on the table's device, so
            that no step waits for the host)
        """
        channel = channel.reshape(1)  # a scalar as an index would be read by the host
        own = self._columns(channel)
        sign = torch.where(self.kept[channel], -1.0, 1.0)
        pivot = torch.linalg.inv_ex(self.table[own[:, None], own]).inverse
        row = self.table[own]
        column = self.table[:, own] @ pivot
        self.table.addmm_(column, row, alpha=-1)
        column *= sign
        self.table[:, own] = column
        self.table[own] = column[: row.shape[1]].T
        self.table[own[:, None], own] = -pivot
        self.kept[channel] = ~self.kept[channel]

    def _columns(self, channels: Tensor) -> Tensor:
        """Return the table's columns of some channels, channel after channel."""
        offsets = torch.arange(self.size, device=channels.device)
        return (channels[:, None] * self.size + offsets).flatten()


def energies(outputs: Tensor, blocks: Tensor) -> Tensor:
    """
    Return tr(Y_g D_g⁻¹ Y_gᵀ) of each group g of r columns.

    :param outputs: Y, m×c·r
    :param blocks: D, c×r×r, positive definite
    :return: the traces, c; NaN where rounding has left a block that is not positive
        definite
    """
    count, size, _ = blocks.shape
    groups = outputs.T.reshape(count, size, -1)
    factors, failed = torch.linalg.cholesky_ex(blocks)
    whitened = torch.linalg.solve_triangular(factors, groups, upper=False)
    squares: Tensor = whitened.square().sum((1, 2))
    return squares.masked_fill(failed != 0, torch.nan)
