"""Operators of one model get patterns of their own."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, tiny_model
from huggingface_hub import ModelCard
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.pipelines import basic
from llmcompressor.recipe import Recipe
from pydantic import ValidationError
from runs import prune, run, samples, weights
from transformers import PreTrainedModel

from fista_modifier import FISTAPruningModifier
from fista_modifier.checkpoint.verification import verify
from fista_modifier.pruning.results import PruningReport

# weights need not be good
QUICK = {"preset": "fast", "ignore": ["lm_head"]}
OPERATORS = len(FAMILIES["llama"].operators)
SHARE = re.compile(r"[\d.]+ %")


def patterns(modifier: FISTAPruningModifier) -> dict[str, str]:
    """Of each operator, without the name's "model.layers."."""
    return {
        result.name.removeprefix("model.layers."): result.pattern
        for result in modifier.results
    }


def sparsity(module: torch.nn.Module) -> float:
    return float((module.weight == 0).float().mean())


def unstructured(**fields: Any) -> FISTAPruningModifier:
    return prune(tiny_model("llama"), **(QUICK | {"mask_structure": "0:0"} | fields))


# a mapping


MIXED = """
pruning_stage:
  pruning_modifiers:
    FISTAPruningModifier:
      ignore: ["re:.*lm_head"]
      patterns:
        Linear: 0.6
        re:.*self_attn: 2:4
        re:.*up_proj: "4:8"
        model.layers.1.mlp.down_proj: dense
"""


def test_a_mapping_decides_from_the_recipe_to_the_card(tmp_path: Path) -> None:
    model = tiny_model("llama")
    dense = weights(model)
    run(model, MIXED)
    model.save_pretrained(tmp_path)

    report = PruningReport.load(tmp_path)
    assert report.patterns == {"2:4": 8, "60 %": 3, "4:8": 2}
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(model.state_dict()[name], dense[name])
    for operator in report.operators:
        share = 0.6 if operator.pattern == "60 %" else 0.5
        assert operator.zeros == round(share * operator.shape[0] * operator.shape[1])
    verification = verify(tmp_path)
    assert verification.passed
    assert {one.pattern for one in verification.operators} == {"2:4", "60 %", "4:8"}
    card = ModelCard.load(tmp_path / "README.md")
    assert "pruned to 2:4 (8), 60 % (3), 4:8 (2) by" in card.text
    assert "4:8: 4 of every 8 weights of a row are kept (2 operators)" in card.text
    assert {"2of4", "4of8", "unstructured-sparsity"} <= set(card.data.tags)
    assert card.data.sparsity == round(report.sparsity, 4)


def test_the_last_entry_counts_and_others_have_the_default_pattern() -> None:
    modifier = unstructured(
        sparsity=0.5,
        patterns={"re:.*self_attn": "2:4", "re:.*layers\\.0\\.": "dense"},
    )
    assert patterns(modifier) == {
        "1.self_attn.q_proj": "2:4",
        "1.self_attn.k_proj": "2:4",
        "1.self_attn.v_proj": "2:4",
        "1.self_attn.o_proj": "2:4",
        "1.mlp.gate_proj": "50 %",
        "1.mlp.up_proj": "50 %",
        "1.mlp.down_proj": "50 %",
    }


def test_operators_that_share_an_input_are_pruned_as_each_would_be_alone() -> None:
    names = {"q_proj": "2:4", "k_proj": "0.6", "v_proj": "2:4"}
    fields = QUICK | {"mask_structure": "0:0", "error_correction": "none"}
    together = tiny_model("llama")
    chosen = {f"re:.*{name}": pattern for name, pattern in names.items()}
    prune(together, targets=list(chosen), patterns=chosen, **fields)
    for name, pattern in names.items():
        alone = tiny_model("llama")
        prune(alone, **(fields | {"mask_structure": pattern}), targets=f"re:.*{name}")
        for layer in range(LAYERS):
            operator = f"model.layers.{layer}.self_attn.{name}"
            one, other = (m.get_submodule(operator) for m in (alone, together))
            torch.testing.assert_close(one.weight, other.weight)


def test_linear_stands_for_conv1d_in_a_mapping_too() -> None:
    modifier = prune(
        tiny_model("gpt2"), mask_structure="0:0", patterns={"Linear": "2:4"}, **QUICK
    )
    assert {result.pattern for result in modifier.results} == {"2:4"}


