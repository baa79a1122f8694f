import pytest
import torch
from problems import inputs, normal
from torch import Tensor

from fista_modifier.structured import (
    Alternation,
    MLPBatch,
    down_given_up,
    mlp_error,
    up_given_down,
)

TOKENS, WIDTH, CHANNELS, ROWS = 96, 4, 6, 5


def tokens_of(gated: bool) -> tuple[MLPBatch, Tensor, Tensor]:
    """An MLP that lacks four of ten channels: all tokens, U and D"""
    features = inputs(TOKENS, WIDTH)
    gates = torch.sigmoid(features @ normal(10, WIDTH, seed=2).T)
    up, down = normal(10, WIDTH, seed=3), normal(ROWS, 10, seed=4)
    hidden = features @ up.T * (gates if gated else 1)
    batch = MLPBatch(features, gates[:, :CHANNELS] if gated else None, hidden @ down.T)
    return batch, up[:CHANNELS], down[:, :CHANNELS]


def split(batch: MLPBatch, sizes: list[int]) -> list[MLPBatch]:
    parts = [
        [None] * len(sizes) if whole is None else whole.split(sizes) for whole in batch
    ]
    return [MLPBatch(*fields) for fields in zip(*parts, strict=True)]


def vectorised(batch: MLPBatch, down: Tensor) -> Tensor:
    """The matrix of vec(U) ↦ vec of the outputs, (tokens·m)×(c·d)"""
    gates = torch.ones(TOKENS, CHANNELS)
    gates = gates if batch.activations is None else batch.activations
    matrix = torch.einsum("oc,tc,td->tocd", down, gates, batch.inputs)
    return matrix.reshape(TOKENS * ROWS, -1).double()


def out(batch: MLPBatch, up: Tensor, down: Tensor) -> Tensor:
    hidden = batch.inputs.double() @ up.double().T
    if batch.activations is not None:
        hidden = hidden * batch.activations.double()
    return hidden @ down.double().T


@pytest.mark.parametrize("gated", [True, False])
def test_the_up_step_is_least_squares_of_the_vectorised_problem(gated):
    batch, up, down = tokens_of(gated)
    found = up_given_down(
        split(batch, [40, 50, 6]), up, down, dampening_frac=0, iterations=100
    )
    right = batch.outputs.double().flatten()
    expected = torch.linalg.lstsq(vectorised(batch, down), right, driver="gelsd")
    best = expected.solution.view(CHANNELS, WIDTH)
    least = float((out(batch, best, down) - batch.outputs).norm())
    error = float((out(batch, found, down) - batch.outputs).norm())
    # without gates the outputs can be had exactly
    slack = 1e-5 * float(batch.outputs.norm())
    assert error == pytest.approx(least, rel=1e-4, abs=slack)
    assert error < 0.9 * mlp_error([batch], up, down)
    if gated:  # without gates, 6 channels put out 5 values: U is not unique
        assert torch.allclose(found.double(), best, atol=1e-2)


def test_the_damped_up_step_is_least_squares_with_more_rows():
    batch, up, down = tokens_of(True)
    matrix = vectorised(batch, down)
    diagonal = matrix.square().sum(0)
    ridge = 0.3 * diagonal.log().mean().exp()
    left = torch.cat([matrix, ridge.sqrt() * torch.eye(CHANNELS * WIDTH)])
    right = batch.outputs.double().flatten()
    right = torch.cat([right, ridge.sqrt() * up.double().flatten()])
    expected = torch.linalg.lstsq(left, right).solution.view(CHANNELS, WIDTH)
    found = up_given_down([batch], up, down, dampening_frac=0.3, iterations=100)
    assert torch.allclose(found.double(), expected, atol=1e-4)


@pytest.mark.parametrize("gated", [True, False])
def test_the_down_step_is_least_squares(gated):
    batch, up, down = tokens_of(gated)
    hidden = batch.hidden(up).double()
    if not gated:  # six channels of four inputs need damping to be determined
        gram = hidden.T @ hidden
        ridge = 0.2 * gram.diagonal().log().mean().exp()
    else:
        ridge = torch.zeros((), dtype=torch.float64)
    left = torch.cat([hidden, ridge.sqrt() * torch.eye(CHANNELS)])
    right = torch.cat([batch.outputs.double(), ridge.sqrt() * down.T])
    expected = torch.linalg.lstsq(left, right).solution.T
    found = down_given_up(
        split(batch, [90, 6]), up, down, dampening_frac=0 if gated else 0.2
    ).weight
    assert torch.allclose(found.double(), expected, atol=1e-2)


@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_no_step_raises_the_error(iterations):
    batch, up, down = tokens_of(True)
    result = Alternation(rounds=4, iterations=iterations)([batch], up, down)
    errors = result.errors
    assert len(errors) == 9
    assert all(b <= a * (1 + 1e-5) for a, b in zip(errors, errors[1:], strict=False))
    assert errors[2] < 0.95 * errors[1]  # U is worth solving for
    error = float((out(batch, result.up, result.down) - batch.outputs).norm())
    assert errors[-1] == pytest.approx(error, rel=1e-4)


def test_batches_may_be_split_anyhow():
    batch, up, down = tokens_of(True)
    whole = Alternation()([batch], up, down)
    parts = Alternation()(split(batch, [1, 30, 65]), up, down)
    assert torch.allclose(whole.up, parts.up, atol=1e-3)
    assert torch.allclose(whole.down, parts.down, atol=1e-3)
    assert whole.errors == pytest.approx(parts.errors, rel=1e-4)


def test_an_up_projection_that_was_lost_is_found():
    batch, up, down = tokens_of(True)
    batch = batch._replace(outputs=batch.hidden(up) @ down.T)
    found = up_given_down(
        [batch], torch.zeros_like(up), down, dampening_frac=0, iterations=200
    )
    assert torch.allclose(found, up, atol=1e-2)


@pytest.mark.parametrize("silent", ["down", "inputs"])
def test_where_nothing_is_put_out_nothing_moves(silent):
    batch, up, down = tokens_of(True)
    if silent == "down":
        down = torch.zeros_like(down)
    else:
        batch = batch._replace(inputs=torch.zeros_like(batch.inputs))
    assert torch.equal(up_given_down([batch], up, down), up)


def test_half_precision_tokens_are_read_as_float32():
    batch, up, down = tokens_of(True)
    half = MLPBatch(*(part.bfloat16() for part in batch))
    exact = MLPBatch(*(part.float() for part in half))
    mine, other = Alternation()([half], up, down), Alternation()([exact], up, down)
    assert torch.allclose(mine.up, other.up, atol=1e-4)
    assert torch.allclose(mine.down, other.down, atol=1e-3)
