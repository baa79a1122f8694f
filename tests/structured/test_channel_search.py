from functools import cache
from itertools import combinations

import pytest
import torch
from channel_problems import channel_problem, damped_fit, redundant_mlp
from problems import inputs, normal

from fista_modifier.solver.quadratic import unit_of
from fista_modifier.structured import (
    FASPScore,
    GreedyElimination,
    LeastSquares,
    LocalSearch,
    Magnitude,
    PenaltyMethod,
)
from fista_modifier.structured.search import table_of

DAMPING = 0.15
SEEDS = range(6)


def setting(size: int, intercept: bool = False):
    """Six channels with drift and means, and E(S) from the tokens, in a table's unit"""
    weight = normal(5, 6 * size)
    pruned = inputs(64, 6 * size) + normal(6 * size, seed=4)
    dense = pruned + 0.2 * inputs(64, 6 * size, seed=8)
    problem = channel_problem(
        weight, pruned, 3, dense=dense, size=size, intercept=intercept
    )
    unit = unit_of(problem.damped(DAMPING).quadratic.diagonal)
    return (
        problem,
        lambda kept: (
            damped_fit(problem, sorted(kept), DAMPING, pruned, dense)[1] / unit
        ),
    )


def hard(seed: int, keep: int = 6):
    """Ten channels of a redundant MLP, and E(S) from the tokens"""
    weight, pruned = redundant_mlp(10, 128, rank=2, outputs=4, seed=seed)
    problem = channel_problem(weight, pruned, keep)
    return problem, lambda kept: damped_fit(problem, list(kept), DAMPING, pruned)[1]


@cache
def best_of_all(seed: int) -> float:
    """E of the best of the 210 choices of six channels"""
    _, error = hard(seed)
    return min(error(kept) for kept in combinations(range(10), 6))


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_worths_are_changes_of_the_least_squares_error(size, intercept):
    problem, error = setting(size, intercept)
    kept = {0, 2, 3, 5}
    worths = table_of(problem, torch.tensor(sorted(kept)), DAMPING).worths()
    for channel, worth in enumerate(worths.tolist()):
        expected = error(kept - {channel}) - error(kept | {channel})
        assert worth == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_swaps_are_changes_of_the_least_squares_error(size):
    problem, error = setting(size)
    kept = {0, 2, 3, 5}
    table = table_of(problem, torch.tensor(sorted(kept)), DAMPING)
    for leaving in kept:
        worths = table.worths_without(torch.tensor(leaving), torch.tensor([1, 4]))
        for channel, worth in zip([1, 4], worths.tolist(), strict=True):
            rest = kept - {leaving}
            expected = error(rest) - error(rest | {channel})
            assert worth == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_table_after_many_flips_is_a_fresh_one(size):
    """Downdates and updates of the inverse, weights and residuals are exact."""
    problem, _ = setting(size)
    table = table_of(problem, torch.arange(6), DAMPING)
    for channel in (1, 4, 0, 1, 3, 4, 5):  # leaves 0, 3 and 5 out
        table.flip(torch.tensor(channel))
    fresh = table_of(problem, torch.tensor([1, 2, 4]), DAMPING)
    assert torch.equal(table.kept, fresh.kept)
    assert (table.table - fresh.table).abs().max() < 1e-4 * fresh.table.abs().max()


def test_the_inverse_survives_hundreds_of_downdates():
    weight, pruned = redundant_mlp(300, 1200, rank=8)
    problem = channel_problem(weight, pruned, 20)
    table = table_of(problem, torch.arange(300), DAMPING)
    for channel in range(280):
        table.flip(torch.tensor(channel))
    fresh = table_of(problem, torch.arange(280, 300), DAMPING)
    kept = slice(280, 300)
    expected = fresh.table[kept, kept]
    difference = table.table[kept, kept] - expected
    assert difference.norm() < 1e-3 * expected.norm()
    costs, others = table.worths()[kept], fresh.worths()[kept]
    assert torch.allclose(costs, others, rtol=1e-3, atol=1e-5 * float(others.max()))


