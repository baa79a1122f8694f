"""FASP and SPAP through ``oneshot()``: smaller models that load, and their errors."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, MIXTURES, checkpoint, tiny_model
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from logs import logged
from ranks import outputs, start
from runs import calibration as data
from runs import run, samples, weights
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from fista_modifier import (
    FASPPruningModifier,
    FISTAPruningModifier,
    SPAPPruningModifier,
)
from fista_modifier.calibration.recording import Recorded
from fista_modifier.calibration.stages import Stage
from fista_modifier.calibration.statistics import wave_statistics
from fista_modifier.channels.groups import ChannelGroup, Members
from fista_modifier.checkpoint.verification import verify
from fista_modifier.models.experts import linearize
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.operators import Operator
from fista_modifier.modifiers.structured import StructuredModifier
from fista_modifier.pruning import corrected
from fista_modifier.pruning.channels import GroupPlan, check_apart
from fista_modifier.pruning.procedures import LayerTask, PrunedLayer
from fista_modifier.pruning.results import OperatorResult, PruningReport
from fista_modifier.pruning.resume import FinishedLayers
from fista_modifier.solver import GramStatistics, parse_pattern

ZOO = Path(__file__).parents[1] / "zoo" / "configurations.json"
METHODS = {"fasp": FASPPruningModifier, "spap": SPAPPruningModifier}
WIDTHS = {"opt": "ffn_dim", "gpt2": "n_inner", "qwen3_moe": "moe_intermediate_size"}
"""
The names that configurations give to the number of an MLP's channels, where it is not
"intermediate_size".
"""
SIZES = {
    "opt": (48, 24),
    "gpt2": (48, 24),
    "mixtral": (48, 36),
    "qwen3_moe": (16, 12),
}
"""
The number of an MLP's channels in the dense model and at a sparsity of 0.2, where they
are not 48 and 32.
"""
TESTED = [
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "opt", "gpt2"),
    *("mixtral", "qwen3_moe"),
]
EXACT = {"restorer": "none", "reconstruction_epochs": 0}
UNTRAINED = {"preset": "paper"}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
"""The settings of a model with so many heads that some of them can leave."""


def shrink(
    model: PreTrainedModel,
    method: str = "fasp",
    oneshot_arguments: dict[str, Any] | None = None,
    **fields: Any,
) -> FASPPruningModifier | SPAPPruningModifier:
    """
    :param model: pruned in place
    :param method: a key of ``METHODS``
    :param oneshot_arguments: further arguments of ``oneshot()``
    :param fields: of the modifier
    :return: the modifier, with its results
    """
    modifier = METHODS[method](**({"sparsity": 0.2, "multiple_of": 4} | fields))
    run(model, modifier, **(oneshot_arguments or {}))
    return modifier


def decoder_layers(model: PreTrainedModel, family: str) -> torch.nn.ModuleList:
    return model.get_submodule((FAMILIES | MIXTURES)[family].layers)


def size_of_layers(model: PreTrainedModel, family: str) -> int:
    return sum(one.numel() for one in decoder_layers(model, family).parameters())


def logits(model: PreTrainedModel, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(samples() if tokens is None else tokens).logits


def seen(
    model: PreTrainedModel, names: Iterable[str], tokens: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of operators in a plain run, tokens×features."""
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    handles = []
    for name in names:

        def hook(_: Any, args: Any, output: Tensor, name: str = name) -> None:
            inputs.setdefault(name, []).append(args[0].flatten(0, -2))
            outputs.setdefault(name, []).append(output.flatten(0, -2))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    for row in samples() if tokens is None else tokens:
        logits(model, row[None])
    for handle in handles:
        handle.remove()
    return (
        {name: torch.cat(some) for name, some in inputs.items()},
        {name: torch.cat(some) for name, some in outputs.items()},
    )


def oriented(model: PreTrainedModel, name: str) -> Tensor:
    """The weight of an operator, out×in."""
    module = model.get_submodule(name)
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def relative_errors(
    small: PreTrainedModel, dense: PreTrainedModel, family: str, names: list[str]
) -> dict[str, tuple[float, int]]:
    """
    Of each operator, and its tokens, in plain runs of the dense model and of one that
    has one layer of the small one.
    """
    for model in (dense, small):  # other kernels leave out Gemma 2's soft caps
        model.set_attn_implementation("eager")
    _, expected = seen(dense, names)
    layers, smaller = decoder_layers(dense, family), decoder_layers(small, family)
    found = {}
    for index, own in enumerate(list(layers)):
        start = f"{(FAMILIES | MIXTURES)[family].layers}.{index}."
        here = [name for name in names if name.startswith(start)]
        layers[index] = smaller[index]
        _, outputs = seen(dense, here)
        layers[index] = own
        for name in here:
            bias = dense.get_submodule(name).bias
            without = expected[name] - (0 if bias is None else bias)
            error = (outputs[name] - expected[name]).norm() / without.norm()
            found[name] = float(error), len(without)
    return found


