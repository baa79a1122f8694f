"""A positive definite matrix has a factor, whatever its condition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fista_modifier.solver.factorisation import cholesky


def ill_conditioned() -> list[Tensor]:
    """Integers that float32 holds exactly, so that the determinant is exactly 1."""
    entries = [m for m in range(8002, 8192) if (m * m + 1) % 5 == 0]
    return [torch.tensor([[5.0, m], [m, (m * m + 1) // 5]]) for m in entries]


def test_matrices_that_float32_cannot_factorise_have_their_factor() -> None:
    matrices = ill_conditioned()
    failed = [bool(torch.linalg.cholesky_ex(one).info) for one in matrices]
    assert any(failed)
    for matrix, fails in zip(matrices, failed, strict=True):
        factor = cholesky(matrix)
        assert factor.dtype == torch.float32
        assert bool((factor.diagonal() > 0).all())
        if fails:  # the last entry is 1 / √5, the root of the determinant by the first
            assert float(factor[1, 1]) == pytest.approx(5**-0.5, rel=1e-6)


def test_an_indefinite_matrix_has_none() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        cholesky(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
