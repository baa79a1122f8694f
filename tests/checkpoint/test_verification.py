"""Verification finds what is wrong with a checkpoint, and only that."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXTURES, checkpoint
from model_kinds import KINDS
from operator_results import operator_result
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
)

from fista_modifier.checkpoint.verification import (
    OperatorCheck,
    Verification,
    verify,
)
from fista_modifier.cli.tables import verification_table
from fista_modifier.models.experts import linearize, native_experts
from fista_modifier.models.targets import find_operators
from fista_modifier.pruning.results import Calibration, PruningReport
from fista_modifier.solver import NofM, Unstructured
from fista_modifier.solver.patterns import SparsityPattern, project

PATTERN = NofM(2, 4)
Q_PROJ = "model.layers.0.self_attn.q_proj"
Lie = Callable[[Path], object]


def sparse(
    folder: Path,
    family: str = "llama",
    pattern: SparsityPattern = PATTERN,
    shard_size: str = "1GB",
    **settings: object,
) -> Path:
    """A tiny model, pruned by magnitude and saved."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family, **settings))
    linearize(model)
    for operator in find_operators(model, ["Linear"], ["re:.*lm_head"]):
        operator.save(project(operator.weight, pattern))
    with native_experts(model):
        model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the only file of weights."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def report(zeros: int) -> PruningReport:
    """A report that knows one operator."""
    result = operator_result(Q_PROJ, zeros)
    return PruningReport("model", Calibration("text.txt", 2, 4, 0), 1.0, [result])


