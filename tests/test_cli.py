"""The command line, run as a user runs it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TWO_PROCESSES
from compressed_tensors.offload.cache import DiskCache
from families import FAMILIES, checkpoint
from huggingface_hub import ModelCard
from logs import logged
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from typer.testing import CliRunner, Result

from fista_modifier import cli
from fista_modifier.checkpoint.model_card import (
    StatedPerplexity,
    stated_perplexities,
    write_model_card,
)
from fista_modifier.cli import app
from fista_modifier.evaluation.perplexity import perplexity
from fista_modifier.models import loading
from fista_modifier.pruning.results import Calibration, PruningReport
from fista_modifier.solver import NofM, Unstructured

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SMALLER = ["--method", "fasp", "--sparsity", "0.3", "--multiple-of", "4"]

QUANTISATION = """
quantization_stage:
  quantization_modifiers:
    QuantizationModifier:
      scheme: W8A8
      targets: ["Linear"]
      ignore: ["re:.*lm_head"]
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "200"}
    )


def prune(model: Path, text: Path, output: Path, *arguments: object) -> Result:
    common = ("--dataset", text, "--samples", 4, "--seq-len", 16)
    return run("prune", model, "-o", output, *common, *arguments)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--pattern", "2:4"], NofM(2, 4)),
        (["--pattern", "0.5"], Unstructured(0.5)),
        (["--pattern", "2:4", "--preset", "paper"], NofM(2, 4)),
        (["--recipe", "recipes/fista-unstructured-50.yaml"], Unstructured(0.5)),
    ],
)
def test_prune_writes_a_checkpoint_with_the_pattern(
    model: Path,
    text: Path,
    tmp_path: Path,
    arguments: list[str],
    pattern: NofM | Unstructured,
    request: pytest.FixtureRequest,
) -> None:
    arguments = [
        str(request.config.rootpath / part) if part.endswith(".yaml") else part
        for part in arguments
    ]
    output = tmp_path / "pruned"
    result = prune(model, text, output, *arguments)
    assert result.exit_code == 0, result.output
    assert "50.00 %" in result.output
    loaded = AutoModelForCausalLM.from_pretrained(output)
    for name in FAMILIES["llama"].operators:
        assert pattern.holds(loaded.get_submodule(name).weight)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt", "pruned"}


