"""A pattern that the package does not know: one class, registered, works everywhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_model
from huggingface_hub import ModelCard
from runs import run
from torch import Tensor

from fista_modifier.checkpoint.verification import verify
from fista_modifier.pruning.results import PruningReport
from fista_modifier.solver import SparsityPattern, pattern_of, patterns, register

RECIPE = """
pruning_stage:
  pruning_modifiers:
    FISTAPruningModifier:
      mask_structure: every third column
      warm_start: wanda
"""


@dataclass(frozen=True)
class EveryThirdColumn:
    """Zeroes the columns 0, 3, 6 and so on."""

    sparsity = 1 / 3
    group = None
    tag = "columns"
    description = "one column in three is zero"

    @classmethod
    def parse(cls, text: str) -> SparsityPattern | None:
        return cls() if text == str(cls()) else None

    def __str__(self) -> str:
        return "every third column"

    def check_columns(self, columns: int) -> None:
        pass

    def support(self, scores: Tensor) -> Tensor:
        kept = torch.ones_like(scores, dtype=torch.bool)
        kept[:, ::3] = False
        return kept

    def holds(self, weight: Tensor) -> bool:
        return not bool(weight[:, ::3].any())


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known in these tests and in no other."""
    monkeypatch.setattr(patterns, "_registered", dict(patterns._registered))
    register("'every third column'")(EveryThirdColumn)


def test_a_registered_pattern_works_from_recipe_to_model_card(tmp_path: Path) -> None:
    model = tiny_model("llama")
    run(model, RECIPE)
    model.save_pretrained(tmp_path)

    report = PruningReport.load(tmp_path)
    operators = len(FAMILIES["llama"].operators)
    assert report.patterns == {"every third column": operators}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["sparsity_config"]["sparsity_structure"] == "unstructured"

    verification = verify(tmp_path)
    assert verification.passed and len(verification.operators) == operators
    assert verify(tmp_path, EveryThirdColumn()).passed
    assert not verify(tmp_path, pattern_of("2:4")).passed

    card = ModelCard.load(tmp_path / "README.md")
    assert "columns" in card.data.tags
    assert "every third column: one column in three is zero" in card.text


def test_a_message_tells_how_its_names_are_written() -> None:
    with pytest.raises(ValueError, match="0.5, or 'every third column'; got 'rows'"):
        pattern_of("rows")


def test_a_pattern_of_others_that_is_not_registered_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    run(model, RECIPE)
    model.save_pretrained(tmp_path)
    patterns._registered.pop(EveryThirdColumn)
    with pytest.raises(ValueError, match="got 'every third column'"):
        verify(tmp_path)
