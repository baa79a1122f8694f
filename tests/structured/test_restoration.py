import pytest
import torch
from channel_problems import channel_problem, damped_fit
from problems import inputs, normal

from fista_modifier.structured import (
    BiasCompensation,
    FASPScore,
    KeptWeights,
    LeastSquares,
    prune_channels,
)

TOKENS, FEATURES, ROWS = 64, 12, 5
KEPT = [0, 2, 3, 5]


def setting(drift: bool, intercept: bool):
    weight = normal(ROWS, FEATURES)
    pruned = inputs(TOKENS, FEATURES) + normal(FEATURES, seed=3)
    dense = pruned + 0.2 * inputs(TOKENS, FEATURES, seed=7) + 0.1 if drift else None
    problem = channel_problem(
        weight, pruned, 4, dense=dense, size=2, intercept=intercept
    )
    return problem, pruned, dense


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.15, 3.0])
def test_least_squares_is_that_of_the_tokens(damping, intercept, drift):
    problem, pruned, dense = setting(drift, intercept)
    expected, _ = damped_fit(problem, KEPT, damping, pruned, dense)
    restored = LeastSquares(damping)(problem, torch.tensor(KEPT))
    assert torch.allclose(restored.weight.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("drift", [False, True])
def test_the_intercept_is_that_of_a_column_of_ones(drift):
    """Undamped, least squares with a feature that is 1 is another way to the bias."""
    problem, pruned, dense = setting(drift, True)
    columns = problem.kept_columns(torch.tensor(KEPT))
    left = torch.cat([pruned[:, columns], torch.ones(TOKENS, 1)], 1).double()
    right = (pruned if dense is None else dense).double() @ problem.weight.double().T
    expected = torch.linalg.lstsq(left, right).solution.T
    restored = LeastSquares(0.0)(problem, torch.tensor(KEPT))
    assert torch.allclose(restored.weight.double(), expected[:, :-1], atol=1e-3)
    assert torch.allclose(restored.bias.double(), expected[:, -1], atol=1e-3)


def test_channels_that_are_constant_go_into_the_bias():
    weight, pruned = normal(ROWS, FEATURES), inputs(TOKENS, FEATURES)
    pruned[:, 6:] = 1 + torch.arange(6.0)
    kept = torch.arange(6)
    with_bias = channel_problem(weight, pruned, 6, intercept=True)
    for restorer in (LeastSquares(), BiasCompensation()):
        restored = restorer(with_bias, kept)
        assert torch.allclose(restored.weight, weight[:, :6], atol=1e-4)
        assert torch.allclose(restored.bias, weight[:, 6:] @ pruned[0, 6:], rtol=1e-4)
    without = channel_problem(weight, pruned, 6)
    wide = without.widened(LeastSquares()(without, kept).weight, kept)
    assert without.error(wide) > 0.1 * without.objective.output_norm


@pytest.mark.parametrize("damping", [0.0, 0.15])
@pytest.mark.parametrize("intercept", [False, True])
def test_with_all_channels_the_weight_stays(damping, intercept):
    problem, _, _ = setting(False, intercept)
    restored = LeastSquares(damping)(problem, torch.arange(6))
    assert torch.allclose(restored.weight, problem.weight, atol=1e-4)
    assert restored.bias is None or restored.bias.abs().max() < 1e-4


def test_damping_draws_to_the_dense_weight():
    problem, _, _ = setting(False, False)
    restored = LeastSquares(1e6)(problem, torch.tensor(KEPT))
    columns = problem.kept_columns(torch.tensor(KEPT))
    assert torch.allclose(restored.weight, problem.weight[:, columns], atol=1e-3)


def test_a_dead_feature_keeps_its_dense_weight():
    weight, pruned = normal(ROWS, FEATURES), inputs(TOKENS, FEATURES)
    pruned[:, 4] = 0
    problem = channel_problem(weight, pruned, 6)
    restored = LeastSquares()(problem, torch.arange(6))
    assert torch.allclose(restored.weight[:, 4], weight[:, 4])


def test_fewer_tokens_than_features():
    weight, pruned = normal(ROWS, FEATURES), inputs(3, FEATURES)
    problem = channel_problem(weight, pruned, 8)
    kept = torch.arange(8)
    wide = problem.widened(LeastSquares(0.0)(problem, kept).weight, kept)
    assert problem.error(wide) < 1e-2 * problem.objective.output_norm


@pytest.mark.parametrize("drift", [False, True])
def test_compensation_keeps_the_mean_of_the_outputs(drift):
    problem, pruned, dense = setting(drift, True)
    restored = BiasCompensation()(problem, torch.tensor(KEPT))
    columns = problem.kept_columns(torch.tensor(KEPT))
    assert torch.equal(restored.weight, problem.weight[:, columns])
    means = restored.weight @ pruned.mean(0)[columns] + restored.bias
    expected = problem.weight @ (pruned if dense is None else dense).mean(0)
    assert torch.allclose(means, expected, atol=1e-4)


def test_kept_weights_are_the_dense_ones():
    problem, _, _ = setting(True, True)
    restored = KeptWeights()(problem, torch.tensor(KEPT))
    assert torch.equal(restored.weight, problem.weight[:, [0, 2, 3, 5, 6, 8, 9, 11]])
    assert restored.bias is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_is_that_of_the_bias_as_it_is_stored(dtype: torch.dtype) -> None:
    weight, pruned = normal(5, 12, seed=1), normal(40, 12, seed=2) + 1
    own = (100 * normal(5, seed=3)).to(dtype)
    problem = channel_problem(weight, pruned, 6, intercept=True)
    found = prune_channels(problem, FASPScore(), LeastSquares(), own)
    assert found.bias is not None
    stored = (own + found.bias).to(dtype).double()
    outputs = pruned[:, found.kept].double() @ found.weight.double().T + stored
    wanted = pruned.double() @ weight.double().T + own.double()
    assert found.error == pytest.approx(float((outputs - wanted).norm()), rel=1e-5)
