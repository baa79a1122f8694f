"""Real ``oneshot()`` runs on tiny random models."""

from __future__ import annotations

import copy
import gc
import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.config import SparsityCompressionConfig
from families import FAMILIES, MULTIMODAL, checkpoint, tiny_model
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from logs import logged
from runs import calibration, prune, run, samples, weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fista_modifier import FISTAPruningModifier
from fista_modifier.checkpoint.verification import verify
from fista_modifier.solver import SparsityPattern, parse_pattern

# those that quantise as well, or have several patterns, have tests of their own
RECIPES = sorted(
    path
    for path in (Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml")
    if not re.search("quantization_stage|patterns:|FASP|SPAP", path.read_text())
)
# values of λ to try, and iterations for each, where the result need not be good
QUICK = {"max_iterations": 3, "patience": 1}


def oriented(model: PreTrainedModel, name: str) -> Tensor:
    """The weight of an operator, out×in."""
    module = model.get_submodule(name)
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def assert_pruned_exactly(weight: Tensor, pattern: SparsityPattern) -> None:
    assert int((weight == 0).sum()) == round(pattern.sparsity * weight.numel())
    assert pattern.holds(weight)
    assert bool(weight.isfinite().all())


def unchanged(name: str, weight: Tensor, before: Tensor) -> bool:
    """The toolkit adds 1 to Gemma's norm weights for a run and subtracts it again."""
    if name.endswith("norm.weight"):
        rounding = torch.finfo(weight.dtype).eps * (1 + before.abs())
        return bool(((weight - before).abs().nan_to_num() <= rounding).all())
    return torch.equal(weight.nan_to_num(), before.nan_to_num())


def pruned_names(model: PreTrainedModel, dense: dict[str, Tensor]) -> set[str]:
    """Modules with a weight that differs from the dense model's."""
    return {
        name.removesuffix(".weight")
        for name, weight in weights(model).items()
        if not unchanged(name, weight, dense[name])
    }


def without_biases(changed: set[str], operators: set[str]) -> set[str]:
    """All but biases of operators, whose entries an order of channels moves."""
    return changed - {f"{name}.bias" for name in operators}


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    expected = weights(other)
    return all(torch.equal(w, expected[name]) for name, w in weights(one).items())


def hooks(model: PreTrainedModel) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in model.modules()
    )


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(samples()).logits


