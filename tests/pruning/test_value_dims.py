"""Dimensions of values: zeros in place of rows of v and columns of o."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model
from logs import logged
from runs import run, weights
from safetensors.torch import load_file, save_file
from test_structured import (
    EXACT,
    HEADS,
    UNTRAINED,
    assert_same,
    check_loads,
    check_refused,
    logits,
    oriented,
    relative_errors,
    seen,
    shrink,
    size_of_layers,
)
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier import FASPPruningModifier, FISTAPruningModifier
from fista_modifier.checkpoint.verification import verify
from fista_modifier.cli.tables import removal_sentence
from fista_modifier.pruning.results import PruningReport

VALUES = {"structures": ["value_dims"], "sparsity": 0.1}
WIDTH = 32
PLACES = {
    "llama": ("self_attn.v_proj", 0, "self_attn.o_proj"),
    "qwen2": ("self_attn.v_proj", 0, "self_attn.o_proj"),
    "phi3": ("self_attn.qkv_proj", 48, "self_attn.o_proj"),
    "opt": ("self_attn.v_proj", 0, "self_attn.out_proj"),
    "gpt2": ("attn.c_attn", 64, "attn.c_proj"),
}
"""
The operator that has the rows of the values, the index of the first of these rows, and
the operator that reads the values, for each family.
"""
SIZE = 8
"""The number of dimensions of a head."""
FAMILIES_TESTED = ["llama", "qwen2", "phi3", "opt", "gpt2"]


def columns_of(family: str) -> Tensor:
    """The columns that each dimension of the values owns, by heads that share them"""
    shared = 1 if family in ("opt", "gpt2") else 2
    columns = torch.arange(WIDTH).view(-1, shared, SIZE)
    return columns.transpose(1, 2).reshape(-1, shared)


def names_of(family: str, layer: int = 0) -> tuple[str, str]:
    values, _, reader = PLACES[family]
    start = f"{FAMILIES[family].layers}.{layer}"
    return f"{start}.{values}", f"{start}.{reader}"


def zero_dimensions(model: PreTrainedModel, family: str, layer: int) -> Tensor:
    """Of the values, from the columns; rows and biases have to agree."""
    values, reader = names_of(family, layer)
    columns = columns_of(family)
    zero = (oriented(model, reader) == 0).all(0)[columns]
    assert torch.equal(zero.any(1), zero.all(1))
    first = PLACES[family][1]
    rows = slice(first, first + len(columns))
    zero = zero.all(1)
    assert torch.equal((oriented(model, values)[rows] == 0).all(1), zero)
    bias = model.get_submodule(values).bias
    assert bias is None or torch.equal(bias[rows] == 0, zero)
    return zero


@pytest.mark.parametrize("correction", ["none", "intra"])
@pytest.mark.parametrize("family", FAMILIES_TESTED)
def test_a_family_as_published(family: str, correction: str, tmp_path: Path) -> None:
    dense, model = tiny_model(family), tiny_model(family)
    modifier = shrink(model, **UNTRAINED, **VALUES, error_correction=correction)
    assert size_of_layers(model, family) == size_of_layers(dense, family)
    assert modifier.removed == 0
    zeros = 0
    for layer in range(2):
        gone = zero_dimensions(model, family, layer)
        values, reader = names_of(family, layer)
        each = columns_of(family).shape[1] * WIDTH + WIDTH
        each += dense.get_submodule(values).bias is not None
        zeros += int(gone.sum()) * each
        assert 0 < int(gone.sum()) < len(gone)
    assert modifier.zeroed == pytest.approx(zeros / size_of_layers(dense, family))
    assert modifier.zeroed == pytest.approx(0.1, abs=0.02)
    errors = relative_errors(
        model, dense, family, [one.name for one in modifier.results]
    )
    for result in modifier.results:
        error, tokens = errors[result.name]
        assert result.tokens == tokens
        assert result.relative_error == pytest.approx(error, rel=1e-3, abs=1e-5)
        assert result.relative_error < 0.95 * result.relative_start_error
    config = check_loads(model, tmp_path)
    assert "sparsity_config" not in config
    report = PruningReport.load(tmp_path)
    assert report.removed_share == 0 and report.zeroed_share == modifier.zeroed
    assert set(report.zero_rows) == {names_of(family, layer)[0] for layer in range(2)}
    assert report.sizes == {}
    card = (tmp_path / "README.md").read_text()
    share = f"{100 * modifier.zeroed:.2f} %"
    assert f"| zeros in place | {share} of the decoder layers' parameters |" in card
    assert "0.00 % of the decoder layers' parameters" in card
    assert "made smaller" not in card


@pytest.mark.parametrize("family", FAMILIES_TESTED)
def test_what_reads_them_gets_its_least_squares_weights(family: str) -> None:
    """In the first layer, by the tokens themselves, in float64"""
    dense, model = tiny_model(family), tiny_model(family)
    shrink(model, **UNTRAINED, **VALUES)
    _, reader = names_of(family)
    inputs, put_out = seen(dense, [reader])
    x, y = inputs[reader].double(), put_out[reader].double()
    weight, bias = oriented(dense, reader).double(), dense.get_submodule(reader).bias
    kept = columns_of(family)[~zero_dimensions(model, family, 0)].flatten().sort()[0]
    target = y if bias is None else y - bias.detach().double()
    centre = torch.zeros_like(x[0]) if bias is None else x.mean(0)
    mean = torch.zeros_like(y[0]) if bias is None else target.mean(0)
    centred, target = x - centre, target - mean
    powers = centred.square().sum(0)
    ridge = 0.15 * powers.log().mean().exp()
    gram = centred[:, kept].T @ centred[:, kept] + ridge * torch.eye(len(kept))
    right = centred[:, kept].T @ target + ridge * weight[:, kept].T
    expected = torch.linalg.solve(gram, right).T
    found = oriented(model, reader)[:, kept].double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    if bias is not None:  # what is constant of the dimensions that went, too
        constant = bias.detach().double() + mean - expected @ centre[kept]
        own = model.get_submodule(reader).bias.detach().double()
        torch.testing.assert_close(own, constant, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES_TESTED)
def test_zeros_in_place_are_what_nobody_reads(family: str) -> None:
    dense, model = tiny_model(family), tiny_model(family)
    shrink(model, **EXACT, **VALUES)
    for layer in range(2):
        gone = columns_of(family)[zero_dimensions(model, family, layer)]
        oriented(dense, names_of(family, layer)[1])[:, gone.flatten()] = 0
    torch.testing.assert_close(logits(model), logits(dense))


def test_heads_and_layers_choose_freely() -> None:
    model = tiny_model("llama")
    shrink(model, **UNTRAINED, **VALUES)
    gone = [zero_dimensions(model, "llama", layer).view(-1, SIZE) for layer in range(2)]
    assert not torch.equal(gone[0], gone[1])
    assert gone[0].sum() == gone[1].sum()
    assert any(int(one[0].sum()) != int(one[1].sum()) for one in gone)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_channels_of_mlps_leave_beside_them(family: str, tmp_path: Path) -> None:
    dense, model = tiny_model(family), tiny_model(family)
    modifier = shrink(model, structures=["mlp", "value_dims"])
    before, after = size_of_layers(dense, family), size_of_layers(model, family)
    assert modifier.removed == pytest.approx(1 - after / before, rel=1e-12)
    assert modifier.removed + modifier.zeroed == pytest.approx(0.2, abs=0.03)
    steps = [outcome.steps for outcome in modifier.reconstructions.values()]
    assert len(steps) == 2 and (any(steps) or family == "opt")
    for layer in range(2):  # in spite of training
        assert bool(zero_dimensions(model, family, layer).any())
    check_loads(model, tmp_path)
    report = PruningReport.load(tmp_path)
    assert report.removed_share == modifier.removed > 0
    assert report.zeroed_share == modifier.zeroed > 0
    assert len(report.smaller) == 4 and not report.sparse


@pytest.mark.parametrize("kind", ["row", "bias", "column", "more"])
def test_a_value_among_the_zeros_is_found(kind: str, tmp_path: Path) -> None:
    model = tiny_model("opt")
    shrink(model, **UNTRAINED, **VALUES)
    model.save_pretrained(tmp_path)
    assert verify(tmp_path).passed
    gone = int(zero_dimensions(model, "opt", 0).nonzero()[0])
    stays = int((~zero_dimensions(model, "opt", 0)).nonzero()[0])
    values, reader = names_of("opt")
    tensors = load_file(tmp_path / "model.safetensors")
    if kind == "row":
        tensors[f"{values}.weight"][gone, 3] = 0.5
    elif kind == "bias":
        tensors[f"{values}.bias"][gone] = 0.5
    elif kind == "column":
        tensors[f"{reader}.weight"][3, gone] = 0.5
    else:
        tensors[f"{values}.weight"][stays] = 0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = verify(tmp_path)
    assert not found.passed
    messages = [*found.problems, *(str(one.problem) for one in found.failures)]
    assert len(messages) == 1
    left = int((~zero_dimensions(model, "opt", 0)).sum())
    assert {
        "row": "rows of zeros; the report counts",
        "bias": "has biases in rows of zeros",
        "column": f"is not {left} of 32 columns not zero",
        "more": "rows of zeros; the report counts",
    }[kind] in messages[0]


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"mask_structure": "2:4"}),
        ("opt", {"mask_structure": "2:4"}),
        ("gpt2", {"sparsity": 0.5}),
    ],
    ids=str,
)
def test_a_pattern_that_follows_keeps_the_zeros(
    family: str, fields: dict[str, Any], preserve: bool, tmp_path: Path
) -> None:
    alone, model = tiny_model(family), tiny_model(family)
    structured = {"structures": ["mlp", "value_dims"], "sparsity": 0.2}
    small = FASPPruningModifier(multiple_of=4, **structured)
    shrink(alone, **structured)
    sparse = FISTAPruningModifier(preserve_sparsity_mask=preserve, **fields)
    run(model, [small, sparse])
    for layer in range(2):
        before = zero_dimensions(alone, family, layer)
        gone = zero_dimensions(model, family, layer)
        # without zeros to preserve, an n:m pattern lets them change places in a head
        assert gone.sum() == before.sum() > 0
        if preserve or "sparsity" in fields:
            assert torch.equal(gone, before)
        values, reader = names_of(family, layer)
        columns = columns_of(family)[gone].flatten()
        assert not oriented(model, reader)[:, columns].any()
        rows = PLACES[family][1] + gone.nonzero()[:, 0]
        assert not oriented(model, values)[rows].any()
        bias = model.get_submodule(values).bias
        assert bias is None or not bias[rows].any()
    check_loads(model, tmp_path)
    report = PruningReport.load(tmp_path)
    assert report.zeroed_share and report.removed_share


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "spap"}, '"value_dims" are of FASP'),
        ({"structures": ["heads", "value_dims"]}, "of the same operators"),
        ({"sparsity": 0.5}, "all 16 value_dims would have to leave"),
        ({"ignore": ["re:.*v_proj"]}, "not all among targets"),
        ({"targets": ["re:.*o_proj"]}, "not all among targets"),
    ],
    ids=str,
)
def test_what_cannot_be_zero_is_refused(fields: dict[str, Any], message: str) -> None:
    check_refused(tiny_model("llama", **HEADS), message, **VALUES | fields)


def test_zeros_in_place_cannot_be_followed_by_more() -> None:
    model = tiny_model("llama")
    shrink(model, **UNTRAINED, **VALUES | {"sparsity": 0.15})
    check_refused(model, "dimensions of values .* are zeros in place already")


@pytest.mark.parametrize("source", ["memory", "checkpoint"])
@pytest.mark.parametrize(
    "fields", [VALUES, {"structures": ["heads"]}, {"structures": ["mlp"]}], ids=str
)
def test_few_zeros_in_place_cannot_be_followed_by_more_either(
    source: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model("llama", **HEADS)
    shrink(model, **UNTRAINED, **VALUES | {"sparsity": 0.02})
    if source == "checkpoint":
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
    check_refused(model, "dimensions of values .* are zeros in place already", **fields)


def test_zeros_in_place_of_a_smaller_model_are_counted_for_the_dense_one(
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    before = size_of_layers(model, "llama")
    shrink(model, **UNTRAINED)
    left = size_of_layers(model, "llama")
    shrink(model, **UNTRAINED, **VALUES)
    check_loads(model, tmp_path)
    zeros = sum(
        int((oriented(model, name) == 0).sum())
        for layer in range(2)
        for name in names_of("llama", layer)
    )
    report = PruningReport.load(tmp_path)
    assert report.zeroed_share == pytest.approx(zeros / before)
    assert report.removed_share == pytest.approx(1 - left / before)


def test_the_run_says_that_nothing_becomes_smaller() -> None:
    with logged() as messages:
        modifier = shrink(tiny_model("llama"), **UNTRAINED, **VALUES)
    share = f"{100 * modifier.zeroed:.2f} % of the decoder layers' parameters"
    (message,) = (message for message in messages if "zeros in place" in message)
    assert share in message and "neither smaller nor faster" in message
    report = PruningReport("", None, 0, [], removed_share=0.0, zeroed_share=0.125)
    assert removal_sentence(report) == (
        "0.00 % of the decoder layers' parameters have left the model; 12.50 % are "
        "zeros in place, which make it no smaller."
    )


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_run_is_resumed(family: str, tmp_path: Path) -> None:
    whole, again = tiny_model(family), tiny_model(family)
    fields = VALUES | {"resume_dir": str(tmp_path / "layers")}
    shrink(whole, **fields)
    first = f"{FAMILIES[family].layers}.0.safetensors"
    (tmp_path / "layers" / first).unlink()
    modifier = shrink(again, **fields)
    assert_same(weights(again), weights(whole))
    assert modifier.zeroed > 0
    check_loads(again, tmp_path / "saved")


def test_half_precision(tmp_path: Path) -> None:
    model = tiny_model("qwen2", torch.bfloat16)
    shrink(model, **VALUES)
    for layer in range(2):
        assert bool(zero_dimensions(model, "qwen2", layer).any())
    model.save_pretrained(tmp_path)
    assert verify(tmp_path).passed
