"""Pruning within the support of a weight that is sparse already."""

from __future__ import annotations

import pytest
import torch
from problems import gram_statistics, inputs, normal

from fista_modifier.solver import (
    FAST,
    PAPER,
    NofM,
    SolverOptions,
    SparsityPattern,
    Unstructured,
    Within,
    prune_weight,
)

ROWS, FEATURES, TOKENS = 12, 16, 64
PATTERNS = [NofM(2, 4), Unstructured(0.5)]
PRESETS = {"default": SolverOptions(), "fast": FAST, "paper": PAPER}


@pytest.fixture(params=[0.3, 0.7])
def sparse(request: pytest.FixtureRequest) -> torch.Tensor:
    """A weight with zeros anywhere."""
    weight = normal(ROWS, FEATURES)
    return weight * Unstructured(request.param).support(normal(ROWS, FEATURES, seed=1))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_zeros_stay_and_the_pattern_holds(
    sparse: torch.Tensor, pattern: SparsityPattern, preset: str
) -> None:
    statistics = gram_statistics(inputs(TOKENS, FEATURES))
    within = Within(pattern, sparse != 0)
    solution = prune_weight(sparse, statistics, within, PRESETS[preset])
    assert not bool(solution.weight[sparse == 0].any())
    assert Within(pattern, sparse != 0).holds(solution.weight)
    # and no entry is given up for nothing: as many are kept as can be
    kept = Within(pattern, sparse != 0).support(sparse.abs())
    assert int((solution.weight != 0).sum()) == int(kept.sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_dense_weight_is_pruned_as_without(pattern: SparsityPattern) -> None:
    statistics = gram_statistics(inputs(TOKENS, FEATURES))
    weight = normal(ROWS, FEATURES)
    plain = prune_weight(weight, statistics, pattern)
    kept = prune_weight(weight, statistics, Within(pattern, weight != 0))
    assert torch.equal(kept.weight, plain.weight)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_within_keeps_the_best_of_what_is_allowed(pattern: SparsityPattern) -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    allowed = torch.tensor([[False, True, False, True]])
    support = Within(pattern, allowed).support(scores)
    assert support.tolist() == [[False, True, False, True]]
