import pytest
import torch
from problems import FLOAT32, gram_statistics, inputs, normal, true_error

from fista_modifier.solver import GramStatistics, blocks
from fista_modifier.solver.drift import FeatureDrift, OutputDrift
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.quadratic import Quadratic

TOKENS, FEATURES, ROWS = 96, 24, 8


def close(actual: torch.Tensor | None, expected: torch.Tensor, tokens: int) -> bool:
    """Within what summing ``tokens`` float32 products of that size may be off."""
    assert actual is not None
    scale = expected.diagonal().abs().max() if expected.ndim == 2 else expected
    difference = (actual.double() - expected).abs().max()
    return bool(difference <= tokens * FLOAT32 * scale)


def test_gram_matrices_are_those_of_the_tokens():
    pruned, dense = inputs(TOKENS, FEATURES), inputs(TOKENS, FEATURES, seed=5)
    statistics = gram_statistics(pruned, dense)
    drift = (pruned - dense).double()
    assert close(statistics.gram, pruned.double().T @ pruned.double(), TOKENS)
    assert close(statistics.drift.cross, drift.T @ pruned.double(), TOKENS)
    assert close(statistics.drift.gram, drift.T @ drift, TOKENS)
    assert statistics.tokens == TOKENS
    assert statistics.features == FEATURES


@pytest.mark.parametrize("candidate", ["half", "zero", "dense"])
@pytest.mark.parametrize("drift", [None, 1.0, 1e-2])
def test_error_is_that_of_the_outputs(candidate, drift):
    weight, pruned = normal(ROWS, FEATURES), inputs(TOKENS, FEATURES)
    dense = None if drift is None else pruned + drift * inputs(TOKENS, FEATURES, seed=5)
    objective = LayerObjective(weight, Quadratic(gram_statistics(pruned, dense)))
    mask = {"half": weight.abs() > 0.7, "zero": False, "dense": True}[candidate]
    other = torch.where(torch.as_tensor(mask), weight, 0)
    expected = true_error(other, weight, pruned, dense)
    assert objective.error(other) == pytest.approx(expected, rel=TOKENS * FLOAT32)
    output = true_error(torch.zeros_like(weight), weight, pruned, dense)
    assert objective.output_norm == pytest.approx(output, rel=TOKENS * FLOAT32)


