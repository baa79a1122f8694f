"""What the toolkit leaves in a model that a run must not meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.quip import QuIPModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from runs import run, weights
from torch import Tensor

from fista_modifier import FISTAPruningModifier
from fista_modifier.channels import layers as probes
from fista_modifier.distributed import Ranks
from fista_modifier.modifiers import steps

IGNORE = ["re:.*lm_head"]


def fista() -> FISTAPruningModifier:
    return FISTAPruningModifier(mask_structure="2:4", preset="fast", ignore=IGNORE)


def pruned_twice(saved: Path | None) -> dict[str, Tensor]:
    """Weights and scales after a run, maybe a save, and a run that quantises."""
    model = tiny_model("llama")
    run(model, fista())
    if saved is not None:
        model.save_pretrained(saved)
    scheme = {"targets": ["Linear"], "scheme": "W8A8", "ignore": IGNORE}
    run(model, [fista(), QuantizationModifier(**scheme)])
    return weights(model)


def test_a_model_that_was_saved_is_pruned_and_quantised_alike(tmp_path: Path) -> None:
    expected, found = pruned_twice(None), pruned_twice(tmp_path)
    assert any(name.endswith("weight_scale") for name in expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", [SmoothQuantModifier, SpinQuantModifier, QuIPModifier])
def test_ranks_refuse_what_each_would_do_to_shared_weights(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "current_ranks", lambda: Ranks(0, 2))
    with pytest.raises(ValueError, match=f"{kind.__name__} changes weights once on"):
        run(tiny_model("llama"), [kind(), fista()])


def test_ranks_probe_with_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(Ranks):
        def all(self, value: Any) -> list[Any]:
            return [value, ["b"]]

    monkeypatch.setattr(probes, "current_ranks", Two)
    assert probes._first(iter("acd")) == ["a", "b", "c", "d"]
