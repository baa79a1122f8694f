"""The training of what was kept, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, tiny_model
from problems import normal
from runs import LENGTH, calibration, prune, samples, weights
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.calibration.padding import RealTokens
from fista_modifier.calibration.recording import Recorded, Recording
from fista_modifier.models.operators import Operator, replaced_weights
from fista_modifier.pruning import reconstruction
from fista_modifier.pruning.kept_weights import KeptWeights, Watch
from fista_modifier.pruning.layer_error import _token_errors
from fista_modifier.pruning.reconstruction import (
    MOST_RATES,
    Reconstruction,
    reconstruct,
)

BATCHES = 64  # of one sequence each
SEQUENCES = samples(BATCHES, 48, seed=1)
TRAINED: dict[str, Any] = {
    "reconstruction_epochs": 2,
    "reconstruction_rate": 2e-3,  # batches of 48 random tokens are noisy
    "oneshot_arguments": {"dataset": calibration(SEQUENCES)},
}


class Layer(torch.nn.Module):
    """One operator with a bias, as a decoder layer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 5, dtype=dtype)
        self.linear.weight.data = normal(5, 8).to(dtype)
        self.linear.bias.data = normal(5, seed=1).to(dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear(hidden_states)


def recorded(layer: Layer, batches: list[Tensor]) -> tuple[Recording, Operator]:
    operator = Operator("linear", layer.linear)
    recording = Recording(layer, [operator], Recorded(outputs=True))
    for batch in batches:
        recording.inputs.append((batch,), {})
        recording.real_tokens.append(RealTokens())
        recording.outputs.append(layer(batch).detach())
    return recording, operator


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """As in the toolkit's calibration."""
    with torch.no_grad():
        yield


def inverse_sizes(outputs: Tensor) -> Tensor:
    """What features are multiplied by, from the outputs of all tokens."""
    squares = outputs.flatten(0, -2).square()
    return (squares / squares.sum(1, keepdim=True)).mean(0).rsqrt()


def test_one_operator_ends_at_weighted_least_squares_on_its_support():
    layer, mixed = Layer(), normal(8, 8, seed=3)
    # tokens of very different sizes, so that the weights of the sum matter
    sizes = torch.logspace(-1, 1, 64)[:, None]
    batches = [normal(1, 64, 8, seed=seed) @ mixed * sizes for seed in range(2)]
    recording, operator = recorded(layer, batches)
    support = normal(5, 8, seed=7) > 0
    pruned = {operator: layer.linear.weight.data * support}
    trained, result = reconstruct(
        recording, recording.inputs, pruned, Reconstruction(epochs=4000, rate=0.1)
    )
    target = torch.cat([output[0] for output in recording.outputs])
    inputs = torch.cat([batch[0] for batch in batches])
    by_size = inverse_sizes(target)
    scale = 1 / (target * by_size).norm(dim=1)
    for row in range(5):
        free = support[row]
        wanted = target[:, row] - layer.linear.bias[row]
        matrix = (inputs * scale[:, None])[:, free].double()
        expected = torch.linalg.lstsq(matrix, (wanted * scale).double()).solution
        actual = trained[operator][row, free].double()
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert bool((trained[operator][~support] == 0).all())

    first = inputs[:64] @ layer.linear.weight.T  # without the bias, of both
    errors = inputs[:64] @ trained[operator].T - first
    relative = (errors * by_size).norm(dim=1) * scale[:64]
    assert math.isclose(result.error, relative.square().mean().sqrt(), rel_tol=1e-5)
    share = float(errors.norm() / first.norm())
    assert math.isclose(result.operator_errors["linear"], share, rel_tol=1e-5)
    assert result.error < result.start_error


def test_features_of_all_sizes_have_the_same_say_and_one_of_zeros_has_none():
    """One operator serves all features, so its least squares are a compromise."""
    mixed = torch.zeros(5, 6)
    mixed[:, 1:] = torch.linalg.qr(normal(5, 5, seed=4)).Q
    mixed[:, 1] *= 1000

    class Mixed(Layer):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) @ mixed

    layer, batch = Mixed(), normal(1, 64, 8, seed=1)
    recording, operator = recorded(layer, [batch])
    support = normal(5, 8, seed=7) > 0
    dense = layer.linear.weight.data.clone()
    trained, _ = reconstruct(
        recording,
        recording.inputs,
        {operator: dense * support},
        Reconstruction(epochs=4000, rate=0.1),
    )
    target = recording.outputs[0][0]
    by_size = inverse_sizes(target)
    by_size[0] = 0
    scale = 1 / (target * by_size).norm(dim=1)
    # the change of each output by each weight: tokens × features, rows × columns
    effects = torch.einsum("ti,of,t,f->tfoi", batch[0], mixed, scale, by_size)
    effects = effects.flatten(2).flatten(0, 1).double()
    free = support.flatten()
    wanted = effects @ dense.flatten().double()
    expected = torch.linalg.lstsq(effects[:, free], wanted).solution
    actual = trained[operator].flatten()[free].double()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_a_gradient_from_before_changes_nothing():
    results = []
    for before in (None, torch.full((5, 8), 100.0)):
        layer = Layer()
        recording, operator = recorded(layer, [normal(1, 16, 8, seed=2)])
        layer.linear.weight.grad = before
        pruned = {operator: layer.linear.weight.data * (normal(5, 8, seed=7) > 0)}
        options = Reconstruction(epochs=3)
        trained, _ = reconstruct(recording, recording.inputs, pruned, options)
        results.append(trained[operator])
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_that_does_not_pay_is_undone(dtype):
    layer = Layer(dtype)
    batches = [normal(1, 16, 8, seed=seed).to(dtype) for seed in range(4)]
    recording, operator = recorded(layer, batches)
    pruned = {operator: layer.linear.weight.data * (normal(5, 8, seed=7) > 0)}
    before = pruned[operator].clone()
    trained, result = reconstruct(
        recording, recording.inputs, pruned, Reconstruction(epochs=5, rate=1e4)
    )
    assert torch.equal(trained[operator], before)
    assert result.steps == 0
    assert result.error == result.start_error