def test_the_error_of_a_tiny_drift_does_not_cancel():
    """
    With V = W only ‖W Δ‖ is left, here 1e-5 of ‖W X‖: its square is below the rounding
    of the float32 squares of the outputs, of which the naive formula is a difference.
    """
    weight, dense = normal(ROWS, FEATURES), inputs(TOKENS, FEATURES)
    pruned = dense + 1e-5 * inputs(TOKENS, FEATURES, seed=5)
    objective = LayerObjective(weight, Quadratic(gram_statistics(pruned, dense)))
    expected = true_error(weight, weight, pruned, dense)

    def square(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((weight @ (one.T @ other) * weight).sum())

    naive = square(pruned, pruned) - 2 * square(dense, pruned) + square(dense, dense)
    assert abs(naive - expected**2) > expected**2
    assert objective.error(weight) == pytest.approx(expected, rel=TOKENS * FLOAT32)


def test_the_gradient_is_that_of_half_the_squared_error():
    weight, pruned = normal(ROWS, FEATURES), inputs(TOKENS, FEATURES)
    dense = inputs(TOKENS, FEATURES, seed=5)
    candidate = normal(ROWS, FEATURES, seed=9)
    objective = LayerObjective(weight, Quadratic(gram_statistics(pruned, dense)))
    variable = candidate.double().requires_grad_()
    output = variable @ pruned.double().T - weight.double() @ dense.double().T
    (expected,) = torch.autograd.grad(output.square().sum() / 2, variable)
    gradient = objective.gradient(candidate).double()
    assert (gradient - expected).norm() <= TOKENS * FLOAT32 * expected.norm()


@pytest.mark.parametrize("split", [[96], [1, 95], [32, 32, 32], [1] * 96])
def test_batches_may_be_split_anyhow(split):
    pruned, dense = inputs(TOKENS, FEATURES), inputs(TOKENS, FEATURES, seed=5)
    whole = gram_statistics(pruned, dense)
    parts = GramStatistics.empty(FEATURES)
    for one, other in zip(pruned.split(split), dense.split(split), strict=True):
        parts.accumulate(one, other)
    assert parts.tokens == whole.tokens
    assert close(parts.gram, whole.gram.double(), TOKENS)
    assert close(parts.drift.gram, whole.drift.gram.double(), TOKENS)
    assert close(parts.drift.cross, whole.drift.cross.double(), TOKENS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    """Sums in bfloat16 stop growing after 256 equal terms, in float16 after 2048."""
    tokens = 8192
    pruned = inputs(tokens, 4).to(dtype)
    dense = (pruned.float() + 0.1 * inputs(tokens, 4, seed=5)).to(dtype)
    statistics = gram_statistics(pruned, dense)
    assert statistics.gram.dtype == torch.float32
    exact = pruned.double()
    drift = exact - dense.double()
    # rounding errors of so many sums are independent: they grow as the square root
    steps = int(tokens**0.5)
    assert close(statistics.gram, exact.T @ exact, steps)
    assert close(statistics.drift.gram, drift.T @ drift, steps)


def test_a_feature_that_no_token_excites_is_dead():
    pruned = inputs(TOKENS, FEATURES)
    pruned[:, [3, 7]] = 0
    dead = gram_statistics(pruned).dead
    assert dead.nonzero().flatten().tolist() == [3, 7]
    assert bool(GramStatistics.empty(FEATURES).dead.all())


def test_typical_power_is_the_geometric_mean_over_features_with_power():
    pruned = torch.diag(torch.tensor([1.0, 2.0, 0.0, 16.0]))
    assert gram_statistics(pruned).typical_power == pytest.approx(1024 ** (1 / 3))
    assert GramStatistics.empty(FEATURES).typical_power == 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("where", ["pruned", "dense"])
def test_broken_activations_are_not_finite(broken, where):
    pruned, dense = inputs(TOKENS, FEATURES), inputs(TOKENS, FEATURES, seed=5)
    assert gram_statistics(pruned, dense).is_finite()
    {"pruned": pruned, "dense": dense}[where][5, 2] = broken
    assert not gram_statistics(pruned, dense).is_finite()


@pytest.mark.parametrize("block", [5, FEATURES])
def test_a_product_in_blocks_is_the_product(block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    left, matrix = inputs(TOKENS, FEATURES), inputs(FEATURES, FEATURES, seed=5)
    difference = blocks.product(left, matrix) - left @ matrix
    assert difference.abs().max() <= FEATURES * FLOAT32 * matrix.abs().max() * 4


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_single_narrow_operators_drift_is_summed_in_its_outputs(scaled, recorded):
    weight = normal(ROWS, FEATURES)
    assert ROWS < FEATURES
    pruned, dense = inputs(TOKENS, FEATURES), inputs(TOKENS, FEATURES, seed=5)
    narrow = GramStatistics.empty(FEATURES, weights=[weight])
    for one, other in zip(pruned.split(7), dense.split(7), strict=True):
        if recorded:
            narrow.accumulate(one, outputs=other @ weight.T)
        else:
            narrow.accumulate(one, other)
    assert isinstance(narrow.drift, OutputDrift)
    any_weight = gram_statistics(pruned, dense)
    assert isinstance(any_weight.drift, FeatureDrift)
    scale = torch.linspace(0.5, 2, FEATURES) if scaled else torch.ones(FEATURES)
    candidate = torch.where(weight.abs() > 0.7, weight, 0) * scale
    of_narrow, of_any = (
        LayerObjective(weight * scale, Quadratic(statistics.scaled(scale)))
        for statistics in (narrow, any_weight)
    )
    tolerance = TOKENS * FLOAT32
    assert of_narrow.error(candidate) == pytest.approx(
        of_any.error(candidate), rel=tolerance
    )
    gradient = of_any.gradient(candidate)
    difference = of_narrow.gradient(candidate) - gradient
    assert difference.norm() <= tolerance * gradient.norm()