@pytest.mark.parametrize(
    "dtype, mask_structure",
    [
        (torch.float32, "2:4"),
        (torch.float32, "0:0"),
        (torch.bfloat16, "2:4"),
        (torch.float16, "2:4"),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_exact_usable_and_otherwise_unchanged(
    family, dtype, mask_structure, tmp_path
):
    model, dense = tiny_model(family, dtype), weights(tiny_model(family, dtype))
    hooks_before = hooks(model)
    modifier = prune(model, mask_structure=mask_structure, sparsity=0.5)

    operators = FAMILIES[family].operators
    assert {result.name for result in modifier.results} == operators
    pattern = parse_pattern(mask_structure, 0.5)
    for name in operators:
        assert_pruned_exactly(oriented(model, name), pattern)
    # so embeddings, norms and lm_head are as they were, and biases without an order
    changed = pruned_names(model, dense)
    if mask_structure == "0:0":
        assert changed == operators
    assert without_biases(changed, operators) == operators
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert hooks(model) == hooks_before

    tied = model.config.tie_word_embeddings
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    tokens = model.generate(samples()[:1], max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] > samples().shape[1]

    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = json.loads((checkpoint(family) / "config.json").read_text())
    assert config.keys() - expected.keys() == {"sparsity_config"}
    recorded = SparsityCompressionConfig(**config["sparsity_config"])
    structure = "unstructured" if mask_structure == "0:0" else mask_structure
    assert recorded.sparsity_structure == structure
    zeros = sum(result.zeros for result in modifier.results)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert recorded.global_sparsity == pytest.approx(zeros / parameters, abs=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("mask_structure", ["1:4", "3:4", "4:8"])
def test_other_patterns_are_exact_too(family, mask_structure):
    model = tiny_model(family)
    prune(model, mask_structure=mask_structure, **QUICK)
    for name in FAMILIES[family].operators:
        pattern = parse_pattern(mask_structure, None)
        assert_pruned_exactly(oriented(model, name), pattern)


@pytest.mark.parametrize("start", ["dense", "magnitude", "wanda", "sparsegpt", "admm"])
def test_results_tell_what_became_of_each_operator(start):
    model = tiny_model("llama")
    modifier = prune(model, warm_start=start, error_correction="none")
    for result in modifier.results:
        weight = oriented(model, result.name)
        assert result.shape == weight.shape
        assert result.zeros == int((weight == 0).sum())
        assert result.sparsity == 0.5
        assert result.tokens == samples().numel()
        assert result.kind == result.name.split(".")[-1]
        assert 0 < result.relative_error <= result.relative_start_error < 1
        assert result.trials > 0 and result.iterations > 0


# ---- recipes


YAML = """
pruning_stage:
  pruning_modifiers:
    FISTAPruningModifier:
      mask_structure: "2:4"
      warm_start: wanda
      max_iterations: 3
      ignore: ["re:.*lm_head", "re:.*down_proj"]
"""


@pytest.mark.parametrize(
    "fields", [{}, {"error_correction": "full"}, {"preset": "paper"}]
)
def test_the_default_dtype_changes_nothing(fields: dict[str, Any]) -> None:
    plain, other = tiny_model("llama"), tiny_model("llama")
    prune(plain, **fields)
    torch.set_default_dtype(torch.bfloat16)
    try:
        prune(other, **fields)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in weights(plain).items():
        assert torch.equal(weights(other)[name], value), name


def test_a_recipe_may_be_yaml_a_file_or_an_object(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML)
    modifier = FISTAPruningModifier(
        mask_structure="2:4",
        warm_start="wanda",
        max_iterations=3,
        ignore=["re:.*lm_head", "re:.*down_proj"],
    )
    by_text, by_file, by_object = (
        run(tiny_model("llama"), recipe) for recipe in [YAML, str(path), modifier]
    )
    assert same(by_text, by_file)
    assert same(by_text, by_object)
    dense = weights(tiny_model("llama"))
    operators = FAMILIES["llama"].operators
    kept = {name for name in operators if name.endswith("down_proj")}
    assert pruned_names(by_text, dense) == operators - kept


def test_a_model_may_be_a_path_or_an_object():
    by_object = run(tiny_model("llama"), YAML)
    by_path = run(str(checkpoint("llama")), YAML)
    assert same(by_path, by_object)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_project_run(path):
    model = run(tiny_model("llama"), str(path))
    mask_structure = re.search(r'mask_structure: "(.*)"', path.read_text())
    assert mask_structure is not None
    for name in FAMILIES["llama"].operators:
        pattern = parse_pattern(mask_structure[1], 0.5)
        assert_pruned_exactly(oriented(model, name), pattern)


def test_there_are_recipes():
    assert RECIPES


def test_the_recipe_saved_with_a_model_gives_the_same_weights(tiny_tokenizer, tmp_path):
    modifier = FISTAPruningModifier(
        sparsity=0.6,
        warm_start="magnitude",
        ignore=["re:.*lm_head", "re:.*fc1"],
        xi=0.4,
    )
    first = run(
        tiny_model("opt"), modifier, output_dir=tmp_path, processor=tiny_tokenizer
    )
    again = run(tiny_model("opt"), str(tmp_path / "recipe.yaml"))
    assert same(first, again)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), first)


def test_the_toolkits_own_modifiers_may_follow_in_a_recipe():
    model = tiny_model("llama")
    ignore = ["re:.*lm_head"]
    wanda = WandaPruningModifier(
        sparsity=0.5, mask_structure="0:0", targets=["re:.*v_proj"], ignore=ignore
    )
    fista = FISTAPruningModifier(
        mask_structure="2:4", targets=["re:.*down_proj"], **QUICK
    )
    run(model, [fista, wanda])
    down, v = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.v_proj"
    assert_pruned_exactly(oriented(model, down), parse_pattern("2:4", None))
    assert_pruned_exactly(oriented(model, v), parse_pattern("0:0", 0.5))


# ---- pipelines


BASIC, SHARED = {"pipeline": "basic"}, {"pipeline": "sequential"}
PAIRS = {"sequential_targets_per_subgraph": 2}


@pytest.mark.parametrize(
    "family, correction, arguments",
    [
        ("llama", "intra", SHARED),
        ("llama", "full", BASIC),
        ("mistral", "intra", BASIC),
        ("mistral", "full", PAIRS),
        ("gpt2", "intra", PAIRS),
    ],
    ids=str,
)
def test_every_pipeline_gives_the_same_weights(family, correction, arguments):
    """The same runs of the same layers; only rounding may differ."""
    default, other = tiny_model(family), tiny_model(family)
    fields = {"error_correction": correction, **QUICK}
    prune(default, **fields)
    prune(other, oneshot_arguments=arguments, **fields)
    expected = weights(default)
    for name, weight in weights(other).items():
        assert torch.equal(weight == 0, expected[name] == 0), name
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


# ---- targets


def test_a_layers_class_stands_for_its_operators():
    by_layer, by_operator = tiny_model("llama"), tiny_model("llama")
    prune(by_layer, targets=["LlamaDecoderLayer"], **QUICK)
    prune(by_operator, targets="Linear", ignore=["re:.*lm_head"], **QUICK)
    assert same(by_layer, by_operator)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_targets_and_ignore_choose_modules(family):
    model, dense = tiny_model(family), weights(tiny_model(family))
    operators = FAMILIES[family].operators
    prune(model, targets=["re:.*0$"], ignore=["re:.*c_attn", "re:.*q_proj"], **QUICK)
    first = {name for name in operators if ".0." in name}
    ignored = {name for name in first if name.endswith(("c_attn", "q_proj"))}
    assert ignored
    assert without_biases(pruned_names(model, dense), first) == first - ignored


def test_ignore_may_name_a_whole_layer():
    model, dense = tiny_model("llama"), weights(tiny_model("llama"))
    prune(model, ignore=["model.layers.1", "re:.*mlp$"], **QUICK)
    kept = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert pruned_names(model, dense) == {f"model.layers.0.self_attn.{k}" for k in kept}


def test_an_untied_output_embedding_is_pruned_if_named():
    model, dense = tiny_model("llama"), weights(tiny_model("llama"))
    modifier = prune(model, targets=["Linear", "lm_head"], **QUICK)
    assert modifier.results[-1].name == "lm_head"
    assert_pruned_exactly(model.lm_head.weight, parse_pattern("2:4", None))
    assert modifier.results[-1].relative_error > 0
    assert pruned_names(model, dense) == FAMILIES["llama"].operators | {"lm_head"}


def test_an_output_embedding_may_be_pruned_alone():
    model, dense = tiny_model("llama"), weights(tiny_model("llama"))
    prune(model, targets="lm_head", **QUICK)
    assert pruned_names(model, dense) == {"lm_head"}


# ---- what cannot be pruned


def refused(
    model: PreTrainedModel, error: type[Exception], match: str, work: Callable[[], Any]
) -> None:
    """No operator may have been run, no weight changed and no hook left."""
    before, config, hooks_before = weights(model), model.config.to_dict(), hooks(model)
    runs = []
    watched = [
        module.register_forward_pre_hook(lambda *_: runs.append(1))
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    with pytest.raises(error, match=match):
        work()
    for handle in watched:
        handle.remove()
    assert not runs
    assert hooks(model) == hooks_before
    assert model.config.to_dict() == config
    assert not pruned_names(model, before)


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"targets": ["Linear", "Lineal"]}, "'Lineal' matches no module of Llama"),
        ({"targets": ["re:.*layers.7"]}, "'re:.*layers.7' matches no module"),
        ({"ignore": ["Linear"]}, r"ignore \['Linear'\] leave no linear operator"),
        ({"targets": ["LlamaRMSNorm"]}, "leave no linear operator"),
        (
            {"mask_structure": "2:3"},
            r"model\.layers\.0\.self_attn\.q_proj: '2:3' .* divisible by 3, got 32",
        ),
    ],
)
def test_a_recipe_that_does_not_suit_the_model_is_refused_at_once(fields, match):
    model = tiny_model("llama")
    refused(model, ValueError, match, lambda: prune(model, **fields))


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"mask_structure": "5:4"}, "'5:4'"),
        ({"mask_structure": "0:0"}, "sparsity is missing"),
        ({"sparsity": 50, "mask_structure": "0:0"}, "write 0.5"),
        ({"sparsity": 0.5, "mask_structure": "1:4"}, "contradicts"),
        ({"lambda_init": 1.0, "lambda_max": 1.0}, r"lambda_init \(1.0\) must be below"),
        ({"lambda_init": 0.0}, "lambda_init"),
        ({"lambda_max": float("inf")}, "lambda_max"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"patience": -1}, "patience"),
        ({"epsilon": -1e-3}, "epsilon"),
        ({"xi": 1.0}, "xi"),
        ({"warm_start": "random"}, "warm_start"),
        ({"preset": "better"}, "preset"),
        ({"error_correction": "inter"}, "error_correction"),
        ({"preset": "best", "distribute": "layers"}, "preset: best"),
        (
            {"error_correction": "full", "layers": "0", "resume_dir": "folder"},
            "layers cannot be shared out",
        ),
        ({"sparsiti": 0.5}, "sparsiti"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(fields, match):
    with pytest.raises(ValueError, match=match):
        FISTAPruningModifier(**({"mask_structure": "2:4"} | fields))


def test_an_unknown_field_of_a_yaml_recipe_is_named():
    model = tiny_model("llama")
    recipe = YAML.replace("max_iterations", "iterations")
    refused(model, ValueError, "iterations", lambda: run(model, recipe))


def test_a_run_without_data_is_refused_at_once():
    model = tiny_model("llama")
    match = "needs calibration data: pass dataset="
    refused(model, ValueError, match, lambda: run(model, YAML, dataset=None))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "family, name",
    [
        ("llama", "model.layers.1.mlp.up_proj"),
        ("gpt2", "transformer.h.0.attn.c_attn"),
    ],
)
def test_a_broken_weight_is_named_at_once(family, name, broken):
    model = tiny_model(family)
    model.get_submodule(name).weight.data[2, 3] = broken
    match = re.escape(f"the weight of {name} contains NaN or infinity")
    refused(model, ValueError, match, lambda: prune(model))


