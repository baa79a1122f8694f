"""What lies beside a checkpoint that ``oneshot()`` and ``save_pretrained`` wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import FAMILIES, tiny_model
from huggingface_hub import ModelCard
from runs import LENGTH, SAMPLES, prune, run, weights

from fista_modifier import FISTAPruningModifier
from fista_modifier.checkpoint.verification import verify
from fista_modifier.pruning.results import Calibration, PruningReport


@pytest.mark.parametrize("mask_structure", ["2:4", "0:0"])
def test_a_checkpoint_has_its_report_and_card_and_passes_verification(
    mask_structure: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    modifier = prune(model, mask_structure=mask_structure, sparsity=0.5)
    model.save_pretrained(tmp_path)
    report = PruningReport.load(tmp_path)
    assert report.operators == modifier.results
    assert report.layers == modifier.reconstructions
    assert report.calibration is None
    assert report.tokens == SAMPLES * LENGTH
    assert report.seconds > 0
    assert f"mask_structure: {mask_structure}" in report.recipe.replace("'", "")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.sparsity == 0.5
    assert f"| calibration | {SAMPLES * LENGTH} tokens |" in card.text
    checked = verify(tmp_path)
    assert not checked.problems and not checked.failures
    assert len(checked.operators) == len(FAMILIES["llama"].operators)


def test_two_prunings_are_one_report(tmp_path: Path) -> None:
    model = tiny_model("llama")
    fields = {"mask_structure": "2:4", "preset": "fast"}
    first, second = (
        FISTAPruningModifier(targets=[f"re:.*{part}.*"], **fields)
        for part in ("self_attn", "mlp")
    )
    run(model, [first, second])
    model.save_pretrained(tmp_path)
    report = PruningReport.load(tmp_path)
    assert report.operators == [*first.results, *second.results]
    assert {operator.name for operator in report.operators} == (
        FAMILIES["llama"].operators
    )
    # the recipe has both steps, in order, and does the same again
    steps = [
        step["pruning_modifiers"] for step in yaml.safe_load(report.recipe).values()
    ]
    assert [one["FISTAPruningModifier"]["targets"] for one in steps] == [
        first.targets,
        second.targets,
    ]
    recipe = tmp_path / "again.yaml"
    recipe.write_text(report.recipe)
    again = tiny_model("llama")
    run(again, str(recipe))
    expected = weights(model)
    for name, weight in weights(again).items():
        assert torch.equal(weight, expected[name]), name


def test_the_recipe_names_no_folders_of_this_machine(tmp_path: Path) -> None:
    model = tiny_model("llama")
    prune(model, preset="fast", resume_dir=str(tmp_path / "finished"))
    model.save_pretrained(tmp_path)
    assert "finished" not in PruningReport.load(tmp_path).recipe


def test_other_calibration_data_are_not_those_of_a_later_pruning(
    tmp_path: Path,
) -> None:
    def report(operators: list[Any], dataset: str | None) -> PruningReport:
        data = Calibration(dataset, 1, 8, 0) if dataset else None
        return replace(
            PruningReport.load(tmp_path), operators=operators, calibration=data
        )

    model = tiny_model("llama")
    modifier = prune(model, preset="fast")
    model.save_pretrained(tmp_path)
    first = report(modifier.results, "first")
    assert first.followed_by(report(modifier.results, None)).calibration is None
    assert first.followed_by(report([], None)).calibration == first.calibration


def test_a_card_of_somebody_else_stays(tmp_path: Path) -> None:
    model = tiny_model("llama")
    prune(model, preset="fast")
    (tmp_path / "README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    (tmp_path / "README.md").unlink()
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert "FISTAPruner" in (tmp_path / "README.md").read_text()