def test_a_rate_that_is_too_high_is_halved_until_it_is_not():
    """Close to the least error, large steps only add noise."""
    mixed = normal(8, 8, seed=3)
    batches = [normal(1, 64, 8, seed=seed) @ mixed for seed in range(64)]
    support = normal(5, 8, seed=7) > 0

    def trained(rate: float, start: Tensor | None = None) -> tuple[Any, Any, int]:
        layer = Layer()
        recording, operator = recorded(layer, batches)
        start = layer.linear.weight.data * support if start is None else start
        calls: list[None] = []
        weights, result = reconstruct(
            recording,
            recording.inputs,
            {operator: start.clone()},
            Reconstruction(epochs=1, rate=rate),
            lambda: calls.append(None),
        )
        return weights[operator], result, len(calls)

    good, result, steps = trained(0.64)  # from far away large steps are right
    assert (result.rate, result.steps, steps) == (0.64, 64, 64)
    _, result, steps = trained(0.01, good)
    assert (result.rate, steps) == (0.01, 64)
    found, result, steps = trained(0.64, good)
    assert result.rate < 0.64 and result.error <= result.start_error
    halvings = round(math.log2(0.64 / result.rate))
    assert result.rate == 0.64 / 2**halvings
    assert 64 + 8 * halvings <= steps <= 64 + 32 * halvings
    # each rate sees every batch, in the same order
    assert torch.equal(found, trained(result.rate, good)[0])
    kept, result, _ = trained(1000, good)
    assert (result.rate, result.steps) == (1000 / 2 ** (MOST_RATES - 1), 0)
    assert torch.equal(kept, good)


def test_a_step_has_as_many_tokens_however_they_are_batched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sequences = torch.cat([normal(1, 64, 8, seed=seed) for seed in range(8)])

    def trained(batch_size: int, tokens: int = 16) -> tuple[Tensor, Any, int]:
        layer = Layer()
        recording, operator = recorded(layer, list(sequences.split(batch_size)))
        start = layer.linear.weight.data * (normal(5, 8, seed=7) > 0)
        calls: list[None] = []
        monkeypatch.setattr(reconstruction, "STEP_TOKENS", tokens)
        weights, result = reconstruct(
            recording,
            recording.inputs,
            {operator: start},
            Reconstruction(epochs=2),
            lambda: calls.append(None),
        )
        assert torch.equal(layer.linear.weight.data, Layer().linear.weight.data)
        return weights[operator], result, len(calls)

    alone, result, steps = trained(1)
    assert result.steps == steps == 2 * 8 * 4
    assert result.error < result.start_error
    for batch_size in (2, 8):
        together, result, steps = trained(batch_size)
        assert result.steps == steps == 2 * 8 * 4
        assert torch.allclose(together, alone, rtol=1e-4, atol=1e-6)
    for tokens, expected in ((64, 8), (128, 4), (1024, 1)):
        assert trained(8, tokens)[1].steps == 2 * expected


def test_an_expert_takes_a_step_for_each_batch_with_tokens_for_it() -> None:
    """Momentum must not move it on the others, which the toolkit runs it on, too."""
    expert = Operator("expert", torch.nn.Linear(8, 5, bias=False))
    before = expert.weight.clone()
    batches = [torch.zeros(0, 8)] * 40
    batches[3] = normal(16, 8)

    def descend(batch: int) -> Tensor:
        with torch.enable_grad():
            loss = expert.module(batches[batch]).square().sum()
            loss.backward()
        return loss.detach()

    weights = {expert: before.clone()}
    with replaced_weights(weights):
        trained = KeptWeights(weights, rate=0.1, steps=40)
        trained.train(descend, range(40), Watch(lambda _: torch.tensor(math.inf), 40))
    warm_up, decay = 4 / 10, (1 + math.cos(math.pi * 3 / 40)) / 2
    step = 0.1 * warm_up * decay * float(before.abs().mean())
    moved = (weights[expert] - before).abs()
    assert moved == pytest.approx(torch.full_like(moved, step), rel=1e-3)