@pytest.mark.parametrize(
    "selector",
    [GreedyElimination(0.0), LocalSearch(Magnitude(), 0.0), PenaltyMethod(0.0)],
    ids=["greedy", "local search", "penalty"],
)
def test_orthogonal_features_are_chosen_by_their_power(selector):
    features, _ = torch.linalg.qr(normal(40, 12))
    pruned = features * normal(12, seed=1).exp()
    weight = normal(5, 12, seed=2)
    powers = pruned.norm(dim=0) * weight.norm(dim=0)
    problem = channel_problem(weight, pruned, 7)
    assert set(selector(problem).tolist()) == set(powers.topk(7).indices.tolist())


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_takes_the_cheapest_at_each_step(seed):
    problem, error = hard(seed)
    kept = set(range(10))
    while len(kept) > 6:
        kept.remove(min(kept, key=lambda channel: error(kept - {channel})))
    assert GreedyElimination(DAMPING)(problem).tolist() == sorted(kept)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("start", [Magnitude(), FASPScore(), GreedyElimination()])
def test_local_search_ends_where_no_swap_helps(start, seed):
    problem, error = hard(seed)
    found = LocalSearch(start, DAMPING)(problem).tolist()
    reached = error(found)
    assert reached <= error(start(problem).tolist()) * (1 + 1e-6)
    swaps = [
        error(sorted({*found} - {leaving} | {entering}))
        for leaving in found
        for entering in {*range(10)} - {*found}
    ]
    assert min(swaps) >= reached * (1 - 1e-2)
    assert reached >= best_of_all(seed) * (1 - 1e-6)


def test_local_search_is_mostly_the_best_of_all_choices():
    """And the others are not: the problems are hard enough to tell them apart."""
    hits = {"magnitude": 0, "search": 0}
    for seed in SEEDS:
        problem, error = hard(seed)
        best = best_of_all(seed)
        for name, selector in (
            ("magnitude", Magnitude()),
            ("search", LocalSearch(Magnitude(), DAMPING)),
        ):
            hits[name] += error(selector(problem).tolist()) <= best * 1.01
    assert hits["search"] >= 5
    assert hits["magnitude"] <= 1


def test_local_search_may_be_bounded():
    problem, error = hard(0)
    start = Magnitude()(problem).tolist()
    none = LocalSearch(Magnitude(), DAMPING, max_swaps=0)(problem).tolist()
    assert none == start
    one = LocalSearch(Magnitude(), DAMPING, max_swaps=1)(problem).tolist()
    assert len({*one} & {*start}) == 5
    assert error(one) < error(start)
    few = LocalSearch(Magnitude(), DAMPING, candidates=1)(problem).tolist()
    assert error(few) <= error(start)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("tokens", [16, 30])
def test_local_search_is_never_worse_where_rounding_adds_up(tokens, size):
    """Features of powers over eight decades, and fewer tokens than channels."""
    powers = 10 ** (5 * torch.rand(96, generator=torch.Generator().manual_seed(0)))
    pruned, weight = normal(tokens, 96) * powers, normal(32, 96, seed=1)
    problem = channel_problem(weight, pruned, 48 // size, size=size)
    start = GreedyElimination(DAMPING)(problem)
    found = LocalSearch(GreedyElimination(DAMPING), DAMPING, max_swaps=200)(problem)
    _, least = damped_fit(problem, start.tolist(), DAMPING, pruned)
    _, reached = damped_fit(problem, found.tolist(), DAMPING, pruned)
    assert reached <= least * (1 + 1e-3)


def test_a_bias_is_solved_for_where_features_hardly_vary():
    """The sums of centred features have the rounding of the sums before."""
    pruned = 200 + normal(40, 192)
    problem = channel_problem(normal(32, 192, seed=1), pruned, 96, intercept=True)
    kept = torch.arange(96)
    weight, bias = LeastSquares()(problem, kept)
    told = problem.error(problem.widened(weight, kept), bias)
    outputs = pruned.double() @ problem.weight.double().T
    found = pruned[:, :96].double() @ weight.double().T + bias.double()
    assert told == pytest.approx(float((found - outputs).norm()), rel=0.1)