def faults(verification: Verification) -> list[str]:
    return [*verification.problems, *(f.name for f in verification.failures)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sparse_checkpoint_of_every_family_passes(
    family: str, tmp_path: Path
) -> None:
    verification = verify(sparse(tmp_path, family), PATTERN)
    assert faults(verification) == []
    assert len(verification.operators) == len(FAMILIES[family].operators)
    assert all(check.zeros == check.entries / 2 for check in verification.operators)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_experts_of_a_mixture_are_among_its_operators(
    family: str, tmp_path: Path
) -> None:
    verification = verify(sparse(tmp_path, family), PATTERN)
    assert faults(verification) == []
    names = {check.name for check in verification.operators}
    assert sum(".experts." in name for name in names) == 2 * 4 * 3
    assert not any(name.endswith("gate") for name in names)
    assert all(check.zeros == check.entries / 2 for check in verification.operators)
    assert not verify(tmp_path, Unstructured(0.6)).passed


@pytest.mark.parametrize("family", MIXTURES)
def test_a_damaged_expert_is_found(family: str, tmp_path: Path) -> None:
    sparse(tmp_path, family)
    intact = load_file(tmp_path / "model.safetensors")
    (damaged, *_) = (name for name in intact if re.search(r"s\.1\..*s\.2\.", name))
    change(tmp_path, lambda tensors: tensors[damaged][3, :4].fill_(1.0))
    (failed,) = verify(tmp_path, PATTERN).failures
    assert ".layers.1.mlp.experts.2." in failed.name
    change(tmp_path, lambda tensors: tensors[damaged][3, :1].fill_(float("nan")))
    (problem, *_) = verify(tmp_path, PATTERN).problems
    assert ".layers.1.mlp.experts.2." in problem and "NaN" in problem
    change(tmp_path, lambda tensors: tensors.pop(damaged))
    assert verify(tmp_path, PATTERN).problems
    change(tmp_path, lambda tensors: tensors.update(intact, stranger=torch.zeros(1)))
    (problem,) = faults(verify(tmp_path, PATTERN))
    assert "stranger" in problem


@pytest.mark.parametrize("family", [MixtralConfig, GptOssConfig])
def test_experts_under_names_that_transformers_does_not_know_are_missing(
    family: type[PretrainedConfig], tmp_path: Path
) -> None:
    """As the toolkit saves them."""
    sizes = MIXTURES["mixtral"].settings | {"head_dim": 8}
    model = AutoModelForCausalLM.from_config(family(**sizes))
    linearize(model)
    model.save_pretrained(tmp_path)
    problems = verify(tmp_path, Unstructured(0.0)).problems
    assert any("experts.gate_up_proj is missing" in problem for problem in problems)


@pytest.mark.parametrize("number", [3, 5, 10**3, 10**9])
@pytest.mark.parametrize("family", MIXTURES)
def test_another_number_of_experts_is_refused_at_once(
    family: str, number: int, tmp_path: Path
) -> None:
    sparse(tmp_path, family)
    content = json.loads((tmp_path / "config.json").read_text())
    name = {"num_experts", "num_local_experts"} & content.keys()
    config(**{name.pop(): number})(tmp_path)
    started = time.perf_counter()
    assert not verify(tmp_path, PATTERN).passed
    assert time.perf_counter() - started < 5


def sparse_kind(folder: Path, kind: str) -> dict[str, Tensor]:
    """A tiny model of another kind, pruned by magnitude; what is in its file."""
    model = KINDS[kind].model()
    for operator in find_operators(model, ["Linear"], ["re:.*lm_head"]):
        operator.save(project(operator.weight, PATTERN))
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_checkpoint_of_every_kind_passes(kind: str, tmp_path: Path) -> None:
    sparse_kind(tmp_path, kind)
    verification = verify(tmp_path, PATTERN)
    assert faults(verification) == []
    model = KINDS[kind].model()
    operators = find_operators(model, ["Linear"], ["re:.*lm_head"])
    assert {check.name for check in verification.operators} == {
        operator.name for operator in operators
    }
    assert all(check.zeros >= check.entries / 2 for check in verification.operators)


@pytest.mark.parametrize(
    "kind, stored, operator",
    [
        ("gpt_neox", "embed_out.weight", "lm_head"),
        ("vision", "visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv"),
    ],
)
def test_faults_are_found_under_other_names(
    kind: str, stored: str, operator: str, tmp_path: Path
) -> None:
    """The files have the names of old checkpoints, the model has today's."""
    intact = sparse_kind(tmp_path, kind)
    assert stored in intact
    change(tmp_path, lambda tensors: tensors.pop(stored))
    assert f"{operator}.weight is missing" in faults(verify(tmp_path, PATTERN))
    change(tmp_path, lambda tensors: tensors.update(intact, stranger=torch.zeros(1)))
    (fault,) = faults(verify(tmp_path, PATTERN))
    assert "stranger" in fault
    dense = torch.ones_like(intact[stored])
    change(tmp_path, lambda tensors: (tensors.clear(), tensors.update(intact)))
    change(tmp_path, lambda tensors: tensors.update({stored: dense}))
    expected = [] if kind == "gpt_neox" else [operator]
    assert faults(verify(tmp_path, PATTERN)) == expected


def test_a_weight_that_layers_share_is_checked_for_all_of_them(tmp_path: Path) -> None:
    """The modifier leaves them dense; other tools do not."""
    shared = [
        f"model.layers.{layer}.shared_transformer.self_attn.q_proj" for layer in (0, 2)
    ]
    model = KINDS["zamba2"].model()
    weight = model.get_submodule(shared[0]).weight.data
    weight.copy_(project(weight, PATTERN))
    model.save_pretrained(tmp_path)
    results = [
        replace(
            operator_result(name, int((weight == 0).sum())), shape=tuple(weight.shape)
        )
        for name in shared
    ]
    PruningReport("a model", None, 0.0, results).save(tmp_path)

    def lies(tensors: dict[str, Tensor]) -> None:
        (stored,) = {f"{name}.weight" for name in shared} & tensors.keys()
        tensors[stored][3, :4] = 1.0

    assert verify(tmp_path).passed
    change(tmp_path, lies)
    assert set(faults(verify(tmp_path))) == set(shared)


def test_shards_pass_and_a_missing_one_is_named(tmp_path: Path) -> None:
    sparse(tmp_path, shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert verify(tmp_path, PATTERN).passed
    shards[0].unlink()
    verification = verify(tmp_path, PATTERN)
    assert f"the shard {shards[0].name} is missing" in verification.problems


def test_an_index_that_disagrees_with_its_shards_is_found(tmp_path: Path) -> None:
    sparse(tmp_path, shard_size="20KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    del index["weight_map"]["model.norm.weight"]
    file.write_text(json.dumps(index))
    assert any(
        "model.norm.weight" in fault for fault in faults(verify(tmp_path, PATTERN))
    )
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    file.write_text(json.dumps(index))
    (fault,) = verify(tmp_path, PATTERN).problems
    assert "outside" in fault


def test_one_entry_too_many_fails_its_operator(tmp_path: Path) -> None:
    sparse(tmp_path)
    change(tmp_path, lambda tensors: tensors[f"{Q_PROJ}.weight"][3, :4].fill_(1.0))
    assert faults(verify(tmp_path, PATTERN)) == [Q_PROJ]


def test_an_unstructured_checkpoint_is_not_2_of_4(tmp_path: Path) -> None:
    sparse(tmp_path, pattern=Unstructured(0.5))
    assert verify(tmp_path, Unstructured(0.5)).passed
    assert len(verify(tmp_path, PATTERN).failures) == len(FAMILIES["llama"].operators)
    assert len(verify(tmp_path, Unstructured(0.6)).failures) > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_found(tmp_path: Path, value: float) -> None:
    sparse(tmp_path)
    change(tmp_path, lambda tensors: tensors["model.norm.weight"][:1].fill_(value))
    (fault,) = faults(verify(tmp_path, PATTERN))
    assert "model.norm.weight" in fault


def test_missing_unknown_and_misshapen_tensors_are_found(tmp_path: Path) -> None:
    sparse(tmp_path)

    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{Q_PROJ}.weight"]
        tensors["stranger"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.ones(3)

    change(tmp_path, edit)
    found = " ".join(faults(verify(tmp_path, PATTERN)))
    for name in (Q_PROJ, "stranger", "model.norm.weight"):
        assert name in found


def test_tied_weights_may_be_stored_once_or_twice_but_equal(tmp_path: Path) -> None:
    sparse(tmp_path, tie_word_embeddings=True)
    assert verify(tmp_path, PATTERN).passed

    def store_twice(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change(tmp_path, store_twice)
    assert verify(tmp_path, PATTERN).passed
    change(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    (fault,) = faults(verify(tmp_path, PATTERN))
    assert "tied" in fault


def test_the_report_says_what_to_expect(tmp_path: Path) -> None:
    sparse(tmp_path)
    with pytest.raises(FileNotFoundError, match="--pattern"):
        verify(tmp_path)
    report(zeros=512).save(tmp_path)
    assert [check.name for check in verify(tmp_path).operators] == [Q_PROJ]
    assert verify(tmp_path).passed
    report(zeros=511).save(tmp_path)
    assert faults(verify(tmp_path)) == [Q_PROJ]


def test_a_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    report(zeros=512).save(tmp_path)
    assert PruningReport.load(tmp_path) == report(zeros=512)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        verify(tmp_path, PATTERN)


def test_damaged_files_are_faults_or_messages_never_crashes(tmp_path: Path) -> None:
    sparse(tmp_path)
    report(zeros=512).save(tmp_path)
    files = ["model.safetensors", "config.json", "pruning_report.json"]
    originals = {name: (tmp_path / name).read_bytes() for name in files}
    choice = random.Random(0)
    for _ in range(200):
        name = choice.choice(files)
        damaged = bytearray(originals[name])
        truncated = choice.random() < 0.5
        if truncated:
            del damaged[choice.randrange(len(damaged) - 1) :]
        else:  # most often in what describes the data
            damaged[choice.randrange(min(len(damaged), 2000))] = choice.randrange(256)
        (tmp_path / name).write_bytes(damaged)
        try:
            # another value of a weight is no fault
            assert not (verify(tmp_path).passed and truncated)
        except (ValueError, OSError):
            pass
        (tmp_path / name).write_bytes(originals[name])
    assert verify(tmp_path).passed


def edit_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Lie:
    def lie(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))

    return lie


def config(**settings: object) -> Lie:
    return edit_json("config.json", lambda content: content.update(settings))


def operator(**fields: object) -> Lie:
    def edit(content: dict[str, Any]) -> None:
        content["operators"][0].update(fields)

    return edit_json("pruning_report.json", edit)


def text(name: str, content: str) -> Lie:
    return lambda folder: (folder / name).write_text(content)


def shard(name: str) -> Lie:
    index = {"weight_map": {f"{Q_PROJ}.weight": name}}
    return text("model.safetensors.index.json", json.dumps(index))


def link(name: str, target: str) -> Lie:
    def lie(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return lie


def header(shape: list[int], end: int, size: int) -> Lie:
    """Weights of one tensor, ``end`` bytes by the header, ``size`` by the file."""

    def lie(folder: Path) -> None:
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
        declared = json.dumps({f"{Q_PROJ}.weight": entry}).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(declared).to_bytes(8, "little") + declared)
            file.truncate(8 + len(declared) + size)

    return lie


LIES = {
    "a billion layers": config(num_hidden_layers=10**9),
    "quantised and of a billion layers": config(
        num_hidden_layers=10**9,
        quantization_config={"quant_method": "compressed-tensors", "config_groups": 1},
    ),
    "no layers": config(num_hidden_layers=0),
    "less than no layers": config(num_hidden_layers=-1),
    "layers without number": config(num_hidden_layers="many"),
    "a huge width": config(hidden_size=4 * 10**12),
    "another architecture": config(model_type="gpt2"),
    "an unknown architecture": config(model_type="none"),
    "code of its own": config(model_type="none", auto_map={"AutoConfig": "evil.Evil"}),
    "quantised somehow": config(quantization_config={"config_groups": {"a": 1}}),
    "a list as configuration": text("config.json", "[]"),
    "a deep configuration": text("config.json", "[" * 100_000),
    "zeros in words": operator(zeros="many"),
    "a pattern in numbers": operator(pattern=24),
    "no pattern": operator(pattern=None),
    "an impossible pattern": operator(pattern="5:4"),
    "names in a list": operator(name=["q_proj"]),
    "an unknown name": operator(name="no.such.operator"),
    "another zero": operator(zeros=511),
    "a deep report": text("pruning_report.json", "[" * 100_000),
    "operators without a list": text("pruning_report.json", '{"operators": {}}'),
    "a shard outside": shard("../../outside.safetensors"),
    "a shard at the root": shard("/etc/hostname"),
    "a shard that is no file": shard(".."),
    "a shard that is no name": shard("\0"),
    "a shard that is the configuration": shard("config.json"),
    "a shard that is missing": shard("missing.safetensors"),
    "weights without end": link("model.safetensors", "/dev/zero"),
    "weights that are themselves": link("model.safetensors", "model.safetensors"),
    "a configuration without end": link("config.json", "/dev/zero"),
    "a terabyte declared": header([2**19, 2**19], 2**40, 64),
    "gigabytes of nothing": header([2**17, 2**16], 2**35, 2**35),
    "a header without end": text("model.safetensors", "\x7f" * 64),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=list(LIES))
def test_lies_are_refused_at_once(lie: Lie, tmp_path: Path) -> None:
    sparse(tmp_path)
    report(zeros=512).save(tmp_path)
    lie(tmp_path)
    started = time.perf_counter()
    with suppress(ValueError, OSError):
        assert faults(verify(tmp_path))
    assert time.perf_counter() - started < 5


def test_a_header_of_many_tensors_is_read_once(tmp_path: Path) -> None:
    """Read for each of them, it would take minutes."""
    sparse(tmp_path)
    change(
        tmp_path,
        lambda tensors: tensors.update(
            {f"stranger.{number}": torch.zeros(1) for number in range(20_000)}
        ),
    )
    started = time.perf_counter()
    assert len(verify(tmp_path, PATTERN).problems) == 20_000
    assert time.perf_counter() - started < 20


def test_brackets_in_a_report_are_no_markup() -> None:
    check = OperatorCheck("q[/bold]", "[/red] 50 %", 1, 2)
    console = Console(width=200, record=True)
    console.print(verification_table(Verification([check])))
    assert "q[/bold]" in console.export_text()
