"""``fista-prune plan`` states what a run then does, and refuses what a run refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import invoke
from families import checkpoint, tiny_model
from llmcompressor.modifiers.quantization import QuantizationModifier
from model_kinds import OTHERS
from runs import run
from transformers import AutoConfig, PreTrainedModel

from fista_modifier import (
    FASPPruningModifier,
    FISTAPruningModifier,
    SPAPPruningModifier,
)
from fista_modifier.checkpoint.on_save import report_of
from fista_modifier.cost import (
    DEVICES,
    layer_cost,
    peak_device_memory,
    recovery_memory,
    shape_of,
)
from fista_modifier.models.loading import load_config
from fista_modifier.modifiers.forecast import Forecast, forecasts
from fista_modifier.pruning.presets import PRESETS
from fista_modifier.pruning.structured import StructuredProcedure
from fista_modifier.structured import ChannelProblem

IGNORE = ["re:.*lm_head"]
MIXED = {"Linear": "0.6", "re:.*self_attn": "2:4", "re:.*k_proj": "dense"}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
# a recipe without its stages
SPARSE = "FISTAPruningModifier:\n      ignore: ['re:.*lm_head']\n"
OWL = "      sparsity_profile: owl\n      owl_m: 5\n      owl_lmbda: 0.08\n"


def foreseen(modifiers: list[Any], model: PreTrainedModel) -> list[Forecast]:
    return list(forecasts(modifiers, model.config, 12, lambda: model))


def recipe(folder: Path, *modifiers: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(
        "".join(
            f"s{number}_stage:\n  pruning_modifiers:\n    {modifier}"
            for number, modifier in enumerate(modifiers)
        )
    )
    return file


def words(text: str) -> str:
    """Without the lines of tables"""
    return " ".join(re.sub(r"[│┃]", " ", text).split())


@pytest.mark.parametrize(
    "fields",
    [
        {"mask_structure": "2:4"},
        {"patterns": MIXED},
        {"sparsity": [0.5, 0.25]},
        {"sparsity": [0.5, 0.0]},
    ],
    ids=["one", "mapping", "list", "a dense layer"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_patterns_are_those_of_the_report(family: str, fields: dict[str, Any]) -> None:
    if family != "llama" and fields.get("patterns"):
        fields = {"patterns": {"Linear": "0.6", "re:.*(o_proj|c_attn)": "2:4"}}
    modifier = FISTAPruningModifier(preset="fast", ignore=IGNORE, **fields)
    (forecast,) = foreseen([modifier], tiny_model(family))
    model = tiny_model(family)
    run(model, modifier)
    report = report_of(model)
    assert report is not None
    found = {pattern.name: pattern.operators for pattern in forecast.patterns}
    assert found == report.patterns
    assert forecast.sparsity == report.sparsity
    assert forecast.share_of_layers == report.share_of_layers
    weights = sum(one.shape[0] * one.shape[1] for one in report.operators)
    assert sum(pattern.weights for pattern in forecast.patterns) == weights


def test_a_table_has_a_line_for_each_pattern(tmp_path: Path) -> None:
    entries = "      patterns: {Linear: 0.5, 're:.*down_proj': '1:4'}\n"
    file = recipe(tmp_path, SPARSE + entries)
    result = invoke("plan", checkpoint("llama"), "--seq-len", 16, "--recipe", file)
    assert result.exit_code == 0, result.output
    output = words(result.output)
    # 12 of 7680 weights in a layer, two of 1536
    assert "50 % 12 0.01 M 80.0 % 50.00 %" in output
    assert "1:4 2 0.00 M 20.0 % 75.00 %" in output
    assert "all 14 0.02 M 100.0 % 55.00 %" in output
    assert "reconstruction" in output and "which fits" in output


def test_what_owl_chooses_is_left_to_the_data(tmp_path: Path) -> None:
    entries = "      sparsity: 0.5\n      patterns: {'re:.*down_proj': '50 %'}\n"
    file = recipe(tmp_path, SPARSE + entries + OWL)
    result = invoke("plan", checkpoint("llama"), "--seq-len", 16, "--recipe", file)
    assert result.exit_code == 0, result.output
    output = words(result.output)
    assert "from the data, around 50 % 12" in output
    assert " 50 % 2 " in output  # what the recipe names is no choice of the data


def test_less_is_done_where_operators_stay_dense() -> None:
    config = AutoConfig.from_pretrained(checkpoint("llama"))
    whole, procedure = shape_of(config, 16), PRESETS["fast"]
    attention = whole.pruning(
        [f"{layer}.self_attn.{name}_proj" for layer in whole.names for name in "qkvo"]
    )
    every, some = (layer_cost(shape, 8, procedure) for shape in (whole, attention))
    assert some.recording == every.recording
    for phase in ("replays", "gram", "search", "refits"):
        assert 0 < getattr(some, phase) < getattr(every, phase), phase
    assert peak_device_memory(attention, procedure) < peak_device_memory(
        whole, procedure
    )
    assert attention.layers == whole.layers
    assert whole.pruning(["model.layers.0.mlp.up_proj"]).layers == 1


@pytest.mark.parametrize(
    ("family", "settings", "fields"),
    [
        ("llama", {}, {}),
        ("opt", {}, {}),
        ("gpt2", {}, {}),
        ("mixtral", {}, {}),
        ("mistral", HEADS, {"structures": ["mlp", "heads"]}),
    ],
)
def test_sizes_are_those_of_the_smaller_model(
    family: str, settings: dict[str, int], fields: dict[str, Any]
) -> None:
    fields |= {"sparsity": 0.25, "multiple_of": 4, "preset": "paper"}
    modifier = FASPPruningModifier(ignore=IGNORE, **fields)
    (forecast,) = foreseen([modifier], tiny_model(family, **settings))
    model = tiny_model(family, **settings)
    run(model, modifier)
    report = report_of(model)
    assert report is not None and forecast.plan is not None
    assert forecast.plan.removed == report.removed_share
    assert {path[-1]: value for path, value in forecast.plan.changes} == report.sizes
    assert forecast.kept == 1 - forecast.plan.removed


def test_the_table_of_channels_has_the_widths(tmp_path: Path) -> None:
    model = checkpoint("mistral", **HEADS)
    options = ["--method", "fasp", "--sparsity", 0.25, "--multiple-of", 4]
    options += ["--structure", "mlp", "--structure", "heads"]
    result = invoke("plan", model, "--seq-len", 16, "--no-recover", *options)
    assert result.exit_code == 0, result.output
    output = words(result.output)
    assert "gate_proj, up_proj: channels down_proj 2 48 36" in output
    assert "q_proj, k_proj, v_proj: heads o_proj 2 4 3" in output
    assert "24.79 % of the decoder layers' parameters leave the model" in output
    assert "num_key_value_heads 3" in output and "intermediate_size 36" in output
    assert "reconstruction" in output and "which fits" in output


@pytest.mark.parametrize("selector", ["spap", "greedy", "local"])
def test_a_choice_that_solves_takes_longer_than_a_score(selector: str) -> None:
    fields: dict[str, Any] = {"sparsity": 0.25, "multiple_of": 4, "ignore": IGNORE}
    modifiers = [
        FASPPruningModifier(**fields),
        SPAPPruningModifier(selector=selector, **fields),
    ]
    costs = []
    for modifier in modifiers:
        (found,) = foreseen([modifier], tiny_model("llama"))
        costs.append(layer_cost(found.shape, 8, found.procedure))
    score, choice = costs
    assert score.search == 0 < choice.search
    assert score.refits == choice.refits


def test_a_choice_of_unknown_cost_is_refused() -> None:
    def last(problem: ChannelProblem) -> torch.Tensor:
        return torch.arange(problem.channels)[-problem.keep :]

    modifier = FASPPruningModifier(sparsity=0.25, multiple_of=4, ignore=IGNORE)
    (found,) = foreseen([modifier], tiny_model("llama"))
    assert isinstance(found.procedure, StructuredProcedure)
    unknown = replace(found.procedure, selector=last)
    with pytest.raises(TypeError, match="of function is not known"):
        layer_cost(found.shape, 8, unknown)


def test_what_follows_is_foreseen_for_the_smaller_model() -> None:
    modifiers = [
        FASPPruningModifier(sparsity=0.25, multiple_of=4, ignore=IGNORE),
        FISTAPruningModifier(mask_structure="2:4", ignore=IGNORE),
    ]
    smaller, sparse = foreseen(modifiers, tiny_model("llama"))
    assert smaller.plan is not None and sparse.plan is None
    down = next(one for one in sparse.shape.stages if "mlp.down_proj" in one.names)
    assert down.columns == dict(smaller.plan.changes)[("intermediate_size",)] == 28
    assert sparse.patterns[0].weights < 2 * smaller.shape.weights


def test_an_output_embedding_alone_can_be_planned(tmp_path: Path) -> None:
    fields = "FISTAPruningModifier:\n      sparsity: 0.5\n      targets: [lm_head]\n"
    result = invoke("plan", checkpoint("llama"), "--recipe", recipe(tmp_path, fields))
    assert result.exit_code == 0, result.output


def test_it_takes_the_options_of_the_run(tmp_path: Path) -> None:
    def planned(*options: object) -> str:
        result = invoke("plan", checkpoint("llama"), "--seq-len", 16, *options)
        assert result.exit_code == 0, result.output
        return result.output

    corrected = ("--error-correction", "full")
    fields = "      mask_structure: '2:4'\n      error_correction: full\n"
    by_options = planned("--pattern", "2:4", *corrected)
    assert by_options == planned("--recipe", recipe(tmp_path, SPARSE + fields))
    assert by_options != planned("--pattern", "2:4")
    assert planned(*corrected) != planned()
    assert planned("--warm-start", "dense") != planned()


def test_a_recovery_needs_memory_for_the_whole_model(tmp_path: Path) -> None:
    sparse = SPARSE + "      mask_structure: '2:4'\n"
    file = recipe(tmp_path, sparse, "RecoveryModifier: {}\n")
    result = invoke("plan", checkpoint("llama"), "--seq-len", 16, "--recipe", file)
    assert result.exit_code == 0, result.output
    assert "The recovery takes about" in words(result.output)
    assert "RecoveryModifier" not in result.output


def test_a_recovery_by_default_leaves_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--method", "fasp", "--sparsity", 0.25, "--multiple-of", 4]
    llama = checkpoint("llama")
    needed = recovery_memory(shape_of(load_config(str(llama)), 16))
    device = DEVICES["h100-80gb"]

    def planned(room: float, *more: object) -> str:
        smaller = replace(device, memory=room * needed)
        monkeypatch.setitem(DEVICES, "h100-80gb", smaller)
        given = (*options, "--seq-len", 16, "--device", "h100-80gb", *more)
        result = invoke("plan", llama, *given)
        assert result.exit_code == 0, result.output
        return words(result.output).partition("Channels that leave")[2]

    fits = "which fits, beside the activations and logits"
    without = "There is no recovery, and layers are trained as by --no-recover: "
    little = planned(1.1)
    assert little.startswith(planned(1.1, "--no-recover"))
    assert f"{without}recovery would take about" in little
    assert fits in planned(1.5)
    assert fits in planned(1.1, "--recover")
    several = planned(1.5, "--devices", 2)
    assert several.startswith(planned(1.5, "--devices", 2, "--no-recover"))
    assert f"{without}recovery needs a single process" in several
    assert "recovery" not in planned(1.5, "--no-recover")
    assert "recovery" not in planned(1.5, "--preset", "paper")


def test_a_recovery_that_would_be_refused_is_refused(tmp_path: Path) -> None:
    sparse = SPARSE + "      mask_structure: '2:4'\n"
    file = recipe(tmp_path, sparse, "RecoveryModifier: {}\n")
    for asked in (["--pattern", "2:4", "--recover"], ["--recipe", file]):
        given = ("plan", checkpoint("llama"), "--seq-len", 16, *asked)
        for more, why in [
            (["--samples", 1], "1 sequence is too little"),
            (["--devices", 2], "recovery needs a single process"),
        ]:
            result = invoke(*given, *more)
            assert result.exit_code == 1
            assert why in words(result.output)


def test_an_encoder_has_no_recovery(tmp_path: Path) -> None:
    OTHERS["encoder"].save(tmp_path)
    options = ["--method", "fasp", "--sparsity", 0.25, "--multiple-of", 4]
    result = invoke("plan", tmp_path, "--seq-len", 16, *options)
    assert result.exit_code == 0, result.output
    assert (
        "layers are trained as by --no-recover: BertForMaskedLM has no perp"
        in words(result.output)
    )


def test_other_modifiers_are_named(tmp_path: Path) -> None:
    quantization = "QuantizationModifier:\n      scheme: W8A8\n      "
    file = recipe(tmp_path, SPARSE + "      mask_structure: '2:4'\n", quantization)
    result = invoke("plan", checkpoint("llama"), "--seq-len", 16, "--recipe", file)
    assert result.exit_code == 0, result.output
    assert "What QuantizationModifier will take is not predicted" in result.output
    result = invoke(
        "plan", checkpoint("llama"), "--recipe", recipe(tmp_path, quantization)
    )
    assert result.exit_code == 1
    assert "what they take cannot be predicted" in words(result.output)


@pytest.mark.parametrize(
    "options",
    [
        ["--pattern", "5:7"],
        ["--pattern", "3:2"],
        ["--sparsity", "0.2"],
        ["--pattern", "2:4", "--method", "fasp"],
        ["--method", "fasp", "--sparsity", "1.5"],
        ["--method", "spap", "--sparsity", "0.2"],
        ["--method", "fasp", "--sparsity", "0.2", "--structure", "attention"],
        ["--method", "fasp", "--sparsity", "0.2", "--preset", "best"],
        ["--recipe", "nowhere.yaml"],
        "      sparsity: [0.5, 0.5, 0.5]\n",
        "      sparsity: 0.5\n      patterns: {'re:.*nothing': '2:4'}\n",
        "      patterns: {'re:.*up_proj': '2:4'}\n",
        "      sparsity: 0.5\n      layers: 0-9\n      resume_dir: kept\n",
        "      sparsity: 0.5\n      targets: [Nothing]\n",
    ],
)
def test_a_run_that_is_refused_is_not_planned(
    options: list[str] | str, model: Path, tmp_path: Path
) -> None:
    if isinstance(options, str):
        options = ["--recipe", str(recipe(tmp_path, SPARSE + options))]
    text = tmp_path / "text.txt"
    text.write_text("some words " * 100)
    small = ["--dataset", text, "--samples", "2", "--seq-len", "16"]
    real = invoke("prune", model, "-o", tmp_path / "out", *options, *small)
    planned = invoke("plan", model, "--seq-len", "16", *options)
    assert real.exit_code == planned.exit_code == 1
    assert "error: " in planned.output
    assert message(planned.output) == message(real.output)


def message(output: str) -> str:
    return words(output[output.index("error: ") :])


def test_channels_that_cannot_leave_are_refused_as_by_the_run() -> None:
    modifier = FASPPruningModifier(
        sparsity=0.2, structures=["heads"], multiple_of=4, ignore=IGNORE
    )
    with pytest.raises(ValueError, match="has no heads channels") as planned:
        foreseen([modifier], tiny_model("opt"))
    with pytest.raises(ValueError) as refused:
        run(tiny_model("opt"), modifier)
    assert str(planned.value) == str(refused.value)


def test_groups_that_are_to_be_quantised_divide_the_new_width() -> None:
    wide = {"hidden_size": 128, "intermediate_size": 512}
    modifiers = [
        FASPPruningModifier(sparsity=0.3, multiple_of=64, ignore=IGNORE),
        QuantizationModifier(scheme="W4A16", ignore=IGNORE),
    ]
    with pytest.raises(ValueError, match="in groups of 128: set multiple_of: 128"):
        foreseen(modifiers, tiny_model("llama", **wide))


def test_channels_leave_before_zeros_are_made() -> None:
    modifiers = [
        FISTAPruningModifier(mask_structure="2:4", ignore=IGNORE),
        FASPPruningModifier(sparsity=0.2, multiple_of=4, ignore=IGNORE),
    ]
    with pytest.raises(ValueError, match="take channels out first"):
        foreseen(modifiers, tiny_model("llama"))
