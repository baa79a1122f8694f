"""Large weights are solved block of rows after block."""

from collections.abc import Callable

import pytest
import torch
from problems import gram_statistics, inputs, normal
from torch import Tensor

from fista_modifier.solver import NofM, SolverOptions, Unstructured, prune_weight
from fista_modifier.solver.admm import ADMM
from fista_modifier.solver.blocks import row_blocks
from fista_modifier.solver.fista import fista
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.quadratic import Quadratic
from fista_modifier.solver.support import refit_
from fista_modifier.solver.tuning import lambda_unit

TOKENS, FEATURES, ROWS = 96, 24, 7


@pytest.fixture
def objective() -> LayerObjective:
    dense = inputs(TOKENS, FEATURES)
    pruned = dense + 0.2 * inputs(TOKENS, FEATURES, seed=5)
    quadratic = Quadratic(gram_statistics(pruned, dense), torch.ones(FEATURES))
    return LayerObjective(normal(ROWS, FEATURES), quadratic)


def blocks_of(rows: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fista_modifier.solver.blocks.ENTRIES", int(rows * FEATURES))


def test_blocks_cover_every_row_once(monkeypatch):
    weight = normal(ROWS, FEATURES)
    assert len(row_blocks(weight)) == 1
    for rows in (0.1, 1, 2, 3.9, ROWS):
        blocks_of(rows, monkeypatch)
        blocks = [weight[block] for block in row_blocks(weight)]
        assert max(map(len, blocks)) == max(int(rows), 1)
        assert torch.equal(torch.cat(blocks), weight)


def by_refit(objective: LayerObjective) -> Tensor:
    free = objective.weight.abs() > 0.7
    return refit_(objective, objective.weight * free, free, iterations=5)


def by_fista(objective: LayerObjective) -> Tensor:
    penalty = 0.1 * lambda_unit(objective)
    return fista(objective, penalty, objective.weight, 7, tolerance=0.0).weight


def by_admm(objective: LayerObjective) -> Tensor:
    return ADMM(objective.quadratic, steps=7)(objective, Unstructured(0.5))


@pytest.mark.parametrize("solve", [by_refit, by_fista, by_admm])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_do_not_depend_on_those_of_another_block(
    objective: LayerObjective,
    solve: Callable[[LayerObjective], Tensor],
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = solve(objective)
    blocks_of(rows, monkeypatch)
    torch.testing.assert_close(solve(objective), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", [NofM(2, 4), Unstructured(0.5)], ids=str)
def test_an_operator_in_blocks_is_as_good_as_whole(pattern, monkeypatch):
    """Blocks end by their own shares of a tolerance of 0.1 %."""
    statistics = gram_statistics(inputs(TOKENS, FEATURES))
    weight, options = normal(ROWS, FEATURES), SolverOptions()
    whole = prune_weight(weight, statistics, pattern, options)
    blocks_of(2, monkeypatch)
    parts = prune_weight(weight, statistics, pattern, options)
    assert pattern.holds(parts.weight)
    assert parts.error == pytest.approx(whole.error, rel=2e-3)


def test_each_block_of_fista_stops_by_itself(objective, monkeypatch):
    """A row that starts at its solution is done, whatever the others are."""
    penalty = 0.1 * lambda_unit(objective)
    solved = fista(objective, penalty, objective.weight, 1000, tolerance=1e-7).weight
    start = torch.cat([objective.weight[:-1], solved[-1:]])
    blocks_of(1, monkeypatch)
    found = fista(objective, penalty, start, 1000, tolerance=1e-3)
    assert torch.allclose(found.weight[-1], solved[-1], rtol=1e-5, atol=1e-5)
    assert 1 < found.iterations < 1000
