"""What lies beside a checkpoint that ``oneshot()`` and ``save_pretrained`` wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES, tiny_model
from huggingface_hub import ModelCard
from runs import LENGTH, SAMPLES, prune, run

from fista_modifier import FISTAPruningModifier
from fista_modifier.checkpoint.verification import verify
from fista_modifier.pruning.results import PruningReport


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