def test_operators_as_sequential_targets_are_refused_at_once():
    model = tiny_model("llama")
    arguments = {"sequential_targets": ["Linear"]}
    refused(
        model,
        ValueError,
        "is a linear operator itself.*leave sequential_targets out",
        lambda: prune(model, oneshot_arguments=arguments),
    )


def test_a_shared_calibration_epoch_is_refused_at_once():
    model = tiny_model("llama")
    recipe = [
        FISTAPruningModifier(mask_structure="2:4"),
        WandaPruningModifier(sparsity=0.5),
    ]
    refused(
        model,
        ValueError,
        "cannot share a calibration epoch with WandaPruningModifier: .*'independent'",
        lambda: run(model, recipe, pipeline="sequential"),
    )


def quantization() -> QuantizationModifier:
    return QuantizationModifier(
        targets=["Linear"], scheme="W8A8", ignore=["re:.*lm_head"]
    )


def test_quantising_before_pruning_is_refused_at_once():
    model = tiny_model("llama")
    dense = weights(model)
    with pytest.raises(ValueError, match="q_proj is quantised: prune first"):
        run(model, [quantization(), FISTAPruningModifier(mask_structure="2:4")])
    after = weights(model)
    assert all(torch.equal(after[name], weight) for name, weight in dense.items())