def test_an_interrupted_run_does_not_go_on_with_entries_in_another_order(
    tmp_path: Path,
) -> None:
    first, *others = [
        ("Linear", "2:4"),
        ("re:.*[qk]_proj", 0.6),
        ("re:.*[kv]_proj", 0.5),
    ]
    fields = {"resume_dir": str(tmp_path)}
    unstructured(patterns=dict([first, *others]), **fields)
    with pytest.raises(ValueError, match="another run: recipe: patterns was"):
        unstructured(patterns=dict([first, *reversed(others)]), **fields)


def test_the_recipe_of_the_project_runs_and_comes_back_from_the_report() -> None:
    file = Path(__file__).resolve().parents[2] / "recipes" / "fista-mixed.yaml"
    model = run(tiny_model("llama"), str(file))
    (report,) = model.save_pretrained.on_save.reports
    assert report.patterns == {"2:4": 4, "60 %": 3}
    (again,) = Recipe.create_instance(report.recipe).modifiers
    assert again.patterns == {"re:.*attn": "2:4", "re:.*layers\\.0\\.": "dense"}
    assert list(again.patterns.values()) == ["2:4", "dense"]


# a list


def test_each_layer_has_the_sparsity_of_its_place_in_the_list() -> None:
    modifier = unstructured(sparsity=[0.25, 0.75])
    of_layers = {name[0]: pattern for name, pattern in patterns(modifier).items()}
    assert of_layers == {"0": "25 %", "1": "75 %"}
    assert len(modifier.results) == OPERATORS


def test_a_layer_of_sparsity_0_stays_dense() -> None:
    assert {name[0] for name in patterns(unstructured(sparsity=[0, 0.5]))} == {"1"}
    modifier = FISTAPruningModifier(
        mask_structure="2:4", sparsity=[0, 0.5], preset="fast", ignore=["lm_head"]
    )
    run(tiny_model("llama"), modifier)
    assert {name[0] for name in patterns(modifier)} == {"1"}


@pytest.mark.parametrize("values", [[0.5], [0.1, 0.5]])
def test_an_ignored_layer_may_have_a_value_or_none(values: list[float]) -> None:
    modifier = unstructured(sparsity=values, ignore=["lm_head", "re:.*layers\\.0\\."])
    assert set(patterns(modifier).values()) == {"50 %"}


def test_a_list_prunes_as_the_toolkits_does() -> None:
    fields = {"sparsity": [0.25, 0.75], "ignore": ["re:.*lm_head"]}
    fields["targets"] = ["LlamaDecoderLayer"]
    theirs, ours = tiny_model("llama"), tiny_model("llama")
    run(theirs, SparseGPTModifier(**fields))
    run(ours, FISTAPruningModifier(preset="fast", **fields))
    for name in FAMILIES["llama"].operators:
        expected = sparsity(theirs.get_submodule(name))
        assert sparsity(ours.get_submodule(name)) == pytest.approx(expected, abs=0.01)


# OWL


OWL = {"sparsity": 0.6, "sparsity_profile": "owl", "owl_m": 3, "owl_lmbda": 0.08}


