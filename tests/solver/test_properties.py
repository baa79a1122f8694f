"""What holds for every operator, pattern and data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import gram_statistics, true_error
from torch import Tensor

from fista_modifier.solver import (
    FAST,
    PAPER,
    NofM,
    SolverOptions,
    SparsityPattern,
    Unstructured,
    prune_weight,
)

PATTERNS = [NofM(2, 4), NofM(1, 4), NofM(4, 8), NofM(4, 4)]
PATTERNS += [Unstructured(share) for share in (0.0, 0.3, 0.5, 0.95, 0.999)]
OPTIONS = [SolverOptions(), FAST, PAPER, SolverOptions(start="dense")]

quickly = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight, X*ᵀ and maybe Xᵀ: few tokens or many, dead or equal features"""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows, columns = draw(st.integers(1, 12)), 8 * draw(st.integers(1, 4))
    tokens = draw(st.sampled_from([1, 3, columns, 8 * columns]))
    weight, pruned = normal(rows, columns), normal(tokens, columns)
    pruned *= 10 ** (draw(st.sampled_from([0, 1, 3])) * normal(columns).clamp(-1, 1))
    match draw(st.sampled_from(["", "dead", "equal", "constant", "sparse weight"])):
        case "dead":
            pruned[:, ::3] = 0
        case "equal":
            pruned[:, 1::2] = pruned[:, ::2]
        case "constant":
            pruned[:] = 3.0
        case "sparse weight":
            weight[:, ::2] = 0
    drifted = draw(st.booleans())
    return weight, pruned, pruned + 0.1 * normal(*pruned.shape) if drifted else None


@quickly
@given(
    problems(),
    st.sampled_from(PATTERNS),
    st.sampled_from(OPTIONS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_result_has_its_pattern_is_finite_and_no_worse_than_its_start(
    problem: tuple[Tensor, Tensor, Tensor | None],
    pattern: SparsityPattern,
    options: SolverOptions,
    dtype: torch.dtype,
) -> None:
    weight, pruned, dense = problem
    weight = weight.to(dtype)
    result = prune_weight(weight, gram_statistics(pruned, dense), pattern, options)
    assert result.weight.dtype == dtype and result.weight.shape == weight.shape
    assert bool(result.weight.isfinite().all())
    assert pattern.holds(result.weight)
    size = float((weight.float() @ (pruned if dense is None else dense).T).norm())
    assert result.error <= result.start_error + 1e-5 * size
    error = true_error(result.weight.float(), weight.float(), pruned, dense)
    assert result.error == pytest.approx(error, rel=1e-3, abs=1e-3 * size)


@quickly
@given(
    problems(),
    st.sampled_from(PATTERNS),
    st.sampled_from(OPTIONS),
    st.sampled_from([2.0**20, 2.0**-20]),
    st.booleans(),
)
def test_the_scale_of_inputs_and_weights_changes_nothing(
    problem: tuple[Tensor, Tensor, Tensor | None],
    pattern: SparsityPattern,
    options: SolverOptions,
    factor: float,
    of_inputs: bool,
) -> None:
    """
    Powers of two, about 1e±6: scaling by them rounds nothing, but for the toolkit's
    SparseGPT, after which the mask is the same and the weights are nearly.
    """
    weight, pruned, dense = problem
    result = prune_weight(weight, gram_statistics(pruned, dense), pattern, options)
    if of_inputs:
        pruned, dense = pruned * factor, None if dense is None else dense * factor
        scaled = prune_weight(weight, gram_statistics(pruned, dense), pattern, options)
        found = scaled.weight
    else:
        statistics = gram_statistics(pruned, dense)
        scaled = prune_weight(weight * factor, statistics, pattern, options)
        found = scaled.weight / factor
    if options is PAPER:
        assert torch.equal(found == 0, result.weight == 0)
    else:
        assert torch.equal(found, result.weight)