def test_a_quantised_checkpoint_is_refused_at_once(tiny_tokenizer, tmp_path):
    run(
        tiny_model("llama"),
        quantization(),
        output_dir=tmp_path,
        processor=tiny_tokenizer,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="prune the full-precision original"):
        prune(model)


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_a_tied_output_embedding_is_refused_if_named(family):
    model = tiny_model(family)
    match = "'lm_head' shares its weight with the input embedding"
    refused(
        model, ValueError, match, lambda: prune(model, targets=["Linear", "lm_head"])
    )


@pytest.mark.parametrize("layer, stage", [(0, 0), (1, 2)])
def test_broken_activations_are_named(layer, stage):
    """Found only while calibrating; what was to be stored later stays dense."""
    model = tiny_model("llama")
    norm = ["input_layernorm", None, "post_attention_layernorm"][stage]
    model.get_submodule(f"model.layers.{layer}.{norm}").weight.data[3] = torch.inf
    names = ", ".join(
        f"model.layers.{layer}.{name}" for name in FAMILIES["llama"].stages[stage]
    )
    with pytest.raises(ValueError, match=f"the input of {re.escape(names)} contains"):
        prune(model)


def test_a_model_may_be_pruned_after_a_run_that_failed():
    model, fresh = tiny_model("llama"), tiny_model("llama")
    norm = model.model.layers[1].input_layernorm.weight
    intact = norm.detach().clone()
    norm.data[3] = torch.inf
    with pytest.raises(ValueError):
        prune(model, **QUICK)
    norm.data.copy_(intact)
    model.load_state_dict(fresh.state_dict())
    hooks_before = hooks(fresh)
    prune(model, **QUICK)
    prune(fresh, **QUICK)
    assert same(model, fresh)
    assert hooks(model) == hooks_before
    assert model.config.to_dict() == fresh.config.to_dict()