def test_small_steps_are_not_lost_in_a_coarse_dtype():
    """Each is far below half a unit in the last place of a bfloat16 weight."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer = Layer(dtype)
        batches = [normal(1, 64, 8, seed=seed).to(dtype) for seed in range(2)]
        recording, operator = recorded(layer, batches)
        pruned = {operator: layer.linear.weight.data * (normal(5, 8, seed=7) > 0)}
        options = Reconstruction(epochs=2000, rate=1e-3)
        _, results[dtype] = reconstruct(recording, recording.inputs, pruned, options)
    exact, coarse = results.values()
    gained = exact.start_error - exact.error
    assert gained > 0
    assert abs(coarse.error - exact.error) < 0.1 * gained


def outputs(model: PreTrainedModel, layer: int, sequences: Tensor) -> Tensor:
    """What a decoder layer returns, sequences×tokens×features."""
    model.set_attn_implementation("eager")  # others leave out Gemma 2's soft caps
    states = model(
        input_ids=sequences, use_cache=False, output_hidden_states=True
    ).hidden_states
    return states[layer + 1]


@pytest.mark.parametrize(
    ("family", "parts"),
    [(family, 1) for family in FAMILIES]
    + [(family, 3) for family in ("llama", "gemma2", "gpt2")],
)
def test_the_first_layers_errors_are_those_of_plain_runs(
    family: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on every sixteenth batch; the first layer's input is dense."""
    if parts > 1:
        length = SEQUENCES.shape[1] // parts
        monkeypatch.setattr(reconstruction, "STEP_TOKENS", length)
    dense, start, trained = (tiny_model(family) for _ in range(3))
    prune(start, **TRAINED | {"reconstruction_epochs": 0})
    modifier = prune(trained, **TRAINED)
    name = f"{FAMILIES[family].layers}.0"
    result = modifier.reconstructions[name]
    measured = SEQUENCES[::16]
    target = outputs(dense, 0, measured)
    by_size = inverse_sizes(outputs(dense, 0, SEQUENCES))

    def error(model: PreTrainedModel) -> float:
        errors = ((outputs(model, 0, measured) - target) * by_size).norm(dim=-1)
        return float((errors / (target * by_size).norm(dim=-1)).square().mean().sqrt())

    assert math.isclose(result.start_error, error(start), rel_tol=1e-3)
    assert math.isclose(result.error, error(trained), rel_tol=1e-3)
    assert result.error < result.start_error
    assert result.steps == 2 * BATCHES * parts
    assert modifier.reconstructions.keys() == {
        f"{FAMILIES[family].layers}.{layer}" for layer in range(2)
    }
    # nothing but the kept weights has changed, and gradients are as they were
    for name, weight in weights(trained).items():
        assert torch.equal(weight == 0, weights(start)[name] == 0), name
    assert all(weight.requires_grad for weight in trained.parameters())
    assert all(weight.grad is None for weight in trained.parameters())


def test_every_operator_has_its_error_as_stored():
    modifier = prune(tiny_model("llama"), **TRAINED)
    for result in modifier.results:
        assert result.reconstructed_error is not None
        assert 0 < result.reconstructed_error < 1
    untrained = prune(tiny_model("llama"), reconstruction_epochs=0)
    assert not untrained.reconstructions
    assert all(result.reconstructed_error is None for result in untrained.results)


def test_padding_is_not_trained_on():
    sequences = [sequence[: 5 + i] for i, sequence in enumerate(samples())]
    data = Dataset.from_dict({"input_ids": [s.tolist() for s in sequences]})

    def padded(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        [feature] = features
        ids = feature["input_ids"]
        padding = LENGTH - len(ids)
        return {
            "input_ids": torch.tensor([ids + [0] * padding]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * padding]),
        }

    with_padding, without = tiny_model("llama"), tiny_model("llama")
    arguments = {"dataset": data}
    prune(without, **TRAINED | {"oneshot_arguments": arguments})
    arguments = {"dataset": data, "data_collator": padded}
    prune(with_padding, **TRAINED | {"oneshot_arguments": arguments})
    expected = weights(without)
    for name, weight in weights(with_padding).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-2, atol=1e-3)


def test_a_fraction_of_an_epoch_is_that_many_steps():
    modifier = prune(tiny_model("llama"), **TRAINED | {"reconstruction_epochs": 0.51})
    assert [result.steps for result in modifier.reconstructions.values()] == [33, 33]


@pytest.mark.parametrize("shape", [(2, 5, 8), (3, 2, 5, 8), (10, 8)])
def test_errors_are_those_of_real_tokens_in_each_layout(shape):
    real = torch.tensor([[False, True, True, True, True], [True] * 5])
    target = torch.ones(shape)
    output = target.clone()
    row = (0,) * (len(shape) - 1)
    output[row] = torch.nan  # which is padding
    errors = _token_errors(output, target, real, torch.ones(8))
    copies = target[..., 0].numel() // real.numel()
    # of several hidden states of a token each counts, and only one of them is broken
    assert int(errors.isnan().sum()) == 0
    assert len(errors) == copies * 9
