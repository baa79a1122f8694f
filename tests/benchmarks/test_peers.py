"""The solvers that the benchmarks compare with: they must be given a fair chance."""

from __future__ import annotations

import peers
import pytest
import torch
from problems import normal

from fista_modifier.solver import (
    PAPER,
    GramStatistics,
    pattern_of,
    prune_weight,
)


@pytest.mark.parametrize("peer", [peers.ALPS, peers.Boza])
@pytest.mark.parametrize("pattern", ["2:4", "0.5", "0.7"])
def test_a_peer_is_exact_and_better_than_sparsegpt(peer, pattern):
    """As their papers report, on correlated features of unequal power."""
    powers = torch.logspace(-1, 1, 64)[:, None]
    inputs = (normal(64, 64, seed=1) @ normal(64, 512, seed=2)) * powers
    statistics = GramStatistics.empty(64)
    statistics.accumulate(inputs.T)
    weight = normal(32, 64)
    wanted = pattern_of(pattern)
    [solution] = peer(statistics).prune([weight], [wanted])
    assert wanted.holds(solution.weight)
    assert int((solution.weight == 0).sum()) == round(wanted.sparsity * weight.numel())
    difference = (solution.weight - weight) @ inputs
    assert solution.error == pytest.approx(float(difference.norm()), rel=1e-3)
    sparsegpt = prune_weight(weight, statistics, wanted, PAPER).start_error
    assert solution.error < sparsegpt