def layer_errors(
    small: PreTrainedModel, dense: PreTrainedModel, family: str
) -> list[float]:
    """The mean of ‖o* − o‖² / ‖o‖² over tokens, of each layer by itself"""
    for model in (dense, small):
        model.set_attn_implementation("eager")
    layers, smaller = decoder_layers(dense, family), decoder_layers(small, family)
    errors = []
    for index, own in enumerate(list(layers)):
        outputs = []
        for layer in (own, smaller[index]):
            layers[index] = layer
            got: list[Tensor] = []
            handle = layer.register_forward_hook(
                lambda _module, _args, output, got=got: got.append(
                    output[0] if isinstance(output, tuple) else output
                )
            )
            logits(dense)
            handle.remove()
            outputs.append(got[0])
        layers[index] = own
        before, after = outputs
        squares = (after - before).square().sum(-1) / before.square().sum(-1)
        errors.append(float(squares.mean()))
    return errors


def check_loads(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """:return: config.json"""
    model.save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    reloaded.set_attn_implementation(model.config._attn_implementation)
    assert reloaded.dtype == model.dtype
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-4)
    verification = verify(folder)
    assert verification.passed, (verification.problems, verification.failures)
    assert verification.operators
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("correction", ["none", "intra"])
@pytest.mark.parametrize("family", TESTED)
def test_a_family_as_published(
    family: str, correction: str, method: str, tmp_path: Path
) -> None:
    dense, small = tiny_model(family), tiny_model(family)
    linearize(dense)
    modifier = shrink(small, method, **UNTRAINED, error_correction=correction)
    before, after = size_of_layers(dense, family), size_of_layers(small, family)
    assert modifier.removed == pytest.approx(1 - after / before, rel=1e-12)
    assert modifier.removed == pytest.approx(0.2, abs=0.05)
    width, kept = SIZES.get(family, (48, 32))
    names = [result.name for result in modifier.results]
    assert names and modifier.share_of_weights > 0
    for result in modifier.results:
        assert result.shape == (32, kept)
        assert result.pattern == f"{kept} of {width} columns"
        assert result.zeros == 0
    errors = relative_errors(small, dense, family, names)
    for result in modifier.results:
        error, tokens = errors[result.name]
        assert result.tokens == tokens
        assert result.relative_error == pytest.approx(error, rel=1e-3, abs=1e-5)
    assert check_loads(small, tmp_path)[WIDTHS.get(family, "intermediate_size")] == kept
    report = json.loads((tmp_path / "pruning_report.json").read_text())
    assert report["removed_share"] == modifier.removed
    assert list(report["sizes"].values()) == [kept]


@pytest.mark.parametrize("family", TESTED)
def test_training_makes_no_layer_worse(family: str, tmp_path: Path) -> None:
    dense, small, untrained = (tiny_model(family) for _ in range(3))
    linearize(dense)
    modifier = shrink(small)
    shrink(untrained, reconstruction_epochs=0)
    assert len(modifier.reconstructions) == 2
    for outcome in modifier.reconstructions.values():
        assert outcome.error <= outcome.start_error
    assert any(outcome.steps for outcome in modifier.reconstructions.values())
    first = next(iter(modifier.reconstructions.values()))
    with_training, without = (
        layer_errors(one, dense, family) for one in (small, untrained)
    )
    # measured on one batch of six, and these are all of them
    if first.steps:
        assert with_training[0] < 1.1 * without[0]
    check_loads(small, tmp_path)


@pytest.mark.parametrize("family", TESTED)
def test_a_cut_layer_is_the_one_whose_channels_nobody_reads(family: str) -> None:
    dense, small = tiny_model(family), tiny_model(family)
    linearize(dense)
    modifier = shrink(small, **EXACT)
    for result in modifier.results:
        weight = oriented(dense, result.name)
        columns = oriented(small, result.name)
        # of random weights no two columns are equal
        kept = (weight[:, :, None] == columns[:, None]).all(0)
        assert int(kept.sum()) == columns.shape[1]
        assert bool(kept.any(0).all())
        weight[:, ~kept.any(1)] = 0
    torch.testing.assert_close(logits(small), logits(dense))


