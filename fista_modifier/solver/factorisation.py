"""The Cholesky factor of a matrix that has one, whatever its condition."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cholesky"]


def cholesky(matrix: Tensor) -> Tensor:
    """
    Factorise a positive definite matrix. Where one feature has almost all the power and
    the damping of the others is near its rounding, float32 may find no factor though
    there is one. Then the work is done in float64.

    :param matrix: A, float32 n×n, positive definite
    :return: L, float32 n×n, lower triangular, so that L Lᵀ is A up to rounding
    :raises torch.linalg.LinAlgError: if A is not positive definite
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        factor = torch.linalg.cholesky(matrix.double()).to(matrix)
    return factor
