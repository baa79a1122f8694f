"""What holds for every operator, pattern and data."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from problems import error_slack, gram_statistics, true_error
from torch import Tensor

from fista_modifier.solver import (
    FAST,
    PAPER,
    NofM,
    SolverOptions,
    SparsityPattern,
    Unstructured,
    WarmStart,
    prune_weight,
)
from fista_modifier.solver.stage import RESOLUTION

PATTERNS = [NofM(2, 4), NofM(1, 4), NofM(4, 8), NofM(4, 4), NofM(7, 8), NofM(1, 8)]
PATTERNS += [Unstructured(share) for share in (0.0, 1e-9, 0.3, 0.5, 0.95, 1 - 1e-9)]
OPTIONS = [
    replace(preset, start=start)
    for preset in (SolverOptions(), FAST, PAPER)
    for start in get_args(WarmStart)
]

quickly = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
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


def well_posed(seed: int) -> tuple[Tensor, Tensor]:
    """A weight and X*ᵀ, of more tokens than features"""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 16, generator=generator)
    pruned = torch.randn(128, 16, generator=generator)
    return weight, pruned * torch.logspace(-1, 1, 16)


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
    values = torch.cat([weight, result.weight]).float()
    slack = error_slack(values, pruned if dense is None else torch.cat([pruned, dense]))
    size = float((weight.float() @ (pruned if dense is None else dense).T).norm())
    assert result.error <= max(result.start_error, RESOLUTION * size) + slack**0.5
    error = true_error(result.weight.float(), weight.float(), pruned, dense)
    assert result.error**2 == pytest.approx(error**2, rel=1e-3, abs=slack)


@quickly
@given(
    st.integers(0, 2**20),
    st.sampled_from(PATTERNS),
    st.sampled_from(OPTIONS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_of_enough_tokens_a_result_has_not_one_zero_too_many(
    seed: int, pattern: SparsityPattern, options: SolverOptions, dtype: torch.dtype
) -> None:
    weight, pruned = well_posed(seed)
    result = prune_weight(weight.to(dtype), gram_statistics(pruned), pattern, options)
    zeros = int((result.weight == 0).sum())
    assert zeros == round(pattern.sparsity * weight.numel())
    assert pattern.holds(result.weight)


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
    """Powers of two, about 1e±6: scaling by them rounds nothing."""
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
    assert torch.equal(found, result.weight)


@quickly
@given(
    st.integers(0, 2**20),
    st.sampled_from(PATTERNS),
    st.sampled_from(OPTIONS),
    st.sampled_from([1e6, 1e-6]),
    st.booleans(),
)
def test_a_million_more_or_less_leaves_the_mask(
    seed: int,
    pattern: SparsityPattern,
    options: SolverOptions,
    factor: float,
    of_inputs: bool,
) -> None:
    """
    Of data that determine it: among equals, the rounding of the scaled decides. So it
    does where Algorithm 1 as published starts from dense weights, whose gradient is
    nothing but rounding.
    """
    assume(options != replace(PAPER, start="dense"))
    weight, pruned = well_posed(seed)
    result = prune_weight(weight, gram_statistics(pruned), pattern, options)
    if of_inputs:
        pruned = pruned * factor
    else:
        weight = weight * factor
    scaled = prune_weight(weight, gram_statistics(pruned), pattern, options)
    assert torch.equal(scaled.weight == 0, result.weight == 0)


def test_values_that_half_precision_cannot_hold_are_left_out() -> None:
    """One token and a feature of 1e-5: the exact weight would be of the order of 1e5"""
    pruned = torch.tensor([[1e-5, 1e-5, 1e3, 1e3]])
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=torch.float16)
    result = prune_weight(weight, gram_statistics(pruned), NofM(2, 4), PAPER)
    assert bool(result.weight.isfinite().all())
    assert result.error <= result.start_error


def test_infinite_values_are_not_stored() -> None:
    """What one token asks of half precision may overflow; the error is NaN then."""
    options = replace(PAPER, start="dense")
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        sizes = 10 ** torch.linspace(-4, 2, 8)
        order = torch.randperm(8, generator=generator)
        pruned = sizes[order] * torch.randn(1, 8, generator=generator)
        weight = torch.randn(4, 8, generator=generator).half()
        result = prune_weight(weight, gram_statistics(pruned), NofM(2, 4), options)
        assert bool(result.weight.isfinite().all())
        assert result.error <= result.start_error