@pytest.mark.parametrize("correction", ["none", "intra"])
def test_the_mean_of_what_is_put_out_stays_where_there_is_a_bias(
    correction: str,
) -> None:
    dense, small = tiny_model("opt"), tiny_model("opt")
    modifier = shrink(small, **UNTRAINED, error_correction=correction)
    layers, smaller = decoder_layers(dense, "opt"), decoder_layers(small, "opt")
    for index, result in enumerate(modifier.results):
        _, before = seen(dense, [result.name])
        own, layers[index] = layers[index], smaller[index]
        _, after = seen(dense, [result.name])
        layers[index] = own
        (one,), (other,) = before.values(), after.values()
        torch.testing.assert_close(one.mean(0), other.mean(0), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(one, other, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("structures", [["heads"], ["mlp", "heads"]], ids="-".join)
def test_whole_heads_leave(family: str, structures: list[str], tmp_path: Path) -> None:
    dense, small = tiny_model(family, **HEADS), tiny_model(family, **HEADS)
    sparsity = 0.5 if "mlp" in structures else 0.2
    fields: dict[str, Any] = {"structures": structures, "sparsity": sparsity}
    modifier = shrink(small, **UNTRAINED, error_correction="intra", **fields)
    before, after = size_of_layers(dense, family), size_of_layers(small, family)
    assert modifier.removed == pytest.approx(1 - after / before, rel=1e-12)
    assert modifier.removed == pytest.approx(sparsity, abs=0.03)
    config = check_loads(small, tmp_path)
    assert config["num_attention_heads"] == 4
    assert config["num_key_value_heads"] == 2
    assert config["head_dim"] == 4
    assert (config["intermediate_size"] == 24) == ("mlp" in structures)
    assert small.config.num_key_value_heads == 2
    names = [result.name for result in modifier.results]
    assert len(names) == 2 * len(structures)
    errors = relative_errors(small, dense, family, names)
    for result in modifier.results:
        error, tokens = errors[result.name]
        assert result.tokens == tokens
        assert result.relative_error == pytest.approx(error, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "restorer"),
    [("llama", "least_squares"), ("opt", "least_squares"), ("opt", "bias")],
)
@pytest.mark.parametrize("selector", ["magnitude", "flap", "greedy", "local"])
def test_peers_make_smaller_models(
    family: str, selector: str, restorer: str, tmp_path: Path
) -> None:
    dense, small = tiny_model(family), tiny_model(family)
    fields = UNTRAINED | {"selector": selector, "restorer": restorer}
    modifier = shrink(small, **fields, error_correction="none")
    check_loads(small, tmp_path)
    names = [result.name for result in modifier.results]
    errors = relative_errors(small, dense, family, names)
    for result in modifier.results:
        error, _ = errors[result.name]
        assert result.relative_error == pytest.approx(error, rel=1e-3, abs=1e-5)


def test_heads_leave_a_model_with_as_many_layers() -> None:
    small = tiny_model("llama", num_attention_heads=2, num_key_value_heads=2)
    shrink(small, **UNTRAINED, structures=["heads"], sparsity=0.2)
    config = small.config
    assert config.num_attention_heads == config.num_key_value_heads == 1
    assert config.num_hidden_layers == 2


def test_heads_are_cut_as_if_nobody_read_them() -> None:
    dense, small = tiny_model("llama", **HEADS), tiny_model("llama", **HEADS)
    modifier = shrink(small, **EXACT, structures=["mlp", "heads"], sparsity=0.5)
    for result in modifier.results:
        weight, columns = oriented(dense, result.name), oriented(small, result.name)
        kept = (weight[:, :, None] == columns[:, None]).all(0).any(1)
        weight[:, ~kept] = 0
    torch.testing.assert_close(logits(small), logits(dense))


def test_heads_and_channels_are_trained_together(tmp_path: Path) -> None:
    small = tiny_model("llama", **HEADS)
    modifier = shrink(small, structures=["mlp", "heads"], sparsity=0.5)
    for outcome in modifier.reconstructions.values():
        assert outcome.error <= outcome.start_error
    check_loads(small, tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("fields", [{}, UNTRAINED], ids=["default", "paper"])
def test_an_expert_without_tokens_is_as_small_as_the_others(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    dense, small = tiny_model(family), tiny_model(family)
    linearize(dense)
    tokens = torch.full((2, 3), 5)
    with logged() as messages:
        modifier = shrink(small, **fields, oneshot_arguments={"dataset": data(tokens)})
    _, kept = SIZES.get(family, (48, 32))
    assert len(modifier.results) == 8
    without = [result for result in modifier.results if not result.tokens]
    assert 0 < len(without) < 8
    for result in without:
        told = f"No calibration token reaches {result.name}"
        assert any(told in text for text in messages)
    for layer in small.model.layers:
        for expert in range(4):
            one = layer.mlp.experts[expert]
            assert one.gate_proj.weight.shape == (kept, 32)
            assert one.up_proj.weight.shape == (kept, 32)
            assert one.down_proj.weight.shape == (32, kept)
    for result in without:  # by magnitude, and nothing is restored
        found, weight = oriented(small, result.name), oriented(dense, result.name)
        assert bool((weight[:, :, None] == found[:, None]).all(0).any(0).all())
    check_loads(small, tmp_path)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["opt", "mixtral"])
@pytest.mark.parametrize("correction", ["none", "intra", "full"])
def test_an_interrupted_run_goes_on(
    family: str, correction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"error_correction": correction, "resume_dir": str(tmp_path / "layers")}
    whole, interrupted, resumed = (tiny_model(family) for _ in range(3))
    shrink(whole, error_correction=correction)
    save = FinishedLayers.save

    def save_one(self: FinishedLayers, *arguments: Any) -> None:
        if list(self.folder.glob("*.safetensors")):
            raise KeyboardInterrupt
        save(self, *arguments)

    monkeypatch.setattr(FinishedLayers, "save", save_one)
    with pytest.raises(KeyboardInterrupt):
        shrink(interrupted, **fields)
    monkeypatch.undo()
    assert len(list((tmp_path / "layers").glob("*.safetensors"))) == 1
    modifier = shrink(resumed, **fields)
    assert_same(weights(resumed), weights(whole))
    assert len(modifier.reconstructions) == 2
    again = tiny_model(family)  # from disk alone
    modifier = shrink(again, **fields)
    assert_same(weights(again), weights(whole))
    assert modifier.removed > 0
    check_loads(again, tmp_path / "saved")


def test_two_runs_share_the_layers(tmp_path: Path) -> None:
    whole = tiny_model("llama")
    shrink(whole)
    folder = str(tmp_path / "layers")
    for layers, left in (("1", ["model.layers.0"]), ("0", [])):
        modifier = shrink(tiny_model("llama"), resume_dir=folder, layers=layers)
        assert modifier.unfinished == left
    together = tiny_model("llama")
    shrink(together, resume_dir=folder)
    assert_same(weights(together), weights(whole))
    check_loads(together, tmp_path / "saved")


def test_other_sizes_do_not_resume(tmp_path: Path) -> None:
    shrink(tiny_model("llama"), resume_dir=str(tmp_path))
    model = tiny_model("llama")
    dense = weights(model)
    with pytest.raises(ValueError, match="sparsity was 0.2 and is 0.3"):
        shrink(model, resume_dir=str(tmp_path), sparsity=0.3)
    assert_same(weights(model), dense)


@pytest.mark.parametrize(
    ("size", "family", "fields"),
    [
        (2, "opt", {}),
        (2, "mixtral", {"distribute": "data", "preset": "paper"}),
        (2, "opt", {"error_correction": "full", "preset": "paper"}),
    ],
)
def test_several_ranks_give_the_weights_of_one(
    size: int, family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"modifier": "FASPPruningModifier", "sparsity": 0.2, "multiple_of": 4}
    processes = start(size, tmp_path, family, settings | fields)
    for process, output in zip(processes, outputs(processes), strict=True):
        assert process.returncode == 0, output
    alone = tiny_model(family)
    modifier = shrink(alone, **fields)
    expected = weights(alone)
    for rank in range(size):
        found, names = torch.load(tmp_path / f"{rank}.pt")
        assert names == [result.name for result in modifier.results]
        # a weight that is shared between processes is named as often as it is tied
        assert found.keys() >= expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


QUANTISATION = {
    "W8A8": {"targets": ["Linear"], "scheme": "W8A8", "ignore": ["re:.*lm_head"]},
    "W4A16": {"targets": ["Linear"], "scheme": "W4A16", "ignore": ["re:.*lm_head"]},
}
WIDE = {"hidden_size": 128, "intermediate_size": 512}
"""The settings of a model that is wide enough for groups of 128 columns."""


def holds_2_of_4(model: PreTrainedModel) -> bool:
    pattern = parse_pattern("2:4", None)
    names = FAMILIES["llama"].operators
    return all(pattern.holds(model.get_submodule(name).weight) for name in names)


@pytest.mark.parametrize("structures", [["mlp"], ["mlp", "heads"]], ids="-".join)
def test_a_smaller_model_gets_a_pattern(structures: list[str], tmp_path: Path) -> None:
    model = tiny_model("llama", **HEADS)
    small = FASPPruningModifier(sparsity=0.5, multiple_of=4, structures=structures)
    sparse = FISTAPruningModifier(mask_structure="2:4")
    run(model, [small, sparse] if structures == ["mlp"] else RECIPE.format(structures))
    assert model.model.layers[0].mlp.down_proj.in_features < 48
    assert holds_2_of_4(model)
    config = check_loads(model, tmp_path)
    assert config["intermediate_size"] < 48
    assert "sparsity_config" in config
    report = PruningReport.load(tmp_path)
    assert report.removed_share == pytest.approx(
        1
        - size_of_layers(model, "llama")
        / size_of_layers(tiny_model("llama", **HEADS), "llama")
    )


RECIPE = """
small_stage:
  pruning_modifiers:
    FASPPruningModifier:
      sparsity: 0.5
      multiple_of: 4
      structures: {}
sparse_stage:
  pruning_modifiers:
    FISTAPruningModifier:
      mask_structure: "2:4"
"""


@pytest.mark.parametrize("scheme", QUANTISATION)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_smaller_model_is_quantised(
    scheme: str, sparse: bool, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama", **WIDE)
    quantisation = QuantizationModifier(**QUANTISATION[scheme])
    tokens = samples(8, 32, seed=1)
    run(
        model,
        [*smaller(sparse), quantisation],
        dataset=data(tokens),
        output_dir=tmp_path,
        processor=tiny_tokenizer,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    assert loaded.config.intermediate_size == 384
    assert not sparse or holds_2_of_4(loaded)
    verification = verify(tmp_path)
    assert verification.passed, (verification.problems, verification.failures)
    small = tiny_model("llama", **WIDE)
    run(small, smaller(sparse), dataset=data(tokens))
    for name in FAMILIES["llama"].operators:
        found, weight = oriented(loaded, name), oriented(small, name)
        share = float((found - weight).norm() / weight.norm())
        assert share < (0.02 if scheme == "W8A8" else 0.2), name


def smaller(sparse: bool) -> list[Any]:
    recipe: list[Any] = [SPAPPruningModifier(sparsity=0.2, multiple_of=128)]
    return [*recipe, FISTAPruningModifier(mask_structure="2:4")] if sparse else recipe


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_BLOCK"])
def test_groups_that_are_to_be_quantised_divide_the_new_width(scheme: str) -> None:
    model = tiny_model("llama", **WIDE)
    dense = weights(model)
    quantisation = QuantizationModifier(**QUANTISATION["W4A16"] | {"scheme": scheme})
    small = FASPPruningModifier(sparsity=0.3, multiple_of=64)
    with pytest.raises(ValueError, match="in groups of 128: set multiple_of: 128"):
        run(model, [small, quantisation])
    after = weights(model)
    assert all(torch.equal(after[name], value) for name, value in dense.items())


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({}, "42 columns .* set multiple_of to a multiple"),
        ({"patterns": {"re:.*down_proj": "0.5"}}, ""),
    ],
)
def test_groups_that_are_to_be_pruned_divide_the_new_width(
    second: dict[str, Any], message: str
) -> None:
    model = tiny_model("llama")
    dense = weights(model)
    small = FASPPruningModifier(sparsity=0.08, multiple_of=2, preset="paper")
    sparse = FISTAPruningModifier(mask_structure="2:4", preset="fast", **second)
    if not message:
        run(model, [small, sparse])
        assert model.config.intermediate_size == 42
        return
    with pytest.raises(ValueError, match=message):
        run(model, [small, sparse])
    assert_same(weights(model), dense)


def test_a_step_that_needs_all_layers_comes_after_no_step_of_some(
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    dense = weights(model)
    some = {"layers": "1", "resume_dir": str(tmp_path)}
    small = FASPPruningModifier(sparsity=0.2, multiple_of=4, **some)
    with pytest.raises(ValueError, match="leave layers out of the steps before"):
        run(model, [small, FISTAPruningModifier(mask_structure="2:4")])
    assert_same(weights(model), dense)


def zoo_model(name: str, folder: Path, **changes: Any) -> PreTrainedModel:
    case = json.loads(ZOO.read_text(encoding="utf-8"))[name]
    torch.manual_seed(0)
    settings = case["config"] | changes
    config = AutoConfig.for_model(case["model_type"], **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def check_refused(model: PreTrainedModel, message: str, **fields: Any) -> None:
    """Before anything was changed"""
    linearize(model)
    dense = weights(model)
    sizes = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        shrink(model, **fields)
    assert_same(weights(model), dense)
    assert model.config.to_dict() == sizes


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"multiple_of": 64}, "less than one multiple of 64"),
        ("llama", {"sparsity": 0.58}, "less than one multiple of 4"),
        ("llama", {"sparsity": 0.9}, "less than one multiple of 4"),
        ("llama", {"sparsity": 0.01}, "less than half a multiple of 4"),
        ("llama", {"sparsity": 0.01, "structures": ["heads"]}, "No heads leave"),
        ("opt", {"structures": ["heads"]}, "not all sizes that it computes with"),
        ("gpt2", {"structures": ["heads"]}, "not all sizes that it computes with"),
        ("phi3", {"structures": ["heads"]}, "not all sizes that it computes with"),
        ("phi3", {"structures": ["mlp", "heads"]}, "not all sizes that it computes"),
        ("qwen2", {"structures": ["heads"]}, "follows from the width of the model"),
        ("llama", {"targets": ["re:.*down_proj"]}, "gate_proj is none. Let targets"),
        ("llama", {"ignore": ["re:.*layers.1.mlp.up_proj"]}, "not all among targets"),
        ("mixtral", {"ignore": ["re:.*experts.1.up_proj"]}, "not all among targets"),
        ("llama", {"restorer": "bias"}, "down_proj, which has none"),
    ],
)
def test_what_cannot_leave_is_refused(
    family: str, fields: dict[str, Any], message: str
) -> None:
    check_refused(tiny_model(family), message, **fields)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_could_not_run_are_refused(family: str) -> None:
    """PyTorch's grouped products take rows of 16 bytes, or several times as many."""
    model = tiny_model(family, torch.bfloat16)
    check_refused(model, "only in multiples of 8: let multiple_of be one", **UNTRAINED)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_heads_leave_only_what_the_configuration_takes(
    family: str, tmp_path: Path
) -> None:
    """Some ask for a hidden size that is a multiple of the number of heads."""
    model = tiny_model(family, num_key_value_heads=4, head_dim=8)
    fields = {"sparsity": 0.1, "structures": ["heads"], **UNTRAINED}
    if family != "mistral":
        message = (
            r"multiple of the number of attention heads .* with 2 heads \(sparsity"
        )
        check_refused(model, message, **fields)
        shrink(model, **fields | {"sparsity": 0.179})
        assert model.config.num_attention_heads == 2
        return
    shrink(model, **fields)
    assert model.config.num_attention_heads == 3
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_heads_do_not_leave_by_a_setting_that_engines_may_not_read() -> None:
    """As vLLM derives the size of a head of Qwen 2 from the width of the model."""
    fields = {"sparsity": 0.2, "structures": ["heads"]}
    message = "need head_dim, which Qwen2Config does not declare"
    check_refused(tiny_model("qwen2", **HEADS), message, **fields)


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.3])
def test_several_shared_experts_stay_as_wide_as_so_many_experts(
    sparsity: float, tmp_path: Path
) -> None:
    """The configuration has the width of one of them, and their number."""
    sizes = {"intermediate_size": 96, "moe_intermediate_size": 48}
    model = zoo_model("deepseek_v2", tmp_path, n_shared_experts=2, **sizes)
    dense = size_of_layers(model, "llama")
    small = shrink(model, sparsity=sparsity, multiple_of=4, **UNTRAINED)
    kept = model.config.moe_intermediate_size
    assert model.model.layers[1].mlp.shared_experts.up_proj.out_features == 2 * kept
    left = size_of_layers(model, "llama")
    assert small.removed == pytest.approx(1 - left / dense)
    assert small.removed == pytest.approx(sparsity, abs=0.05)