def toolkits_sparsities(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> dict[str, float]:
    """Of its own function, but for the events of a calibration."""

    def run_model(model: PreTrainedModel, batches: list[dict[str, Any]]) -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    monkeypatch.setattr(basic, "run_calibration", run_model)
    modifier = SparseGPTModifier(**OWL)
    layers = {f"model.layers.{n}": one for n, one in enumerate(model.model.layers)}
    batches = [{"input_ids": one[None]} for one in samples()]
    return modifier._infer_owl_layer_sparsity(model, layers, batches)


def test_owl_has_the_numbers_of_the_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = toolkits_sparsities(
        tiny_model("llama", num_hidden_layers=3), monkeypatch
    )
    model = tiny_model("llama", num_hidden_layers=3)
    modifier = prune(model, mask_structure="0:0", **OWL, **QUICK)
    found = {
        result.name.rsplit(".", 2)[0]: float(SHARE.fullmatch(result.pattern)[0][:-2])
        for result in modifier.results
        if result.kind == "down_proj"
    }
    assert len({*found.values()}) == 3
    for name, sparsity in found.items():
        name = name.removesuffix(".mlp")
        assert sparsity / 100 == pytest.approx(expected[name], abs=1e-5)
    assert fmean(found.values()) == pytest.approx(60, abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_owl_takes_what_the_toolkit_cannot(family: str) -> None:
    modifier = prune(tiny_model(family), mask_structure="0:0", **OWL, **QUICK)
    assert len({result.pattern for result in modifier.results}) == 2


# recipes of the toolkit


SPARSEGPT = """
pruning_stage:
  pruning_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      block_size: 64
      dampening_frac: 0.01
      preserve_sparsity_mask: true
      offload_hessians: true
      sparsity_profile: null
      owl_m: null
      owl_lmbda: null
      targets: ["Linear"]
      ignore: ["re:.*lm_head"]
"""


def test_a_recipe_of_sparsegpt_works_by_changing_the_name() -> None:
    assert Recipe.create_instance(SPARSEGPT).modifiers
    fields = set(SparseGPTModifier.model_fields) - {"sequential_update"}
    assert fields <= set(FISTAPruningModifier.model_fields)
    model = tiny_model("llama")
    run(model, SPARSEGPT.replace("SparseGPT", "FISTAPruning"))
    for name in FAMILIES["llama"].operators:
        weight = model.get_submodule(name).weight
        assert int((weight == 0).sum()) == weight.numel() // 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sequential_update": True}, "sequential_update is no field.*leave it out"),
        ({"sequential_targets": ["A"]}, r"oneshot\(sequential_targets=…\)"),
        ({"mask_structure": "1:4", "sparsity": 0.25}, "'3:4' prunes 1 of 4"),
        ({"sparsity": []}, "sparsity is a list without a value"),
        ({"sparsity": [0.5, 1.5]}, r"sparsity must be in \[0, 1\).*1.5"),
        ({"sparsity": [0.5, 0.4], "mask_structure": "2:4"}, "sparsity 0.4 contradicts"),
        ({"sparsity_profile": "owl"}, "owl_m and owl_lmbda go together"),
        ({"owl_m": 5}, "sparsity_profile: owl, owl_m and owl_lmbda go together"),
        ({"sparsity_profile": "lod"}, "sparsity_profile"),
        (OWL | {"sparsity": [0.5, 0.5]}, "owl chooses the sparsity of each layer"),
        (OWL | {"sparsity": None}, "owl chooses the sparsity of each layer"),
        (OWL | {"sparsity": 0.5, "mask_structure": "2:4"}, "owl .*leave out either"),
        ({"patterns": {"Linear": "half"}}, "patterns: 'Linear': .*got 'half'"),
        ({"patterns": {"Linear": "5:4"}}, "patterns: 'Linear': '5:4' keeps 5 of 4"),
        ({"sparsity": None, "patterns": {}}, "sparsity is missing"),
    ],
)
def test_fields_that_contradict_one_another_are_refused(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        FISTAPruningModifier(**({"sparsity": 0.5} | fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsity": [0.5] * 3}, "has 3 values, and the model has 2 decoder layers"),
        (
            {"patterns": {"re:.*mlp": "2:4"}},
            r"no entry that matches model\.layers\.0\.self_attn\.q_proj",
        ),
        (
            {"sparsity": 0.5, "patterns": {"re:.*experts": "2:4"}},
            "'re:.*experts' matches none of the operators",
        ),
        (
            {"sparsity": 0.5, "patterns": {"re:.*up_proj": "2:4", "LlamaMLP": "1:4"}},
            "'re:.*up_proj' has no effect",
        ),
        (
            {"sparsity": 0.5, "patterns": {"re:.*layers.1.*q_proj": "2:5"}},
            r"model\.layers\.1\.self_attn\.q_proj: '2:5' .* divisible by 5, got 32",
        ),
        ({"patterns": {"Linear": "dense"}}, "leave all operators dense"),
        (
            {"sparsity": [0.5, 0.5], "targets": ["Linear", "lm_head"], "ignore": []},
            "lm_head is in no decoder layer, .*name its pattern in patterns",
        ),
        (OWL | {"owl_lmbda": 0.6}, "owl_lmbda 0.6 around .* choose a smaller"),
        (OWL | {"owl_m": 1e9}, "same share of outliers, 0.0, .*another owl_m"),
    ],
)
def test_what_does_not_suit_the_model_is_refused_before_any_work(
    fields: dict[str, Any], words: str
) -> None:
    model = tiny_model("llama")
    before = weights(model)
    with pytest.raises(ValueError, match=words):
        prune(model, **(QUICK | {"mask_structure": "0:0"} | fields))
    assert all(torch.equal(one, before[name]) for name, one in weights(model).items())
