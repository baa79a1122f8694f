import math

import pytest
import torch
from channel_problems import (
    SELECTORS,
    channel_problem,
    means_of,
    named,
    redundant_mlp,
)
from problems import FLOAT32, gram_statistics, inputs, normal, true_error

from fista_modifier.solver import GramStatistics
from fista_modifier.structured import (
    BiasCompensation,
    ChannelProblem,
    FASPScore,
    KeptWeights,
    LeastSquares,
    prune_channels,
)

TOKENS, FEATURES, ROWS = 64, 12, 5


def shifted_inputs(seed: int = 0) -> torch.Tensor:
    """Features with means as large as their deviations."""
    return inputs(TOKENS, FEATURES, seed=seed) + 2 * normal(FEATURES, seed=seed + 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": torch.arange(12)[:, None] // 2}, "exactly one channel"),
        ({"columns": torch.arange(11)[:, None]}, "exactly one channel"),
        ({"keep": 0}, "cannot be kept"),
        ({"keep": 13}, "cannot be kept"),
        ({"intercept": True}, "needs the means"),
        ({"weight": torch.zeros(5, 11)}, "do not fit"),
        ({"means": means_of(torch.ones(3, 12), None, torch.ones(5, 12))}, "tokens"),
        (
            {"means": means_of(*2 * [torch.ones(TOKENS, 12)], torch.ones(5, 12))},
            "drift",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    fields = {
        "weight": normal(ROWS, FEATURES),
        "statistics": gram_statistics(inputs(TOKENS, FEATURES)),
        "columns": torch.arange(FEATURES)[:, None],
        "keep": 6,
    }
    ChannelProblem(**fields)
    with pytest.raises(ValueError, match=message):
        ChannelProblem(**{**fields, **changes})


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(
    "restorer", [KeptWeights(), LeastSquares(), BiasCompensation()], ids=named
)
def test_errors_are_those_of_the_tokens(restorer, intercept, drift):
    weight, pruned = normal(ROWS, FEATURES), shifted_inputs()
    dense = pruned + 0.1 * shifted_inputs(seed=7) if drift else None
    problem = channel_problem(weight, pruned, 4, dense=dense, size=2)
    problem = ChannelProblem(**{**vars(problem), "intercept": intercept})
    if isinstance(restorer, BiasCompensation) and not intercept:
        with pytest.raises(ValueError, match="no bias"):
            prune_channels(problem, FASPScore(), restorer)
        return
    result = prune_channels(problem, FASPScore(), restorer)
    assert (result.bias is None) == (not intercept or restorer == KeptWeights())
    wide = problem.widened(result.weight, result.kept)
    outputs = pruned if dense is None else dense
    residual = pruned.double() @ wide.double().T - outputs.double() @ weight.double().T
    if result.bias is not None:
        residual += result.bias.double()
    assert result.error == pytest.approx(float(residual.norm()), rel=1e-4)
    norm = true_error(torch.zeros_like(weight), weight, pruned, dense)
    assert result.relative_error == pytest.approx(result.error / norm, rel=1e-5)


def test_a_bias_that_is_not_the_best_costs_what_it_is_off_by():
    weight, pruned = normal(ROWS, FEATURES), shifted_inputs()
    problem = channel_problem(weight, pruned, 4, intercept=True)
    candidate = torch.zeros_like(weight)
    bias = problem.best_bias(candidate) + 0.5
    expected = (bias.double() - pruned.double() @ weight.double().T).norm()
    assert problem.error(candidate, bias) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("lone", [False, True], ids=["features", "outputs"])
def test_centred_statistics_are_those_of_centred_tokens(lone):
    weight, pruned = normal(ROWS, FEATURES), shifted_inputs()
    dense = pruned + 0.1 * shifted_inputs(seed=7)
    statistics = GramStatistics.empty(FEATURES, weights=[weight] if lone else [])
    statistics.accumulate(pruned, dense)
    centred = means_of(pruned, dense, weight).centred(weight, statistics)
    expected = gram_statistics(pruned - pruned.mean(0), dense - dense.mean(0))
    slack = 10 * TOKENS * FLOAT32 * statistics.gram.max()
    assert (centred.gram - expected.gram).abs().max() < slack
    cross, power = centred.drift.of(weight)
    expected_cross, expected_power = expected.drift.of(weight)
    assert (cross - expected_cross).abs().max() < slack * weight.norm()
    assert power == pytest.approx(expected_power, rel=1e-4)


def test_a_constant_feature_is_dead_once_centred():
    pruned = shifted_inputs()
    pruned[:, 3] = 0.1
    weight = normal(ROWS, FEATURES)
    problem = channel_problem(weight, pruned, 4, intercept=True)
    assert problem.fitted.dead.nonzero().flatten().tolist() == [3]
    assert not problem.fitted.gram[3].any()
    assert not problem.statistics.dead.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_is_that_of_the_weight_as_stored(dtype):
    weight, pruned = normal(ROWS, FEATURES).to(dtype), inputs(TOKENS, FEATURES)
    problem = channel_problem(weight, pruned, 11)
    result = prune_channels(problem, FASPScore(), LeastSquares())
    assert result.weight.dtype == dtype
    wide = problem.widened(result.weight, result.kept)
    expected = true_error(wide, weight, pruned)
    assert result.error == pytest.approx(expected, rel=1e-4)


def test_columns_stay_in_order():
    weight, pruned = normal(ROWS, FEATURES), inputs(TOKENS, FEATURES)
    problem = channel_problem(weight, pruned, 4, size=2)
    result = prune_channels(problem, lambda _: torch.tensor([1, 4]), KeptWeights())
    assert torch.equal(result.weight, weight[:, [1, 4, 7, 10]])


@pytest.mark.parametrize("selector", SELECTORS, ids=named)
@pytest.mark.parametrize("tokens", ["none", "silent"])
def test_without_data_weights_stay(selector, tokens):
    """Nothing is known, so nothing may be changed, and nothing is divided by zero."""
    weight = normal(ROWS, FEATURES)
    pruned = torch.zeros(0 if tokens == "none" else 5, FEATURES)
    statistics = gram_statistics(pruned)
    means = means_of(torch.zeros(1, FEATURES), None, weight)
    means = type(means)(means.means, statistics.tokens)
    columns = torch.arange(FEATURES)[:, None]
    problem = ChannelProblem(weight, statistics, columns, 5, means)
    result = prune_channels(problem, selector, LeastSquares())
    assert len(result.kept) == 5
    assert torch.allclose(result.weight, weight[:, result.kept])
    assert result.error == result.relative_error == 0


@pytest.mark.parametrize("selector", SELECTORS, ids=named)
@pytest.mark.parametrize("power", [-20, 20])
def test_the_scale_of_the_data_changes_nothing(selector, power):
    weight, pruned = redundant_mlp(16, 128)
    problem = channel_problem(weight, pruned, 9)
    scaled = channel_problem(weight * 2.0**-power, pruned * 2.0**power, 9)
    result = prune_channels(problem, selector, LeastSquares())
    other = prune_channels(scaled, selector, LeastSquares())
    assert torch.equal(other.kept, result.kept)
    assert other.relative_error == pytest.approx(result.relative_error, rel=1e-4)


@pytest.mark.parametrize("selector", SELECTORS, ids=named)
def test_columns_that_are_copies_make_a_group_that_is_one_column(selector):
    """
    Two copies with half the weight each: ‖W/2 − V/2‖² twice is half of ‖W − V‖², so the
    damping is half as strong.
    """
    weight, pruned = redundant_mlp(12, 128)
    halves, copies = weight.repeat(1, 2) / 2, pruned.repeat(1, 2)
    single = channel_problem(weight, pruned, 7)
    double = channel_problem(halves, copies, 7, size=2)
    if hasattr(selector, "dampening_frac"):
        other = type(selector)(dampening_frac=2 * selector.dampening_frac)
    else:
        other = selector
    result = prune_channels(single, selector, LeastSquares(0.1))
    grouped = prune_channels(double, other, LeastSquares(0.2))
    assert torch.equal(result.kept, grouped.kept)
    first, second = grouped.weight.split(7, dim=1)
    assert torch.allclose(first, second, atol=1e-4)
    assert torch.allclose(first + second, result.weight, atol=1e-3)
    assert math.isclose(grouped.error, result.error, rel_tol=1e-4)


@pytest.mark.parametrize("selector", SELECTORS, ids=named)
def test_channels_may_be_in_any_order(selector):
    weight, pruned = redundant_mlp(12, 128)
    problem = channel_problem(weight, pruned, 4, size=2)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = ChannelProblem(**{**vars(problem), "columns": problem.columns[order]})
    assert set(order[selector(shuffled)].tolist()) == set(selector(problem).tolist())


@pytest.mark.parametrize("selector", SELECTORS, ids=named)
@pytest.mark.parametrize("keep", [1, 6])
def test_one_channel_or_all_may_be_kept(selector, keep):
    weight, pruned = redundant_mlp(6, 64)
    result = prune_channels(
        channel_problem(weight, pruned, keep), selector, LeastSquares()
    )
    assert len(result.kept) == keep
    assert keep < 6 or result.relative_error < 1e-4