def test_a_pruned_checkpoint_passes_verification_until_it_is_damaged(
    model: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "pruned"
    assert prune(model, text, output, "--pattern", "2:4").exit_code == 0
    report = PruningReport.load(output)
    assert {operator.name for operator in report.operators} == set(
        FAMILIES["llama"].operators
    )
    assert report.calibration == Calibration(str(text), 4, 16, 0)
    assert "mask_structure: '2:4'" in report.recipe
    assert ModelCard.load(output / "README.md").data.sparsity == 0.5
    for arguments in ([], ["--pattern", "2:4"], ["--pattern", "0.5"]):
        result = run("verify", output, *arguments)
        assert result.exit_code == 0, result.output
    refused = run("verify", output, "--pattern", "1:4")
    assert refused.exit_code == 1
    assert "model.layers.1.mlp.down_proj is not 1:4" in refused.output
    (output / "model.safetensors").write_bytes(b"")
    result = run("verify", output)
    assert result.exit_code == 1
    assert "model.safetensors" in result.output


@pytest.mark.parametrize("storage", ["sparse-bitmask", "sparse-24-bitmask"])
def test_a_packed_checkpoint_unpacks_to_the_dense_one(
    storage: str, model: Path, text: Path, tmp_path: Path
) -> None:
    dense, packed, again = (tmp_path / name for name in ("dense", "packed", "again"))
    assert prune(model, text, dense, "--pattern", "2:4").exit_code == 0
    result = prune(model, text, packed, "--pattern", "2:4", "--format", storage)
    assert result.exit_code == 0, result.output
    report = PruningReport.load(packed)
    assert report.storage_format == storage
    assert 0.5 < report.stored_share < 0.8  # float32, and very small matrices
    assert run("verify", packed).exit_code == 0
    stated = {"news": StatedPerplexity(12.5, 64, 17)}
    write_model_card(packed, report, stated)
    assert run("unpack", packed, "-o", again).exit_code == 0
    assert "fista-prune unpack" in (packed / "README.md").read_text()
    assert "vllm serve again" in (again / "README.md").read_text()
    assert stated_perplexities(again) == stated
    assert PruningReport.load(again).storage_format == "dense"
    one = AutoModelForCausalLM.from_pretrained(dense).state_dict()
    other = AutoModelForCausalLM.from_pretrained(again).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    refused = run("unpack", dense, "-o", tmp_path / "more")
    assert refused.exit_code == 1
    assert "no packed weights" in refused.output


@pytest.mark.parametrize("quantization", ["QuantizationModifier", "MaskedGPTQModifier"])
def test_a_quantised_checkpoint_is_verified_too(
    quantization: str, model: Path, text: Path, tmp_path: Path
) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "pruned"
    recipe.write_text(
        (RECIPES / "fista-2of4-w8a8.yaml")
        .read_text()
        .replace("QuantizationModifier", quantization)
    )
    result = prune(model, text, output, "--recipe", recipe)
    assert result.exit_code == 0, result.output
    assert run("verify", output, "--pattern", "2:4").exit_code == 0
    refused = run("verify", output, "--pattern", "1:4")
    assert refused.exit_code == 1
    assert "model.layers.1.mlp.down_proj is not 1:4" in refused.output
    (output / "model.safetensors").write_bytes(b"")
    assert run("verify", output).exit_code == 1


def test_a_format_that_does_not_suit_the_pattern_is_refused_at_once(
    model: Path, text: Path, tmp_path: Path
) -> None:
    result = prune(
        model,
        text,
        tmp_path / "out",
        "--pattern",
        "0.5",
        "--format",
        "sparse-24-bitmask",
    )
    assert result.exit_code == 1
    assert "use --format sparse-bitmask" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_experts_may_be_packed(
    text: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model, recipe = tmp_path / "model", tmp_path / "recipe.yaml"
    shutil.copytree(checkpoint("qwen3_moe", vocab_size=len(tiny_tokenizer)), model)
    tiny_tokenizer.save_pretrained(model)
    recipe.write_text(
        "pruning_stage:\n  pruning_modifiers:\n    FISTAPruningModifier:\n"
        '      preset: fast\n      mask_structure: "2:4"\n'
        '      targets: ["re:.*experts.0.*"]\n'
    )
    packed = ["--format", "sparse-24-bitmask"]
    result = prune(model, text, tmp_path / "out", "--recipe", recipe, *packed)
    assert result.exit_code == 0, result.output
    assert PruningReport.load(tmp_path / "out").storage_format == packed[1]


def test_packing_mixtral_is_refused_before_its_data_are_read(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Its experts have other names in a checkpoint."""
    model, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoint("mixtral", vocab_size=len(tiny_tokenizer)), model)
    tiny_tokenizer.save_pretrained(model)
    packed = ["--pattern", "2:4", "--format", "sparse-bitmask"]
    result = run("prune", model, "-o", output, *packed, "--dataset", "missing.txt")
    assert result.exit_code == 1
    words = "experts.0.up_proj under another name: use --format dense"
    assert words in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ('patterns: {Linear: "2:4"}', ""),
        ('mask_structure: "2:4"\n      patterns: {"re:.*mlp.*": "0.6"}', "not '60 %'"),
    ],
)
def test_a_format_has_to_suit_the_pattern_of_each_operator(
    fields: str, refused: str, model: Path, text: Path, tmp_path: Path
) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(
        "pruning_stage:\n  pruning_modifiers:\n    FISTAPruningModifier:\n"
        "      preset: fast\n"
        f'      ignore: ["re:.*lm_head"]\n      {fields}\n'
    )
    packed = ["--format", "sparse-24-bitmask"]
    result = prune(model, text, output, "--recipe", recipe, *packed)
    assert (result.exit_code == 1) == bool(refused), result.output
    assert refused in " ".join(result.output.split())
    assert output.exists() != bool(refused)


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        (["--method", "fasp"], {"intermediate_size": 24}),
        (["--method", "spap", "--preset", "paper"], {"intermediate_size": 24}),
        (
            ["--method", "fasp", "--structure", "mlp", "--structure", "heads"],
            {
                "intermediate_size": 40,
                "num_key_value_heads": 1,
                "num_attention_heads": 2,
            },
        ),
    ],
)
def test_a_structured_method_writes_a_smaller_checkpoint(
    model: Path,
    text: Path,
    tmp_path: Path,
    arguments: list[str],
    sizes: dict[str, int],
) -> None:
    output = tmp_path / "pruned"
    arguments += ["--sparsity", "0.3", "--multiple-of", "4"]
    result = prune(model, text, output, *arguments)
    assert result.exit_code == 0, result.output
    report = PruningReport.load(output)
    assert report.sizes == sizes
    share = removed_share(model, output)
    assert report.removed_share == pytest.approx(share)
    told = " ".join(result.output.split())
    assert f"{100 * share:.2f} % of the decoder layers' parameters have left" in told
    assert f"intermediate_size {sizes['intermediate_size']}" in told
    assert f"{sizes['intermediate_size']} of 48 columns" in told
    assert "Pruned operators" not in told and "warm start" not in told
    verified = run("verify", output)
    assert verified.exit_code == 0, verified.output


def test_smaller_models_are_recovered_by_default(
    model: Path, text: Path, tmp_path: Path
) -> None:
    """Layers are trained one by one only without that."""

    def pruned(*more: str) -> tuple[bytes, PruningReport]:
        output = tmp_path / "-".join(("pruned", *more))
        result = prune(model, text, output, *SMALLER, *more)
        assert result.exit_code == 0, result.output
        weights = (output / "model.safetensors").read_bytes()
        return weights, PruningReport.load(output)

    by_default, report = pruned()
    assert report.recovery and not report.layers
    assert by_default == pruned("--recover")[0] == pruned("--preset", "default")[0]
    layerwise, report = pruned("--no-recover")
    assert layerwise != by_default
    assert report.layers and not report.recovery
    paper, report = pruned("--preset", "paper")
    assert not report.layers and not report.recovery
    assert paper not in (by_default, layerwise)


@pytest.mark.parametrize(
    ("options", "memory", "why"),
    [
        ([], 10_000.0, "recovery would take about 0.0 GB beside activations"),
        (["--offload", "offload"], None, "weights may be on a disk (--offload)"),
        (["--samples", "1"], None, "1 sequence is too little"),
    ],
)
def test_layers_are_trained_where_the_model_cannot_be(
    options: list[str],
    memory: float | None,
    why: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fista_modifier.cli.prune.free_memory", lambda: memory)
    files = []
    for more in ([], ["--no-recover"]):
        output = tmp_path / "-".join(("pruned", *more))
        with logged() as messages:
            result = prune(model, text, output, *SMALLER, *options, *more)
        assert result.exit_code == 0, result.output
        told = [one for one in messages if "There is no recovery" in one]
        assert len(told) == (not more)
        assert all(
            f"layers are trained as by --no-recover: {why}" in one for one in told
        )
        files.append((output / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert PruningReport.load(output).layers


def test_dimensions_of_values_are_told_of_as_zeros(
    model: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "pruned"
    arguments = ["--method", "fasp", "--structure", "value_dims", "--sparsity", "0.1"]
    result = prune(model, text, output, *arguments)
    assert result.exit_code == 0, result.output
    report = PruningReport.load(output)
    assert removed_share(model, output) == report.removed_share == 0
    assert report.zeroed_share == pytest.approx(0.1, abs=0.02)
    told = " ".join(result.output.split())
    assert "0.00 % of the decoder layers' parameters have left the model" in told
    assert f"{100 * report.zeroed_share:.2f} % are zeros in place" in told
    assert "columns not zero" in told and "configuration" not in told
    assert run("verify", output).exit_code == 0
    page = run("report", output)
    assert page.exit_code == 0, page.output


def removed_share(dense: Path, smaller: Path) -> float:
    """Of the parameters of decoder layers, counted in the checkpoints themselves."""
    before, after = (
        sum(
            parameter.numel()
            for name, parameter in AutoModelForCausalLM.from_pretrained(
                folder
            ).named_parameters()
            if ".layers." in name
        )
        for folder in (dense, smaller)
    )
    return 1 - after / before


def test_a_chain_tells_of_what_left_and_of_zeros(
    model: Path, text: Path, tmp_path: Path
) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "pruned"
    recipe.write_text(
        (RECIPES / "fasp-2of4.yaml")
        .read_text()
        .replace("sparsity: 0.2", "sparsity: 0.2\n      multiple_of: 4")
    )
    result = prune(model, text, output, "--recipe", recipe)
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "parameters have left the model" in told
    assert "Pruned operators" in told and "50.00 %" in told
    report = PruningReport.load(output)
    assert report.sparsity == 0.5
    assert report.removed_share == pytest.approx(removed_share(model, output))
    assert run("verify", output, "--pattern", "2:4").exit_code == 0


def test_a_recipe_can_be_resumed(model: Path, text: Path, tmp_path: Path) -> None:
    recipe, finished = tmp_path / "recipe.yaml", tmp_path / "finished"
    content = (RECIPES / "fasp-2of4.yaml").read_text()
    recipe.write_text(
        content.replace("sparsity: 0.2", "sparsity: 0.2\n      multiple_of: 4")
    )
    how = ["--recipe", recipe, "--resume", finished, "--activations", tmp_path / "a"]
    assert prune(model, text, tmp_path / "one", *how).exit_code == 0
    layers = {
        file: file.stat().st_mtime_ns for file in finished.glob("*/*.safetensors")
    }
    assert sorted({file.parent.name for file in layers}) == [
        "1-FASPPruningModifier",
        "2-FISTAPruningModifier",
    ]
    last = max(layers, key=layers.__getitem__)
    last.unlink()
    assert prune(model, text, tmp_path / "two", *how).exit_code == 0
    assert all(
        file.stat().st_mtime_ns == before
        for file, before in layers.items()
        if file != last
    )
    assert same_weights(tmp_path / "one", tmp_path / "two")
    recipe.write_text(
        content.replace("sparsity: 0.2", "sparsity: 0.3\n      multiple_of: 4")
    )
    refused = prune(model, text, tmp_path / "three", *how)
    assert "sparsity was 0.2 and is 0.3" in " ".join(refused.output.split())


def test_channels_cannot_leave_after_zeros_were_made(
    model: Path, text: Path, tmp_path: Path
) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "pruned"
    structured, sparse = (
        (RECIPES / f"{name}.yaml")
        .read_text()
        .replace("pruning_stage", f"{place}_stage")
        for name, place in (("fasp", "b"), ("fista-2of4", "a"))
    )
    recipe.write_text(sparse + structured)
    result = prune(model, text, output, "--recipe", recipe)
    assert result.exit_code == 1
    assert "comes after FISTAPruningModifier" in " ".join(result.output.split())
    assert not output.exists()


@pytest.fixture
def free_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], None]:
    """Makes it seem that every disk has so many bytes free."""

    def leave(free: int) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage)

    return leave


def test_a_disk_that_is_almost_full_is_told_of_before_the_run(
    model: Path,
    text: Path,
    tmp_path: Path,
    warnings: list[str],
    free_on_disk: Callable[[int], None],
) -> None:
    free_on_disk(1000)
    options = ("--pattern", "2:4", "--resume", tmp_path / "layers")
    assert prune(model, text, tmp_path / "out", *options).exit_code == 0
    told = [one for one in warnings if "a full disk ends the run" in one]
    assert len(told) == 2
    assert f"{tmp_path / 'out'} has 0.0 GB free" in told[0]
    assert f"{tmp_path / 'layers'} has 0.0 GB free" in told[1]


def test_the_states_of_a_training_may_not_fit(
    model: Path,
    text: Path,
    tmp_path: Path,
    warnings: list[str],
    free_on_disk: Callable[[int], None],
) -> None:
    """On a disk with room for twice the weights, two states do not."""
    free_on_disk(2 * (model / "model.safetensors").stat().st_size)
    options = ("--pattern", "2:4", "--preset", "fast", "--resume", tmp_path / "layers")
    for more, folders in (((), []), (("--recover",), [tmp_path / "layers"])):
        output = tmp_path / f"out{len(more)}"
        assert prune(model, text, output, *options, *more).exit_code == 0
        told = [one for one in warnings if "a full disk ends the run" in one]
        assert [one.split(" has ")[0] for one in told] == [*map(str, folders)]


@pytest.mark.parametrize("option", ["--resume", "--activations", "--offload"])
def test_a_folder_that_would_be_replaced_is_refused(
    option: str, model: Path, text: Path, tmp_path: Path
) -> None:
    inside = tmp_path / "out" / "inside"
    options = ("--pattern", "2:4", "--overwrite", option, inside)
    refused = prune(model, text, tmp_path / "out", *options)
    assert refused.exit_code == 1
    assert "which is replaced in the end" in " ".join(refused.output.split())
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("option", ["model", "--dataset"])
def test_what_a_run_reads_is_not_replaced(
    option: str, model: Path, text: Path, tmp_path: Path
) -> None:
    outer = tmp_path / "outer"
    read = {"model": model, "--dataset": text}
    read[option] = Path(shutil.copytree(model, outer / "model"))
    options = ("--pattern", "2:4", "--overwrite")
    refused = prune(read["model"], read["--dataset"], outer, *options)
    assert refused.exit_code == 1
    assert "which is replaced in the end" in " ".join(refused.output.split())
    assert (outer / "model" / "config.json").exists()


def test_the_same_command_gives_the_same_weights(
    model: Path, text: Path, tmp_path: Path
) -> None:
    for output in ("one", "two"):
        assert prune(model, text, tmp_path / output, "--pattern", "2:4").exit_code == 0
    assert same_weights(tmp_path / "one", tmp_path / "two")


def test_weights_wait_on_disk(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prune(model, text, tmp_path / "one", "--pattern", "2:4").exit_code == 0
    # the embeddings fit, and the layers do not
    monkeypatch.setattr(loading, "get_max_memory", lambda: {"cpu": 20_000})
    caches: list[type] = []

    def load(*arguments: Any) -> PreTrainedModel:
        loaded = loading.load_to_prune(*arguments)
        caches.extend(type(one._parameters) for one in loaded.model.layers.modules())
        return loaded

    monkeypatch.setattr("fista_modifier.cli.prune.load_to_prune", load)
    on_disk = ["--pattern", "2:4", "--offload", tmp_path / "weights"]
    result = prune(model, text, tmp_path / "two", *on_disk)
    assert result.exit_code == 0, result.output
    assert DiskCache in caches
    assert same_weights(tmp_path / "one", tmp_path / "two")
    assert not any((tmp_path / "weights").iterdir())


def same_weights(*folders: Path) -> bool:
    one, two = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders
    )
    return all(torch.equal(one[name], two[name]) for name in one)


def test_an_output_folder_with_files_is_replaced_only_on_request(
    model: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "pruned"
    output.mkdir()
    (output / "precious").write_text("data")
    refused = prune(model, text, output, "--pattern", "2:4")
    assert refused.exit_code == 1
    assert "--overwrite" in refused.output and "pruned" in refused.output
    assert (output / "precious").read_text() == "data"
    assert prune(model, text, output, "--pattern", "2:4", "--overwrite").exit_code == 0
    assert not (output / "precious").exists()
    assert (output / "model.safetensors").exists()


def test_an_output_folder_that_cannot_be_replaced_is_refused_at_once(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (Path("."), Path(".."), Path("/proc")):
        refused = prune(model, text, folder, "--pattern", "2:4", "--overwrite")
        assert refused.exit_code == 1
        assert "name one inside it" in refused.output
    assert text.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pattern", "5:4"], ["5:4", "2:4"]),
        (["--pattern", "2:3"], ["2:3", "32", "q_proj"]),
        (["--pattern", "50"], ["50", "0.5"]),
        (["--pattern", "half"], ["half", "2:4", "0.5"]),
        ([], ["--pattern", "--recipe"]),
        (["--pattern", "2:4", "--recipe", "x.yaml"], ["--pattern", "--recipe"]),
        (["--recipe", "missing.yaml"], ["missing.yaml"]),
        (["--pattern", "2:4", "--dataset", "missing.txt"], ["missing.txt"]),
        (["--pattern", "2:4", "--samples", "4000"], ["4000", "--samples"]),
        (
            ["--recipe", "recipes/fista-2of4.yaml", "--preset", "best"],
            ["--preset", "--pattern", "fista-2of4.yaml"],
        ),
        (
            ["--recipe", "recipes/fasp-2of4.yaml", "--resume", "x", "--layers", "0"],
            ["--layers", "fasp-2of4.yaml has 2"],
        ),
        (
            ["--recipe", "recipes/fista-unstructured-50.yaml"]
            + ["--format", "sparse-24-bitmask"],
            ["50 %", "--format sparse-bitmask"],
        ),
        (
            ["--recipe", "recipes/fista-2of4-w8a8.yaml"]
            + ["--format", "sparse-bitmask"],
            ["QuantizationModifier", "--format dense"],
        ),
        (["--sparsity", "0.3"], ["--sparsity", "--method fasp", "--pattern"]),
        (
            ["--pattern", "2:4", "--structure", "mlp", "--multiple-of", "4"],
            ["--structure, --multiple-of", "--method fasp"],
        ),
        (
            ["--recipe", "recipes/fasp.yaml", "--sparsity", "0.3"],
            ["--sparsity", "set its fields"],
        ),
        ([*SMALLER, "--pattern", "2:4"], ["--pattern contradicts --method fasp"]),
        (
            [*SMALLER, "--recipe", "recipes/fasp.yaml"],
            ["--recipe contradicts --method fasp"],
        ),
        (["--method", "spap"], ["--method spap needs --sparsity"]),
        (["--method", "fasp", "--sparsity", "30"], ["--sparsity 30", "0.2"]),
        ([*SMALLER, "--preset", "best"], ["--preset best", "default or paper"]),
        ([*SMALLER, "--warm-start", "wanda"], ["--warm-start", "no FISTA"]),
        ([*SMALLER, "--structure", "layers"], ["layers", "mlp, heads, value_dims"]),
        (
            ["--method", "spap", "--sparsity", "0.2", "--structure", "value_dims"],
            ["structures", "value_dims", "FASPPruningModifier"],
        ),
        (
            [*SMALLER, "--format", "sparse-bitmask"],
            ["FASPPruningModifier", "--format dense"],
        ),
        ([*SMALLER, "--multiple-of", "64"], ["48 channels", "multiple of 64"]),
    ],
)
def test_bad_arguments_are_a_message_and_leave_nothing(
    model: Path, text: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    result = prune(model, text, tmp_path / "pruned", *arguments)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    "option", [("--pattern", "2:4"), ("--preset", "best"), ("--format", "dense-legacy")]
)
def test_contradictions_are_told_before_a_model_is_loaded(
    option: tuple[str, str], tmp_path: Path
) -> None:
    missing = tmp_path / "no-such-model"
    result = run("prune", missing, "-o", tmp_path / "pruned", *SMALLER, *option)
    assert result.exit_code == 1
    assert "no-such-model" not in result.output


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("", "recipe.yaml is empty"),
        ("a: {", "recipe.yaml is not YAML, line 1"),
        ("pruning: {p_modifiers: {FISTAPruningModifier: {}}}", "'pruning_stage'"),
        ("p_stage: {pruning: {FISTAPruningModifier: {}}}", "'pruning_modifiers'"),
        ("p_stage: {p_modifiers: {FISTAPruningModifier: }}", "write its fields"),
        ("p_stage: {p_modifiers: {FISTAPruningModifier: {x: 1}}}", "x"),
        ("p_stage: {p_modifiers: {QuantizationModifier: {scheme: [1]}}}", "scheme"),
        ("p_stage: {p_modifiers: {GPTQModifier: {config_groups: 1}}}", "config_groups"),
        ("p_stage: {p_modifiers: {Nonsense: {}}}", "Nonsense"),
    ],
)
def test_a_recipe_that_is_none_is_a_message(
    model: Path, text: Path, tmp_path: Path, recipe: str, words: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    result = prune(model, text, tmp_path / "pruned", "--recipe", file)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)  # and no traceback
    assert "error:" in result.output
    assert words in " ".join(result.output.split())
    assert not (tmp_path / "pruned").exists()


def test_a_pattern_needs_no_quotes(model: Path, text: Path, tmp_path: Path) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "pruned"
    recipe.write_text(
        "p_stage:\n  p_modifiers:\n    FISTAPruningModifier:\n"
        "      mask_structure: 2:4\n      preset: fast\n      ignore: [lm_head]\n"
    )
    result = prune(model, text, output, "--recipe", recipe)
    assert result.exit_code == 0, result.output
    assert run("verify", output, "--pattern", "2:4").exit_code == 0


@pytest.fixture
def gpt2(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path / "gpt2"
    shutil.copytree(checkpoint("gpt2", vocab_size=len(tiny_tokenizer)), folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "sparse-24-bitmask"], "use --format sparse-bitmask or dense"),
        (["--seq-len", "65"], "64 positions: use --seq-len 64 or less"),
    ],
)
def test_what_gpt2_cannot_have_is_refused_before_its_data_are_read(
    gpt2: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    arguments += ["--pattern", "2:4", "--dataset", "missing.txt"]
    result = run("prune", gpt2, "-o", tmp_path / "pruned", *arguments)
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())


def test_too_few_positions_are_named_by_every_command(gpt2: Path, text: Path) -> None:
    words = "64 positions: use --seq-len 64 or less"
    for arguments in (
        ("eval", gpt2, "--text", text, "--seq-len", 65),
        ("compare", gpt2, "--pattern", "2:4", "--methods", "magnitude")
        + ("--text", text, "--dataset", "missing.txt", "--seq-len", 65),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert words in " ".join(result.output.split())


def test_a_foreign_tokenizer_is_a_message(
    text: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "small")
    tiny_tokenizer.save_pretrained(folder)
    result = prune(folder, text, tmp_path / "pruned", "--pattern", "2:4")
    assert result.exit_code == 1
    assert "is not in the vocabulary of LlamaForCausalLM" in result.output
    result = run("eval", folder, "--text", text, "--seq-len", 16)
    assert result.exit_code == 1
    assert "is not in the vocabulary of LlamaForCausalLM" in result.output


def test_a_column_of_a_table_is_calibrated_on(model: Path, tmp_path: Path) -> None:
    table, output = tmp_path / "table.csv", tmp_path / "pruned"
    table.write_text("text,body\n" + "nothing,The quick brown fox.\n" * 10)
    arguments = ("--pattern", "2:4", "--preset", "fast", "--text-column")
    result = prune(model, table, output, *arguments, "body")
    assert result.exit_code == 0, result.output
    calibration = PruningReport.load(output).calibration
    assert calibration == Calibration(str(table), 4, 16, 0, "body")
    result = prune(model, table, tmp_path / "no", *arguments, "title")
    assert result.exit_code == 1
    assert "'title'; found ['body', 'text']" in " ".join(result.output.split())


def test_chats_need_a_template(model: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    result = prune(model, chats, tmp_path / "pruned", "--pattern", "2:4")
    assert result.exit_code == 1
    assert "no chat template" in " ".join(result.output.split())


def test_a_missing_model_is_named(text: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no-such-model"
    result = prune(missing, text, tmp_path / "pruned", "--pattern", "2:4")
    assert result.exit_code == 1
    assert "no-such-model" in result.output.replace("\n", "")


def test_a_damaged_tokenizer_is_named(model: Path, text: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    result = prune(model, text, tmp_path / "pruned", "--pattern", "2:4")
    assert result.exit_code == 1
    assert f"the tokenizer of '{model}' could not be loaded" in result.output


def test_a_bug_is_told_as_one(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.verify, "verify_checkpoint", lambda *_: {}["fault"])
    result = run("verify", model)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "error: unexpected KeyError: 'fault'" in result.output
    assert "LLM_COMPRESSOR_LOG_LEVEL=DEBUG" in result.output


def test_eval_prints_the_perplexity_of_each_model(
    model: Path,
    text: Path,
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    twin = shutil.copytree(model, tmp_path / "twin")
    result = run("eval", model, twin, "--text", text, "--seq-len", 16)
    assert result.exit_code == 0, result.output
    expected = perplexity(
        AutoModelForCausalLM.from_pretrained(model),
        tiny_tokenizer,
        text.read_text(),
        seq_len=16,
    )
    assert len(re.findall(rf"{expected.value:.3f}", result.output)) == 2


def test_eval_writes_the_model_card(model: Path, text: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    assert prune(model, text, pruned, "--pattern", "2:4").exit_code == 0
    arguments = ("--text", text, "--seq-len", 16, "--card")
    result = run("eval", model, "--json", tmp_path / "never", *arguments)
    assert result.exit_code == 1 and "has no pruning_report.json" in result.output
    result = run("eval", pruned, *arguments)
    assert result.exit_code == 0, result.output
    (found,) = ModelCard.load(pruned / "README.md").data.eval_results
    assert (found.metric_type, found.dataset_name) == ("perplexity", text.stem)
    assert f"{found.metric_value:.3f}" in result.output
    assert found.metric_args["seq_len"] == 16
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().swapcase())
    beside = ("--text", other, "--seq-len", 8, "--card")
    assert run("eval", pruned, *beside).exit_code == 0
    results = ModelCard.load(pruned / "README.md").data.eval_results
    lengths = {one.dataset_name: one.metric_args["seq_len"] for one in results}
    assert lengths == {text.stem: 16, "other": 8}
    (pruned / "README.md").write_text("# Mine\n")
    result = run("eval", pruned, *arguments)
    assert result.exit_code == 1 and "did not write" in result.output


def test_a_model_of_images_keeps_its_processors(
    model: Path, text: Path, tmp_path: Path
) -> None:
    names = ["preprocessor_config.json", "processor_config.json"]
    for name in names:
        (model / name).write_text(f'{{"from": "{name}"}}')
    pruned = tmp_path / "pruned"
    assert prune(model, text, pruned, "--pattern", "2:4").exit_code == 0
    for name in names:
        assert (pruned / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize("of_tokenizer", [False, True])
def test_a_processor_keeps_its_template(
    of_tokenizer: bool,
    model: Path,
    text: Path,
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Transformers refuses to have it beside one of the tokenizer."""
    (model / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    if of_tokenizer:
        (model / "chat_template.jinja").write_text("{{ messages }}")
    pruned = tmp_path / "pruned"
    fast = ("--pattern", "2:4", "--preset", "fast")
    assert prune(model, text, pruned, *fast).exit_code == 0
    assert (pruned / "chat_template.json").exists() != of_tokenizer
    assert (pruned / "chat_template.jinja").exists() == of_tokenizer


def test_what_is_quantised_later_keeps_its_report(
    model: Path, text: Path, tmp_path: Path
) -> None:
    sparse, recipe = tmp_path / "sparse", tmp_path / "recipe.yaml"
    assert prune(model, text, sparse, "--pattern", "2:4").exit_code == 0
    recipe.write_text(QUANTISATION)
    quantised = tmp_path / "quantised"
    result = prune(sparse, text, quantised, "--recipe", recipe)
    assert result.exit_code == 0, result.output
    assert PruningReport.load(quantised) == PruningReport.load(sparse)
    assert run("verify", quantised).exit_code == 0
    assert "2:4" in (quantised / "README.md").read_text()


def test_a_model_that_could_not_be_saved_is_refused_before_any_recipe(
    model: Path, text: Path, tmp_path: Path
) -> None:
    (model / "generation_config.json").write_text('{"temperature": 0.9}')
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(QUANTISATION)
    result = prune(model, text, out, "--recipe", recipe)
    assert result.exit_code == 0, result.output  # it is mended, with a warning
    assert GenerationConfig.from_pretrained(out).do_sample


@pytest.mark.parametrize("storage", ["sparse-24-bitmask", "dense-legacy"])
def test_what_transformers_cannot_load_is_refused_before_any_work(
    storage: str, model: Path, text: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    fast = ("--pattern", "2:4", "--preset", "fast")
    assert prune(model, text, packed, *fast, "--format", storage).exit_code == 0
    remedy = "unpack" if storage != "dense-legacy" else "prune with --format dense"
    for arguments in (
        ("prune", packed, "-o", tmp_path / "out", *fast, "--dataset", "missing.txt"),
        ("eval", model, packed, "--text", text, "--seq-len", 16),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert remedy in " ".join(result.output.split())
        assert "Perplexity" not in result.output


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    names = "prune verify report unpack plan eval compare demo"
    for command in names.split():
        assert command in result.output


def test_prune_goes_on_where_it_stopped(
    model: Path, text: Path, tmp_path: Path
) -> None:
    common = ("--pattern", "2:4", "--resume", tmp_path / "layers")
    part = prune(model, text, tmp_path / "part", *common, "--layers", "1")
    assert part.exit_code == 0, part.output
    assert "1 layers are not finished yet" in part.output
    assert not (tmp_path / "part").exists()
    for name, arguments in [("resumed", common), ("at-once", common[:2])]:
        result = prune(model, text, tmp_path / name, *arguments)
        assert result.exit_code == 0, result.output
    weights = [
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("resumed", "at-once")
    ]
    assert weights[0] == weights[1]


def test_a_structured_run_goes_on_where_it_stopped(
    model: Path, text: Path, tmp_path: Path
) -> None:
    common = (*SMALLER, "--resume", tmp_path / "layers")
    part = prune(model, text, tmp_path / "part", *common, "--layers", "1")
    assert part.exit_code == 0, part.output
    assert "1 layers are not finished yet" in part.output
    for name, arguments in [("resumed", common), ("at-once", SMALLER)]:
        result = prune(model, text, tmp_path / name, *arguments)
        assert result.exit_code == 0, result.output
    weights = [
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("resumed", "at-once")
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("family", "options", "alone"),
    [
        # tied embeddings, and new shapes; the recovery needs a single process
        ("opt", SMALLER, ["--no-recover"]),
        # these are loaded as a whole to be verified
        ("mixtral", ["--pattern", "2:4"], []),
        ("llama", ["--recipe", RECIPES / "fista-2of4-w8a8.yaml"], []),
    ],
)
def test_torchrun_shares_the_layers_out(
    family: str,
    options: list[Any],
    alone: list[str],
    tiny_tokenizer: PreTrainedTokenizerBase,
    text: Path,
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint(family, vocab_size=len(tiny_tokenizer)), model)
    tiny_tokenizer.save_pretrained(model)
    arguments = ["prune", model, *options, "--dataset", text]
    arguments += ["--samples", 4, "--seq-len", 16, "-o", tmp_path / "two"]
    command = [
        *TWO_PROCESSES,
        str(Path(__file__).with_name("late_rank.py")),
        *map(str, arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Wrote") == 1
    told = "layers are trained as by --no-recover: recovery needs a single process"
    assert (told in done.stdout + done.stderr) == bool(alone)
    result = prune(model, text, tmp_path / "one", *options, *alone)
    assert result.exit_code == 0, result.output
    two, one = (
        load_file(tmp_path / name / "model.safetensors") for name in ("two", "one")
    )
    # sums that several processes add up are rounded elsewhere
    torch.testing.assert_close(two, one)


def test_ranks_that_share_weights_refuse_smoothquant(
    model: Path, text: Path, tmp_path: Path
) -> None:
    """Each rank of llm-compressor 0.14 would scale the weights once more."""
    arguments = ["prune", model, "--dataset", text, "-o", tmp_path / "out"]
    arguments += ["--samples", 4, "--seq-len", 16]
    arguments += ["--recipe", RECIPES / "fista-2of4-smoothquant-w8a8.yaml"]
    command = [*TWO_PROCESSES, "-m", "fista_modifier.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    said = " ".join((done.stdout + done.stderr).split())
    assert "SmoothQuantModifier changes weights once on each rank" in said
    assert not (tmp_path / "out").exists()
