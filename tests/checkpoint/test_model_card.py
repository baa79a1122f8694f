"""The model card beside a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard
from operator_results import operator_result

from fista_modifier import FASPPruningModifier, SPAPPruningModifier
from fista_modifier.checkpoint.model_card import (
    StatedPerplexity,
    model_card,
    stated_perplexities,
    write_model_card,
)
from fista_modifier.data.records import recorded_name
from fista_modifier.pruning.results import (
    Calibration,
    PruningReport,
    ReconstructionResult,
    RecoveryResult,
)

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
    stated = {"news|old": StatedPerplexity(12.5, 64, 17, bos=False)}
    write_model_card(folder, REPORT, stated)
    assert (
        "| news\\|old | 12.500 | 64 | 17, without the token"
        in (folder / "README.md").read_text()
    )
    assert stated_perplexities(folder) == stated
    card = ModelCard.load(folder / "README.md")
    other = EvalResult(
        task_type="text-generation",
        dataset_type="arc",
        dataset_name="arc",
        metric_type="accuracy",
        metric_value=0.5,
        metric_args={"num_fewshot": 5},
    )
    card.data.eval_results.append(other)  # as somebody may do by hand
    card.save(folder / "README.md")
    assert stated_perplexities(folder) == stated
    data = ModelCard.load(folder / "README.md").data
    assert data.base_model == "org/model"
    assert data.datasets == "allenai/c4"
    assert data.library_name == "transformers"
    assert {"llm-compressor", "pruned", "2of4"} <= set(data.tags)
    assert data.sparsity == 0.5
    assert data.model_name == "model-2of4"
    result, *_ = data.eval_results
    assert (result.dataset_name, result.metric_type) == ("news|old", "perplexity")
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


def test_an_operator_that_no_token_reached_has_no_error() -> None:
    unknown = replace(OPERATOR, name="experts.0", tokens=0, relative_error=0.0)
    for report, words in (
        (replace(REPORT, operators=[OPERATOR, unknown]), "output | 12.50 %"),
        (replace(REPORT, operators=[unknown]), "output | nan %"),
    ):
        assert words in model_card("name", report, {}).text


def test_a_solver_from_python_is_named() -> None:
    report = replace(REPORT, sparse_by=["ALPS (a solver given from Python)"])
    card = model_card("name", report, {})
    assert "pruned to 2:4 by ALPS, after" in card.text
    assert "FISTAPruner" not in card.text and "fistapruner" not in card.data.tags
    assert "alps" in card.data.tags


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
    halves = [replace(OPERATOR, pattern="50 %", name=name) for name in "ab"]
    card = model_card("n", replace(REPORT, operators=[*halves, OPERATOR]), {})
    assert {"unstructured-sparsity", "2of4"} <= set(card.data.tags)
    assert "50 %" in card.text
    nothing = model_card("n", replace(REPORT, operators=[]), {})
    assert nothing.data.sparsity == 0
    assert "pruned" not in nothing.data.tags


SMALLER = replace(
    OPERATOR,
    name="model.layers.0.mlp.down_proj",
    pattern="32 of 48 columns",
    zeros=0,
    relative_error=0.25,
)
STRUCTURED = replace(
    REPORT,
    operators=[SMALLER],
    removed_share=0.19832,
    sizes={"text_config.intermediate_size": 32},
    share_of_layers=0.2,
    smaller_by=["FASP (Hu, Zhao, Yuan et al., 2025)"],
)


def test_a_smaller_model_says_what_left_and_speaks_of_no_zeros() -> None:
    card = model_card("n", STRUCTURED, {})
    for words in (
        "made smaller by FASP,",
        "19.83 % of the parameters of its decoder layers have left it",
        "| left the model | 19.83 % of the decoder layers' parameters |",
        "| size | `text_config.intermediate_size`: 32 |",
        "| method | FASP (Hu, Zhao, Yuan et al., 2025), by fista-modifier",
        "25.00 %",
        "every operator has its size,",
    ):
        assert words in card.text
    for words in ("zero", "FISTAPruner", "SPAP", "pattern", "| share |"):
        assert words not in card.text
    assert {"pruned", "fasp", "structured-pruning"} <= set(card.data.tags)
    assert "fistapruner" not in card.data.tags
    assert "sparsity" not in card.data.to_dict()


@pytest.mark.parametrize(
    ("modifier", "fields", "words"),
    [
        (SPAPPruningModifier, {}, "| SPAP (Hu and Yuan, 2025), by"),
        (SPAPPruningModifier, {"selector": "spap"}, "| SPAP (Hu and Yuan, 2025), by"),
        (
            FASPPruningModifier,
            {"selector": "greedy"},
            "et al., 2025), with channels chosen by 'greedy', by",
        ),
    ],
)
def test_the_structured_method_is_that_of_the_modifier(
    modifier: type[FASPPruningModifier], fields: dict[str, str], words: str
) -> None:
    methods = [modifier(sparsity=0.2, **fields).method]
    text = model_card("n", replace(STRUCTURED, smaller_by=methods), {}).text
    short = methods[0].partition(" ")[0]
    assert f"made smaller by {short}," in text and words in text
    other = {"FASP": "SPAP", "SPAP": "FASP"}[short]
    assert other not in text.partition("## How")[0]


def test_of_a_chain_both_parts_are_said() -> None:
    sparse = replace(OPERATOR, name=SMALLER.name)
    chain = STRUCTURED.followed_by(
        replace(REPORT, operators=[OPERATOR, sparse], share_of_layers=1.0)
    )
    card = model_card("n", chain, {})
    for words in (
        "made smaller by FASP,",
        "19.83 % of the parameters",
        "What is left was pruned to 2:4 by FISTAPruner: 50.00 % of the 2,048 weights",
        "of 2\nlinear operators are zero",
        "| pattern | 2:4: 2 of every 4 weights of a row are kept (2 operators) |",
        "| method | FASP",
        "| method | FISTAPruner",
        "| 12.50 % |",
        "every operator has its size and pattern,",
    ):
        assert words in card.text
    assert card.data.sparsity == 0.5
    assert {"fasp", "fistapruner", "structured-pruning", "2of4"} <= set(card.data.tags)


def test_a_recovery_is_told_with_its_data_and_what_it_came_to() -> None:
    data = Calibration("/somewhere/text.jsonl", 32, 512, 0)
    recovery = RecoveryResult(
        "/models/dense", data, 15872, 511, 2.0, 2e-4, 4, 8, 0.41, 0.22, 60.0
    )
    text = model_card("name", replace(REPORT, recovery=[recovery]), {}).text
    for words in (
        "FISTAPruner, after training: 50.00 %",
        "trained towards the predictions of the dense model, while zeros stayed zeros.",
        "| recovery | towards dense, 15,872 tokens of text.jsonl, 2 epochs, AdamW, "
        "rate 0.0002 of the mean kept weight |",
        "| 0.4100 → 0.2200 nats per token, on 511 tokens that recovery was not trained",
        "operator's output, before recovery |",
    ):
        assert words in text
    assert "somewhere" not in text and "/models" not in text
    before = replace(recovery, pruned_after=True)
    told = model_card("name", replace(REPORT, recovery=[before]), {}).text
    assert "| mean KL to the dense model, before more was pruned | 0.4100 →" in told
    assert "Before the last pruning, what was left was trained towards" in told
    assert "zeros stayed" not in told and "before recovery" not in told
    assert "recovery" not in model_card("name", REPORT, {}).text
    assert "without retraining" in model_card("name", REPORT, {}).text
    trained = replace(REPORT, layers={"a": ReconstructionResult(0.2, 0.1, {}, 8, 1.0)})
    assert "without retraining" not in model_card("name", trained, {}).text


def test_an_operator_that_was_pruned_twice_counts_once() -> None:
    first = replace(OPERATOR, pattern="30 %", zeros=300)
    chain = replace(REPORT, operators=[first]).followed_by(REPORT)
    assert chain.sparsity == OPERATOR.sparsity
    assert chain.patterns == {OPERATOR.pattern: 1}
    assert len(chain.operators) == 2, "both steps stay on record"
    assert "its 1\nlinear operators" in model_card("n", chain, {}).text


@pytest.mark.parametrize(
    ("class_name", "loader", "tag"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM", "text-generation"),
        ("OwnForCausalLM", "AutoModelForCausalLM", "text-generation"),
        (
            "LlavaForConditionalGeneration",
            "AutoModelForImageTextToText",
            "image-text-to-text",
        ),
        ("LlamaForSequenceClassification",) * 2 + (None,),
        ("ViTForImageClassification",) * 2 + (None,),
    ],
)
def test_the_card_loads_the_class_of_the_model(
    class_name: str, loader: str, tag: str | None, tmp_path: Path
) -> None:
    config = {"architectures": [class_name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_model_card(tmp_path, REPORT)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == tag
    assert f"{loader}.from_pretrained" in card.text
    assert ("vllm serve" in card.text) == bool(tag)


def test_a_local_folder_is_no_id_of_the_hub_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = recorded_name("models/llama"), recorded_name("org/model")
    monkeypatch.chdir(tmp_path / "models")
    local, of_hub = (model_card("n", replace(REPORT, model=one), {}) for one in names)
    assert local.data.base_model is None
    assert "llama pruned" in local.text and "models/" not in local.text
    assert of_hub.data.base_model == "org/model"
