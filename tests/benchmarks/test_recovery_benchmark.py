"""The benchmark of recovery, on a tiny model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recovery
import torch
from transformers import AutoModelForCausalLM

from fista_modifier.evaluation.methods import pruner
from fista_modifier.solver import NofM

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """The benchmark with further options; returns the rows of its results."""
    out = tmp_path / "recovery"
    shared = ["recovery.py", "--model", model, "--calibration", text, "--text", text]
    shared += ["--samples", 4, "--seq-len", 16, "--eval-seq-len", 16]
    shared += ["--eval-tokens", 160, "--out", out, "--work", tmp_path / "work"]

    def run(*options: object) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*shared, *options)])
        recovery.main()
        return json.loads(out.with_suffix(".json").read_text())["rows"]

    return run


def test_it_goes_on_where_it_ended(run: Run, tmp_path: Path) -> None:
    methods = ("--methods", "sparsegpt", "fista-fast", "--times")
    alone = run(*methods, 0)
    assert [row["method"] for row in alone] == ["dense", "sparsegpt", "fista-fast"]
    next((tmp_path / "work").iterdir()).unlink()  # then it is made again
    rows = run(*methods, 0, 2)
    assert rows[:3] == alone
    for pruned, trained in zip(alone[1:], rows[3:], strict=True):
        assert trained["method"] == pruned["method"]
        assert trained["zeros"] == 0.5
        assert trained["divergence"] != pruned["divergence"]
    table = (tmp_path / "recovery.md").read_text()
    assert table.count("2 × the tokens") == 2


def test_finished_layers_are_not_pruned_again(run: Run, tmp_path: Path) -> None:
    options = ("--methods", "fista-fast", "--times", 0, "--layers", tmp_path / "layers")
    _, pruned = run(*options)
    assert pruned["seconds"] > 0
    (tmp_path / "recovery.json").unlink()
    _, resumed = run(*options)
    assert resumed["perplexity"] == pruned["perplexity"]
    assert resumed["seconds"] is None
    assert "| ? |" in (tmp_path / "recovery.md").read_text()


def test_a_recovery_starts_from_the_weights_that_were_kept(
    model: Path, text: Path, tmp_path: Path
) -> None:
    dense = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = recovery.pipeline.load_tokenizer(str(model))
    data = recovery.pipeline.calibration_tokens(
        recovery.Calibration(str(text), 4, 16, 0), tokenizer
    )
    prune = pruner("magnitude", NofM(2, 4))
    file = tmp_path / "weights"
    recovery.keep(dense, tokenizer, data, prune=prune, file=file)
    again = AutoModelForCausalLM.from_pretrained(model)
    training = recovery.Training(rate=1e-12)
    recovery.recovered(
        again, tokenizer, data, file=file, model_name=str(model), training=training
    )
    expected = dense.state_dict()
    for name, value in again.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-9), name