def test_a_run_that_ended_in_the_toolkits_own_pass_leaves_nothing_to_the_next():
    """No event tells of it; the session undoes it when the next one starts."""
    model, fresh = tiny_model("llama"), tiny_model("llama")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    ending = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune(model, **QUICK)
    ending.remove()
    prune(model, **QUICK)
    prune(fresh, **QUICK)
    assert same(model, fresh)
    assert hooks(model) == hooks(fresh)
    assert model.config.to_dict() == fresh.config.to_dict()


def test_layers_that_the_data_do_not_reach_stay_dense_and_are_named(tmp_path):
    """The vision tower of Gemma 3, which is given text."""
    model = tiny_model("gemma3_vision")
    dense = copy.deepcopy(model.model.vision_tower)
    with logged() as messages:
        modifier = prune(model, **QUICK)
    names = {result.name for result in modifier.results}
    assert names == MULTIMODAL["gemma3_vision"].operators
    assert modifier.unfinished == []
    assert same(model.model.vision_tower, dense)
    [message] = [one for one in messages if "do not reach" in one]
    assert "model.vision_tower" in message
    model.save_pretrained(tmp_path)
    checked = verify(tmp_path)
    assert checked.passed, checked
    assert {check.name for check in checked.operators} == names


def test_a_run_that_failed_leaves_the_configuration_as_it_was():
    model = tiny_model("llama")
    model.model.layers[0].input_layernorm.weight.data[3] = torch.inf
    with pytest.raises(ValueError):
        prune(model)
    assert model.config.to_dict() == tiny_model("llama").config.to_dict()
    assert hooks(model) == 0


def test_data_of_one_token_are_enough_to_be_exact():
    model = tiny_model("llama")
    data = calibration(samples()[:1, :1])
    modifier = prune(model, oneshot_arguments={"dataset": data})
    for name in FAMILIES["llama"].operators:
        assert_pruned_exactly(oriented(model, name), parse_pattern("2:4", None))
    assert all(result.tokens == 1 for result in modifier.results)


def test_a_pruned_model_is_let_go_of():
    """The toolkit's tracer alone would keep it for as long as the process lives."""

    def pruned() -> weakref.ref[torch.nn.Module]:
        model = tiny_model("llama")
        prune(model)
        return weakref.ref(model)

    kept = [pruned() for _ in range(3)]
    gc.collect()
    assert [reference() for reference in kept[:2]] == [None, None]


def test_fields_that_are_set_later_are_checked_before_anything_is_pruned(
    tmp_path: Path,
) -> None:
    """The command line gives a recipe's modifiers their layers so."""
    for fields, match in (
        ({"preset": "best", "resume_dir": str(tmp_path)}, "cannot be shared"),
        ({}, "needs a resume_dir"),
    ):
        model = tiny_model("llama")
        before = weights(model)
        modifier = FISTAPruningModifier(mask_structure="2:4", **fields)
        modifier.layers = "1"
        with pytest.raises(ValueError, match=match):
            run(model, modifier)
        assert all(torch.equal(weights(model)[one], before[one]) for one in before)
