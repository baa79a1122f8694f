"""SPAP's alternating minimisation through ``oneshot()``: errors, ranks, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, tiny_model
from ranks import outputs, start
from runs import samples, weights
from test_structured import (
    assert_same,
    check_loads,
    decoder_layers,
    relative_errors,
    seen,
    shrink,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fista_modifier.models.experts import linearize
from fista_modifier.modifiers.structured import StructuredModifier
from fista_modifier.pruning.resume import FinishedLayers
from fista_modifier.structured import Alternation

PAPER = {"preset": "paper"}
LEAST_SQUARES = {"preset": "paper", "restorer": "least_squares"}
BIASES = {"mlp_bias": True}
"""The settings of a LLaMA whose MLP has biases."""


def errors_of(
    family: str, changes: dict[str, Any], **fields: Any
) -> tuple[PreTrainedModel, dict[str, float]]:
    """The model, and the error of each consumer in plain runs"""
    dense, small = tiny_model(family, **changes), tiny_model(family, **changes)
    linearize(dense)
    modifier = shrink(small, "spap", **fields)
    found = relative_errors(
        small, dense, family, [result.name for result in modifier.results]
    )
    for result in modifier.results:
        error, tokens = found[result.name]
        assert result.tokens == tokens
        assert result.relative_error == pytest.approx(error, rel=1e-3, abs=1e-5)
    return small, {name: error for name, (error, _) in found.items()}


@pytest.mark.parametrize("correction", ["none", "intra"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", BIASES), ("phi3", {}), ("mixtral", {})],
    ids=str,
)
def test_the_error_is_below_that_of_least_squares(
    family: str, changes: dict[str, Any], correction: str, tmp_path: Path
) -> None:
    how = {"error_correction": correction}
    small, found = errors_of(family, changes, **PAPER, **how)
    _, before = errors_of(family, changes, **LEAST_SQUARES, **how)
    assert found.keys() == before.keys()
    for name, error in found.items():
        assert error < 0.8 * before[name], name
    check_loads(small, tmp_path)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_an_activation_after_each_producer_leaves_least_squares(family: str) -> None:
    one, other = tiny_model(family), tiny_model(family)
    shrink(one, "spap", **PAPER)
    shrink(other, "spap", **LEAST_SQUARES)
    assert_same(weights(one), weights(other))


def test_fasp_as_published_has_least_squares() -> None:
    one, other = tiny_model("llama"), tiny_model("llama")
    shrink(one, "fasp", **PAPER)
    shrink(other, "fasp", **LEAST_SQUARES)
    assert_same(weights(one), weights(other))


def solved(left: Tensor, right: Tensor, start: Tensor, ridge: Tensor) -> Tensor:
    """The v of least ‖left v − right‖² + ridge ‖v − start‖²"""
    gram = left.T @ left + ridge * torch.eye(left.shape[1], dtype=left.dtype)
    return torch.linalg.solve(gram, left.T @ right + ridge * start)


def typical(powers: Tensor) -> Tensor:
    return powers.log().mean().exp()


@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases"])
def test_a_round_is_two_damped_least_squares_problems_over_all_tokens(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer's MLP, whose inputs are those of the dense model."""
    dense, before, small = (tiny_model("llama", **changes) for _ in range(3))
    shrink(before, "spap", **LEAST_SQUARES)
    long = Alternation(rounds=1, iterations=1000)
    monkeypatch.setattr(StructuredModifier, "_alternation", property(lambda _: long))
    shrink(small, "spap", **PAPER)
    names = [f"model.layers.0.mlp.{one}_proj" for one in ("gate", "up", "down")]
    inputs, put_out = seen(dense, names)
    mlp, first = small.model.layers[0].mlp, before.model.layers[0].mlp
    kept = [
        int((dense.get_submodule(names[0]).weight == row).all(1).nonzero())
        for row in mlp.gate_proj.weight
    ]
    x = inputs[names[0]].double()
    gates = torch.nn.functional.silu(put_out[names[0]][:, kept]).double()
    y = put_out[names[2]].double()
    up, down = first.up_proj.weight.double(), first.down_proj.weight.double()
    hidden = gates * (put_out[names[1]][:, kept]).double()
    centre, bias = hidden, torch.zeros(32, dtype=torch.double)
    right = y
    if changes:
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        up = torch.cat([up, first.up_proj.bias[:, None].double()], 1)
        centre, right = hidden - hidden.mean(0), y - y.mean(0)
    ridge = 0.15 * typical(centre.square().sum(0))
    down = solved(centre, right, down.T, ridge).T
    if changes:
        bias = y.mean(0) - hidden.mean(0) @ down.T
    matrix = torch.einsum("oc,tc,td->tocd", down, gates, x).flatten(2).flatten(0, 1)
    ridge = 1e-3 * typical(matrix.square().sum(0))
    up = solved(matrix, (y - bias).flatten(), up.flatten(), ridge).view(up.shape)
    expected = (gates * (x @ up.T)) @ down.T + bias
    found = mlp.down_proj(gates.float() * mlp.up_proj(inputs[names[0]]))
    error, least = (found - y).norm(), (expected - y).norm()
    assert float(error) == pytest.approx(float(least), rel=1e-3)
    assert float((found - expected).norm()) < 0.05 * float(least)


