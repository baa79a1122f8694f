from itertools import product

import pytest
import torch
from channel_problems import channel_problem, damped_fit, redundant_mlp
from problems import inputs, normal

from fista_modifier.solver.quadratic import unit_of
from fista_modifier.structured import (
    FASPScore,
    LeastSquares,
    PenaltyMethod,
    prune_channels,
)
from fista_modifier.structured.penalty import Relaxation

DAMPING = 0.15


def setting(size: int):
    """Four channels, with drift"""
    weight, pruned = normal(3, 4 * size), inputs(48, 4 * size)
    dense = pruned + 0.2 * inputs(48, 4 * size, seed=8)
    problem = channel_problem(weight, pruned, 2, dense=dense, size=size)
    return problem, pruned, dense


def outputs_of(problem, weight, mask, pruned):
    """V D_z X* for V in the order of the channels, tokens×m"""
    columns = problem.columns.flatten()
    spread = mask.double().repeat_interleave(problem.columns.shape[1])
    return pruned.double()[:, columns] @ (weight.double() * spread).T


@pytest.mark.parametrize("size", [1, 2])
def test_the_sum_is_the_expected_error_of_random_choices(size):
    """At ρ = 1: all 16 choices, each with its probability."""
    problem, pruned, dense = setting(size)
    relaxation = Relaxation(problem, DAMPING)
    relaxation.hold(normal(3, 4 * size, seed=9))
    unit = unit_of(problem.damped(DAMPING).quadratic.diagonal)
    ridge = relaxation.ridge.double() * unit
    shares = torch.tensor([0.2, 0.9, 0.5, 0.4])
    target = dense.double() @ problem.weight.double().T
    moves = (relaxation.weight - relaxation.dense).double().square().sum(0) * ridge
    expected = 0.0
    for choice in product([0, 1], repeat=4):
        mask = torch.tensor(choice)
        probability = float(torch.where(mask > 0, shares, 1 - shares).prod())
        outputs = outputs_of(problem, relaxation.weight, mask, pruned)
        error = float((outputs - target).square().sum())
        damping = float(moves.view(4, size).sum(1) @ mask.double())
        expected += probability * (error + damping)
    value = relaxation.value(shares, 1.0) * unit + float(target.square().sum())
    assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("rho", [0.0, 0.3, 5.0])
def test_a_refit_minimises_over_the_weights(rho, size):
    relaxation = Relaxation(setting(size)[0], DAMPING)
    shares = torch.tensor([0.2, 0.9, 0.5, 0.4])
    relaxation.refit(shares, rho)
    best = relaxation.weight
    least = relaxation.value(shares, rho)
    for seed in range(10):
        step = 0.1 * normal(*best.shape, seed=seed)
        relaxation.hold(best + step)
        up = relaxation.value(shares, rho) - least
        relaxation.hold(best - step)
        down = relaxation.value(shares, rho) - least
        assert min(up, down) > 0
        assert up == pytest.approx(down, rel=1e-2)  # no slope is left


@pytest.mark.parametrize("size", [1, 2])
def test_a_binary_choice_is_worth_its_least_squares_error(size):
    problem, pruned, dense = setting(size)
    relaxation = Relaxation(problem, DAMPING)
    shares = torch.tensor([1.0, 0, 0, 1])
    relaxation.refit(shares, 7.0)
    unit = unit_of(problem.damped(DAMPING).quadratic.diagonal)
    output = (dense.double() @ problem.weight.double().T).square().sum()
    _, expected = damped_fit(problem, [0, 3], DAMPING, pruned, dense)
    value = relaxation.value(shares, 7.0) * unit + float(output)
    assert value == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("rho", [0.01, 0.5, 3.0, 50.0])
def test_steps_lower_the_sum_within_the_set(rho):
    weight, pruned = redundant_mlp(24, 128)
    relaxation = Relaxation(channel_problem(weight, pruned, 12), DAMPING)
    shares = relaxation.start()
    relaxation.refit(shares, rho)
    first = last = relaxation.value(shares, rho)
    for length in (0.1, 1.0, 10.0, 100.0, 1000.0):
        held, held_shares = relaxation.weight, shares
        moved = relaxation.step(shares, rho, length)
        assert relaxation.value(moved, rho) <= last
        assert (moved is shares) == (relaxation.weight is held)
        shares, last = moved, relaxation.value(moved, rho)
        assert float(shares.sum()) == pytest.approx(12, rel=1e-5)
        assert 0 <= shares.min() <= shares.max() <= 1
    assert last < first
    if rho == 0.01:  # where this step is too long, so that refusing it is seen
        assert moved is held_shares


@pytest.mark.parametrize("seed", range(4))
def test_it_ends_binary(seed):
    weight, pruned = redundant_mlp(24, 128, seed=seed)
    problem = channel_problem(weight, pruned, 15)
    shares = PenaltyMethod().relaxed(problem)
    assert float(shares.sum()) == pytest.approx(15, rel=1e-5)
    assert torch.equal(shares.round(), (shares > 0.99).float())
    assert float((shares * (1 - shares)).max()) <= 1e-4
    kept = PenaltyMethod()(problem)
    assert kept.tolist() == (shares > 0.5).nonzero().flatten().tolist()


def test_few_rounds_still_choose():
    weight, pruned = redundant_mlp(24, 128)
    problem = channel_problem(weight, pruned, 15)
    assert len(PenaltyMethod(max_rounds=1)(problem)) == 15


@pytest.mark.parametrize("seed", range(4))
def test_it_is_no_worse_than_scores_where_channels_are_redundant(seed):
    weight, pruned = redundant_mlp(40, 400, seed=seed)
    problem = channel_problem(weight, pruned, 28)
    errors = [
        prune_channels(problem, selector, LeastSquares()).error
        for selector in (PenaltyMethod(), FASPScore())
    ]
    assert errors[0] <= errors[1]
