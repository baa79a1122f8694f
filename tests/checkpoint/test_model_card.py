"""The model card beside a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from operator_results import operator_result

from fista_modifier.checkpoint.model_card import model_card, write_model_card
from fista_modifier.pruning.results import Calibration, PruningReport

OPERATOR = operator_result("model.layers.0.self_attn.q_proj", zeros=512)
REPORT = PruningReport(
    "org/model",
    Calibration("allenai/c4", 128, 2048, 7),
    1.0,
    [OPERATOR],
    recipe="stage:\n  modifiers: {}\n",
)


def test_the_hub_reads_back_what_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "model-2of4"
    folder.mkdir()
    write_model_card(folder, REPORT, {"news": 12.5})
    data = ModelCard.load(folder / "README.md").data
    assert data.base_model == "org/model"
    assert data.datasets == "allenai/c4"
    assert data.library_name == "transformers"
    assert {"llm-compressor", "pruned", "2of4"} <= set(data.tags)
    assert data.sparsity == 0.5
    assert data.model_name == "model-2of4"
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type) == ("news", "perplexity")
    assert result.metric_value == 12.5


def test_the_text_has_pattern_method_calibration_versions_and_recipe() -> None:
    text = model_card("name", REPORT, {}).text
    for words in (
        "2:4",
        "FISTAPruner",
        "allenai/c4, 128 × 2048 tokens, seed 7",
        "12.50 %",
        "stage:\n  modifiers: {}",
        "vllm serve name",
        'from_pretrained("name")',
        "fista-prune verify name",
        *(f"| {name} | {version} |" for name, version in REPORT.versions.items()),
    ):
        assert words in text
    assert "Evaluation" not in text


@pytest.mark.parametrize("kind", ["absolute", "relative", "elsewhere"])
def test_local_files_are_named_without_their_place(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "confidential" if kind == "relative" else str(tmp_path / "confidential")
    monkeypatch.chdir(tmp_path)
    if kind != "elsewhere":
        (tmp_path / "confidential" / "dense").mkdir(parents=True)
    data = replace(REPORT.calibration, dataset=f"{place}/text.txt")
    card = model_card(
        "n", replace(REPORT, model=f"{place}/dense", calibration=data), {}
    )
    assert "confidential" not in str(card)
    assert (
        "dense pruned to 2:4" in card.text
        and "| text.txt, 128" in card.text.replace("calibration | ", "| ")
    )
    assert card.data.base_model is None and card.data.datasets is None


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("sparse-24-bitmask", "fista-prune unpack n"),
        # the load format is one for both packed formats
        ("sparse-24-bitmask", "`--load-format sparse-bitmask`"),
        ("sparse-bitmask", "`--load-format sparse-bitmask`"),
        ("dense-legacy", "--format dense`"),
    ],
)
def test_a_format_that_vllm_refuses_says_what_to_do(storage: str, words: str) -> None:
    text = model_card("n", replace(REPORT, storage_format=storage), {}).text
    assert words in text and "vllm serve" not in text


def test_other_patterns_and_none(tmp_path: Path) -> None:
    half = replace(OPERATOR, pattern="50 %")
    card = model_card("n", replace(REPORT, operators=[half, half, OPERATOR]), {})
    assert {"unstructured-sparsity", "2of4"} <= set(card.data.tags)
    assert "50 %" in card.text
    nothing = model_card("n", replace(REPORT, operators=[]), {})
    assert nothing.data.sparsity == 0
    assert "pruned" not in nothing.data.tags