@pytest.mark.parametrize("layers", ["1", "0"])
def test_a_layer_that_is_left_out_is_refused(layers: str) -> None:
    """All layers have one width."""
    message = f"no configuration .*layers.{layers} has no targets"
    ignore = [f"re:.*layers.{layers}.*"]
    check_refused(tiny_model("llama"), message, ignore=ignore)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bitnet", {}, "depends on several channels"),
        ("mamba", {}, "no mlp channels"),
        ("mpt", {"structures": ["heads"]}, "heads"),
    ],
)
def test_a_family_that_has_no_such_channels_is_refused(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    check_refused(zoo_model(name, tmp_path), message, **fields)


@pytest.mark.parametrize("pipeline", ["independent", "basic"])
@pytest.mark.parametrize(
    "modifier",
    [
        FISTAPruningModifier(mask_structure="2:4", preset="fast"),
        FASPPruningModifier(sparsity=0.2, multiple_of=4, **UNTRAINED),
    ],
    ids=lambda one: type(one).__name__,
)
def test_layers_that_share_keys_and_values_are_refused(
    modifier: Any, pipeline: str, tmp_path: Path
) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    shared = {"layer_types": kinds, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
    model = zoo_model("gemma4_text", tmp_path, use_double_wide_mlp=False, **shared)
    dense = weights(model)
    with pytest.raises(ValueError, match="num_kv_shared_layers"):
        run(model, modifier.model_copy(), pipeline=pipeline)
    assert_same(weights(model), dense)


def test_some_zeros_make_no_sparse_model() -> None:
    """As of weights that once had four bits, of which a twelfth are zeros."""
    model = tiny_model("llama")
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data[:, ::12] = 0
    fields = {"sparsity": 0.2, "multiple_of": 4, "preset": "paper"}
    run(model, FASPPruningModifier(**fields))
    assert model.config.intermediate_size < 48


@pytest.mark.parametrize("sparse", ["Linear", "re:.*layers.7.mlp.down_proj"])
def test_a_sparse_model_is_refused(sparse: str) -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    pruning = {"mask_structure": "2:4", "preset": "fast"}
    run(model, FISTAPruningModifier(targets=sparse, **pruning))
    check_refused(model, "are zeros, .* take channels out first")


def test_a_size_of_heads_never_becomes_smaller_in_place_of_their_number() -> None:
    """Gemma 2 has neither a scale nor frequencies that would tell 3 from 4."""
    model = tiny_model("gemma2", **HEADS)
    message = "is not a multiple of the number of attention heads"
    check_refused(model, message, structures=["mlp", "heads"], sparsity=0.3)


@pytest.mark.parametrize(
    "before",
    [
        FISTAPruningModifier(mask_structure="2:4"),
        WandaPruningModifier(sparsity=0.5, mask_structure="2:4"),
        FASPPruningModifier(sparsity=0.2, multiple_of=4),
    ],
    ids=lambda one: type(one).__name__,
)
def test_nothing_is_pruned_before_channels_leave(before: Any) -> None:
    model = tiny_model("llama")
    dense, config, split = (
        weights(model),
        vars(model.config).copy(),
        model._no_split_modules,
    )
    recipe = [before, SPAPPruningModifier(sparsity=0.2, multiple_of=4)]
    with pytest.raises(ValueError, match="comes after"):
        run(model, recipe)
    assert_same(weights(model), dense)
    assert vars(model.config) == config
    assert model._no_split_modules == split


def test_a_quantised_model_is_refused() -> None:
    model = tiny_model("llama")
    run(model, QuantizationModifier(targets=["Linear"], scheme="W8A8"))
    check_refused(model, "prune first and quantise afterwards")


def test_modules_that_layers_share_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    check_refused(model, "if several layers share its weight or its bias, nothing")
    model = tiny_model("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    check_refused(model, "up_proj is none.* several layers share its weight")


def test_biases_that_layers_share_are_refused() -> None:
    """Of the last two layers, so that the first, which is like others, shares none."""
    model = tiny_model("opt", num_hidden_layers=3)
    layers = model.model.decoder.layers
    layers[2].fc2.bias = layers[1].fc2.bias
    check_refused(model, "layers.1.fc2 is none.* share its weight or its bias")


def test_layers_that_the_data_do_not_reach_stay_as_they_are(tmp_path: Path) -> None:
    """As those of a vision tower, here of the same width as the language model's."""
    model = tiny_model("gemma3_vision")
    tower = copy.deepcopy(model.model.vision_tower).state_dict()
    layers = model.model.language_model.layers
    dense = sum(parameter.numel() for parameter in layers.parameters())
    with logged() as messages:
        modifier = shrink(model)
    [message] = [one for one in messages if "do not reach" in one]
    assert "model.vision_tower" in message
    assert_same(model.model.vision_tower.state_dict(), tower)
    left = sum(parameter.numel() for parameter in layers.parameters())
    assert modifier.removed == pytest.approx(1 - left / dense) != 0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vision_config.intermediate_size == 48
    assert torch.equal(logits(loaded), logits(model))
    assert verify(tmp_path).passed


def test_a_quantisation_of_nothing_is_refused() -> None:
    """GPT-2's operators are of a class that llm-compressor does not quantise."""
    model = tiny_model("gpt2")
    dense = weights(model)
    fields = {"targets": ["Linear"], "scheme": "W8A8"}
    pruning = FASPPruningModifier(sparsity=0.2, multiple_of=4, **UNTRAINED)
    quantisation = QuantizationModifier(ignore=["lm_head"], **fields)
    with pytest.raises(ValueError, match="would quantise nothing: .* class Conv1D"):
        run(model, [pruning.model_copy(), quantisation])
    assert_same(weights(model), dense)
    with logged() as messages:
        run(model, [pruning, QuantizationModifier(**fields)])
    assert any("quantises no operators of class Conv1D" in one for one in messages)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
@pytest.mark.parametrize("first", ["pruning", "quantisation"])
def test_a_refused_recipe_leaves_no_quantisation_behind(
    scheme: str, first: str, tmp_path: Path
) -> None:
    """The toolkit prepares one before it asks the next step of the recipe."""
    model = tiny_model("llama", **WIDE)
    dense, answers = weights(model), logits(model)
    pruning = FASPPruningModifier(sparsity=0.3, multiple_of=4, **UNTRAINED)
    quantisation = QuantizationModifier(targets=["Linear"], scheme=scheme)
    recipe = [pruning, quantisation]
    if first == "quantisation":
        recipe.reverse()
    elif scheme == "W8A8":
        recipe.append(FISTAPruningModifier(mask_structure="2:4", targets="re:.*none"))
    with pytest.raises(ValueError, match="multiple_of: 128|quantise after|no module"):
        run(model, recipe)
    assert_same(dict(model.named_parameters()), dense)
    assert torch.equal(logits(model), answers)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    again = [
        FASPPruningModifier(sparsity=0.2, multiple_of=128, **UNTRAINED),
        QuantizationModifier(targets=["Linear"], scheme=scheme),
    ]
    run(model, again)
    assert model.config.intermediate_size == 384


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3", "mixtral"])
def test_errors_of_all_layers_are_corrected(family: str, tmp_path: Path) -> None:
    """X* of the last layer is what the small model gives it."""
    dense, small = tiny_model(family), tiny_model(family)
    linearize(dense)
    modifier = shrink(small, **UNTRAINED, error_correction="full")
    last = modifier.results[-1].name
    if family != "mixtral":
        _, before = seen(dense, [last])
        _, after = seen(small, [last])
        bias = dense.get_submodule(last).bias
        without = before[last] - (0 if bias is None else bias)
        error = float((after[last] - before[last]).norm() / without.norm())
        found = modifier.results[-1].relative_error
        assert found == pytest.approx(error, rel=1e-3)
    check_loads(small, tmp_path)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize(
    "fields", [{}, {"error_correction": "full"}, UNTRAINED], ids=str
)
def test_layers_on_disk_end_with_the_same_weights(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    in_memory = tiny_model(family)
    shrink(in_memory, **fields)
    layers = FAMILIES[family].layers
    places = {
        name: "cpu"
        for name, module in in_memory.named_modules()
        if not any(True for _ in module.children()) and not name.startswith(layers)
    }
    on_disk = AutoModelForCausalLM.from_pretrained(
        checkpoint(family),
        device_map=places | {layers: "disk"},
        offload_folder=tmp_path / "offloaded",
    )
    modifier = shrink(on_disk, **fields)
    assert modifier.removed > 0
    on_disk.save_pretrained(tmp_path / "pruned")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert_same(weights(saved), weights(in_memory))
    assert verify(tmp_path / "pruned").passed


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("structures", [["mlp"], ["mlp", "heads"]], ids="-".join)
def test_half_precision(family: str, structures: list[str], tmp_path: Path) -> None:
    if family == "opt" and "heads" in structures:
        pytest.skip("its heads stay")
    model = tiny_model(family, torch.bfloat16, **({} if family == "opt" else HEADS))
    # the kernel for experts wants rows of 16 bytes
    sparsity = 0.4 if "heads" in structures else 0.2
    modifier = shrink(model, sparsity=sparsity, structures=structures, multiple_of=8)
    assert all(one.dtype == torch.bfloat16 for one in model.parameters())
    assert all(0 < one.relative_error < 1 for one in modifier.results)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    # in float32, because fused experts add up in another order than single ones
    expected = logits(model.float())
    assert bool((logits(reloaded.float()) - expected).norm() < 1e-4 * expected.norm())
    assert verify(tmp_path).passed


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_padding_counts_for_nothing(family: str) -> None:
    tokens = samples()
    padding = torch.zeros(len(tokens), 4, dtype=torch.long)
    longer = torch.cat([tokens, padding], 1)
    padded = Dataset.from_dict(
        {"input_ids": longer.tolist(), "attention_mask": (longer > 0).int().tolist()}
    )
    plain, other = tiny_model(family), tiny_model(family)
    expected = shrink(plain, **UNTRAINED)
    found = shrink(other, **UNTRAINED, oneshot_arguments={"dataset": padded})
    assert [one.tokens for one in found.results] == [
        one.tokens for one in expected.results
    ]
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(other)[name], weight, rtol=1e-3, atol=1e-4)


def test_sums_of_the_pass_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The pass sums over the inputs of down_proj, so that no MLP is replayed. Where it
    runs both layers before it leaves the first, the second is.
    """
    replayed: list[str] = []

    def watched(wave: Sequence[Stage], *arguments: Any) -> list[GramStatistics]:
        replayed.extend(stage.names for stage in wave)
        return wave_statistics(wave, *arguments)

    monkeypatch.setattr(corrected, "wave_statistics", watched)
    one_by_one, at_once = tiny_model("llama"), tiny_model("llama")
    shrink(one_by_one, **UNTRAINED)
    assert not replayed
    shrink(at_once, **UNTRAINED, oneshot_arguments={"pipeline": "basic"})
    assert replayed == ["model.layers.1.mlp.down_proj"]
    for name, weight in weights(one_by_one).items():
        torch.testing.assert_close(weights(at_once)[name], weight)


@dataclass(frozen=True)
class Halves:
    """A procedure of which the package knows nothing: every other channel leaves."""

    chains_layers: bool = False

    def recorded(self, layer: DecoderLayer) -> Recorded:
        return Recorded()

    def prune(self, task: LayerTask) -> PrunedLayer:
        sliced = {
            one.name: one.weight[:, ::2] if "down" in one.name else one.weight[::2]
            for one in task.operators
        }
        results = [
            OperatorResult(
                name, tuple(new.shape), "24 of 48 columns", 0, 0, 0, 0, 0, 0, 72, 0
            )
            for name, new in sliced.items()
        ]
        return PrunedLayer(sliced, results)


@pytest.mark.parametrize("chains_layers", [False, True])
def test_a_procedure_is_a_value(
    chains_layers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halved() -> PreTrainedModel:
        model = tiny_model("llama")
        monkeypatch.setattr(
            StructuredModifier, "procedure", lambda *_: Halves(chains_layers)
        )
        run(
            model,
            FASPPruningModifier(
                targets=["re:.*mlp.*proj"], sparsity=0.5, resume_dir=str(tmp_path)
            ),
        )
        return model

    expected = tiny_model("llama")
    for name, value in expected.named_parameters():
        if ".mlp." in name:
            value.data = value.data[:, ::2] if "down" in name else value.data[::2]
    first = halved()
    assert_same(weights(first), weights(expected))
    torch.testing.assert_close(logits(first), logits(expected))
    (tmp_path / "model.layers.1.safetensors").unlink()
    assert_same(weights(halved()), weights(expected))
    assert_same(weights(halved()), weights(expected))


def test_rows_of_one_operator_are_not_cut_for_two_groups() -> None:
    """One cut moves the rows of the next; no family of transformers needs this."""
    fused, first, second = (
        Operator(name, torch.nn.Linear(8, 8)) for name in ("fused", "first", "second")
    )
    rows = torch.arange(8).view(2, 4, 1)
    plans = [
        GroupPlan(
            ChannelGroup("channels", (Members(fused, own),), (Members(reader, own),)), 2
        )
        for own, reader in zip(rows, (first, second), strict=True)
    ]
    check_apart(plans[:1])
    with pytest.raises(ValueError, match="fused makes channels of several kinds"):
        check_apart(plans)


def saved_smaller(
    dense: PreTrainedModel, tmp_path: Path, edit: dict[str, Any], **fields: Any
) -> tuple[PreTrainedModel, FASPPruningModifier | SPAPPruningModifier]:
    """
    The smaller model as it is loaded, with the logits that it has in memory, and the
    modifier. None in ``edit`` stands for a key of the dense config.json that is not
    there.
    """
    dense.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "config.json"
    content = json.loads(file.read_text()) | edit
    kept = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(kept))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    modifier = shrink(model, **UNTRAINED, **fields)
    model.save_pretrained(tmp_path / "small")
    assert verify(tmp_path / "small").problems == []
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", attn_implementation="eager"
    )
    assert torch.allclose(logits(loaded.eval()), logits(model), atol=1e-5)
    return loaded, modifier


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_size_of_a_head_stays_where_the_file_has_none(
    family: str, tmp_path: Path
) -> None:
    dense = tiny_model(family, **HEADS)
    loaded, _ = saved_smaller(
        dense, tmp_path, {"head_dim": None}, structures=["heads"], sparsity=0.2
    )
    assert loaded.config.head_dim == 4
    assert loaded.config.num_attention_heads < 8


def test_heads_leave_and_do_not_shrink_where_there_are_as_many_as_dimensions(
    tmp_path: Path,
) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64}
    dense = tiny_model("llama", **sizes)
    loaded, modifier = saved_smaller(
        dense, tmp_path, {}, structures=["heads"], sparsity=0.32
    )
    assert loaded.config.head_dim == 8
    assert {path[-1] for path, _ in modifier._plan.changes} == {
        "num_attention_heads",
        "num_key_value_heads",
    }


def test_all_numbers_of_heads_change_together(tmp_path: Path) -> None:
    dense = zoo_model("deepseek_v3", tmp_path / "zoo")
    loaded, _ = saved_smaller(dense, tmp_path, {}, structures=["heads"], sparsity=0.15)
    config = loaded.config
    assert config.num_attention_heads == config.num_key_value_heads < 4


def test_a_setting_that_has_the_same_value_by_chance_stays(tmp_path: Path) -> None:
    # the shared experts have 2 x 16 channels, which no setting says
    dense = zoo_model(
        "dots1",
        tmp_path / "zoo",
        n_shared_experts=2,
        moe_intermediate_size=16,
        intermediate_size=128,
        hidden_size=64,
        sliding_window=32,
        layer_types=["full_attention", "sliding_attention"],
        max_position_embeddings=64,
    )
    loaded, _ = saved_smaller(dense, tmp_path, {})
    assert loaded.config.sliding_window == 32
    assert loaded.config.moe_intermediate_size == 12


def test_an_older_name_of_a_width_is_smaller_too(tmp_path: Path) -> None:
    sizes = {"block_auto_adjust_ff_dim": False, "intermediate_size": 96}
    dense = zoo_model("lfm2", tmp_path / "zoo", **sizes)
    edit = {"block_ff_dim": 96, "intermediate_size": None}
    loaded, _ = saved_smaller(dense, tmp_path, edit)
    assert loaded.config.intermediate_size == 72