@pytest.mark.parametrize(
    ("family", "correction", "tolerance"),
    # experts with fewer tokens than inputs leave directions to rounding
    [("llama", "full", 1e-3), ("mixtral", "intra", 1e-2)],
)
def test_two_ranks_give_the_weights_of_one(
    family: str, correction: str, tolerance: float, tmp_path: Path
) -> None:
    fields = PAPER | {"distribute": "data", "error_correction": correction}
    settings = {"modifier": "SPAPPruningModifier", "sparsity": 0.2, "multiple_of": 4}
    processes = start(2, tmp_path, family, settings | fields)
    for process, output in zip(processes, outputs(processes), strict=True):
        assert process.returncode == 0, output
    alone = tiny_model(family)
    shrink(alone, "spap", **fields)
    (first, _), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(first, second)
    for name, value in weights(alone).items():
        difference = float((first[name] - value).norm() / value.norm())
        assert difference < tolerance, name


@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases"])
def test_an_interrupted_run_goes_on(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = PAPER | {"error_correction": "full"}
    whole, resumed = tiny_model("llama", **changes), tiny_model("llama", **changes)
    shrink(whole, "spap", **fields)
    save = FinishedLayers.save

    def save_one(self: FinishedLayers, *arguments: Any) -> None:
        if list(self.folder.glob("*.safetensors")):
            raise KeyboardInterrupt
        save(self, *arguments)

    folder = {"resume_dir": str(tmp_path)}
    monkeypatch.setattr(FinishedLayers, "save", save_one)
    with pytest.raises(KeyboardInterrupt):
        shrink(tiny_model("llama", **changes), "spap", **fields, **folder)
    monkeypatch.undo()
    shrink(resumed, "spap", **fields, **folder)
    assert_same(weights(resumed), weights(whole))


def test_a_resumed_run_has_the_same_restorer(tmp_path: Path) -> None:
    shrink(tiny_model("llama"), "spap", **PAPER, resume_dir=str(tmp_path))
    with pytest.raises(ValueError, match="restorer was None and is least_squares"):
        shrink(tiny_model("llama"), "spap", **LEAST_SQUARES, resume_dir=str(tmp_path))


def test_layers_on_disk_end_with_the_same_weights(tmp_path: Path) -> None:
    in_memory = tiny_model("llama")
    in_memory.save_pretrained(tmp_path / "dense")
    shrink(in_memory, "spap", **PAPER)
    layers = FAMILIES["llama"].layers
    places = {
        name: "cpu"
        for name, module in in_memory.named_modules()
        if not any(True for _ in module.children()) and not name.startswith(layers)
    }
    on_disk = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense",
        device_map=places | {layers: "disk"},
        offload_folder=tmp_path / "offloaded",
    )
    shrink(on_disk, "spap", **PAPER)
    on_disk.save_pretrained(tmp_path / "pruned")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert_same(weights(saved), weights(in_memory))


def test_recorded_activations_may_wait_on_a_disk(tmp_path: Path) -> None:
    one, other = tiny_model("mixtral"), tiny_model("mixtral")
    shrink(one, "spap", **PAPER)
    shrink(other, "spap", **PAPER, activations_dir=str(tmp_path))
    assert_same(weights(one), weights(other))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_half_precision(family: str) -> None:
    one, other = (tiny_model(family, torch.bfloat16) for _ in range(2))
    fields = {"error_correction": "none", "multiple_of": 8}
    found = shrink(one, "spap", **PAPER, **fields).results
    before = shrink(other, "spap", **LEAST_SQUARES, **fields).results
    assert all(value.dtype == torch.bfloat16 for value in one.parameters())
    for after, least in zip(found, before, strict=True):
        assert after.relative_error < 0.9 * least.relative_error


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_padding_counts_for_nothing(family: str) -> None:
    tokens = samples()
    longer = torch.cat([tokens, torch.zeros(len(tokens), 4, dtype=torch.long)], 1)
    padded = Dataset.from_dict(
        {"input_ids": longer.tolist(), "attention_mask": (longer > 0).int().tolist()}
    )
    plain, other = tiny_model(family), tiny_model(family)
    expected = shrink(plain, "spap", **PAPER)
    found = shrink(other, "spap", **PAPER, oneshot_arguments={"dataset": padded})
    # experts of fewer tokens than unknowns follow the rounding of their sums
    for one, before in zip(found.results, expected.results, strict=True):
        assert one.tokens == before.tokens
        assert one.relative_error == pytest.approx(before.relative_error, rel=1e-2)
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(other)[name], weight, rtol=1e-2, atol=1e-2)


def test_training_goes_on_from_there() -> None:
    small = tiny_model("llama")
    modifier = shrink(small, "spap", restorer="alternating")
    for outcome in modifier.reconstructions.values():
        assert outcome.error <= outcome.start_error
    assert len(decoder_layers(small, "llama")) == len(modifier.reconstructions)
