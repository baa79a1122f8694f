"""Packed weights and the checkpoints that hold them."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from families import tiny_model
from problems import normal
from runs import run
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fista_modifier import FISTAPruningModifier, pipeline
from fista_modifier.checkpoint.packing import pack, unpack
from fista_modifier.checkpoint.sparsity_config import write_sizes
from fista_modifier.checkpoint.storage import convert, unpack_checkpoint
from fista_modifier.checkpoint.verification import verify
from fista_modifier.pruning.results import PruningReport
from fista_modifier.serving import unpacked
from fista_modifier.solver import parse_pattern
from fista_modifier.solver.patterns import project

TWO_OF_FOUR = parse_pattern("2:4", None)
FORMATS = ["sparse-bitmask", "sparse-24-bitmask"]
LAST = "model.layers.1.mlp.down_proj"


def test_the_bitmask_layout_is_the_published_one():
    """Written down by hand: rows of ten columns fill two bytes, lowest bit first."""
    weight = torch.zeros(3, 10)
    weight[0, [0, 3, 9]] = torch.tensor([1.0, 2.0, 3.0])
    weight[2, 8] = -4.0
    parts = pack(weight, "sparse-bitmask")
    assert parts["compressed"].tolist() == [1, 2, 3, -4]
    assert parts["bitmask"].tolist() == [[0b1001, 0b10], [0, 0], [0, 0b1]]
    assert parts["row_offsets"].tolist() == [0, 3, 3]
    assert parts["shape"].tolist() == [3, 10]
    assert parts["shape"].dtype == parts["row_offsets"].dtype == torch.int64


def test_the_two_of_four_layout_is_the_published_one():
    weight = torch.tensor([[0.0, 5, 0, 6, 7, 0, 0, 0], [1, 2, 0, 0, 0, 0, 3, 4]])
    parts = pack(weight, "sparse-24-bitmask")
    # a group with one value keeps a zero as well, so that two remain of every four
    assert parts["compressed"].shape == (2, 4)
    assert parts["compressed"][1].tolist() == [1, 2, 3, 4]
    assert parts["bitmask"][1].tolist() == [0b11000011]
    assert parts["shape"].tolist() == [[2], [8]]
    assert torch.equal(unpack(parts), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (16, 64)])
def test_what_is_packed_unpacks_bit_for_bit(dtype, packed_format, shape):
    weight = project(normal(*shape), TWO_OF_FOUR).to(dtype)
    parts = pack(weight, packed_format)
    assert torch.equal(unpack(parts), weight)
    assert parts["compressed"].dtype == dtype


def test_a_weight_without_the_pattern_is_not_packed_as_if():
    with pytest.raises(ValueError, match="use sparse-bitmask"):
        pack(normal(4, 8), "sparse-24-bitmask")
    with pytest.raises(ValueError, match="'sparse' is none of sparse-bitmask"):
        pack(normal(4, 8), "sparse")


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("shape", torch.tensor([3, 17]), "bitmask is"),
        ("shape", torch.tensor([3, 9]), "bitmask marks"),
        ("shape", torch.tensor([3]), "not that of a matrix"),
        ("shape", torch.tensor([-3, 12]), "not that of a matrix"),
        ("compressed", torch.zeros(5), "there are 5"),
        ("bitmask", torch.zeros(3, 2, dtype=torch.uint8), "marks 0 entries"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(name, value, match):
    parts = pack(project(normal(3, 12), TWO_OF_FOUR), "sparse-bitmask")
    with pytest.raises(ValueError, match=match):
        unpack(parts | {name: value})


@pytest.fixture
def pruned(tmp_path: Path) -> Callable[..., tuple[Path, list[str]]]:
    """A pruned bfloat16 checkpoint of the given pattern, and its operators."""

    def make(
        pattern: str = "2:4", family: str = "llama", **settings: object
    ) -> tuple[Path, list[str]]:
        model = tiny_model(family, torch.bfloat16, **settings)
        modifier = FISTAPruningModifier(
            mask_structure=pattern, sparsity=0.5, preset="fast"
        )
        run(model, modifier)
        folder = tmp_path / "pruned"
        model.save_pretrained(folder, max_shard_size="40KB")
        return folder, [result.name for result in modifier.results]

    return make


def tensors(folder: Path) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        held |= load_file(file)
    return held


@pytest.mark.parametrize("packed_format", FORMATS)
def test_a_packed_checkpoint_is_smaller_and_unpacks_to_the_same(
    packed_format, pruned, tmp_path
):
    folder, operators = pruned(hidden_size=256, intermediate_size=512)
    dense, config = tensors(folder), (folder / "config.json").read_text()
    share = convert(folder, operators, packed_format)
    assert share <= (0.57 if packed_format == "sparse-24-bitmask" else 0.58)
    names = set(tensors(folder))
    assert f"{LAST}.bitmask" in names and f"{LAST}.weight" not in names
    sparsity = json.loads((folder / "config.json").read_text())["quantization_config"][
        "sparsity_config"
    ]
    assert sparsity["format"] == packed_format
    assert sparsity["targets"] == sorted(operators)
    assert sparsity["sparsity_structure"] == "2:4"
    assert verify(folder, TWO_OF_FOUR).passed

    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ text }}")
    output = tmp_path / "unpacked"
    assert unpack_checkpoint(folder, output) == len(operators)
    templates = output / "additional_chat_templates"
    assert (templates / "rag.jinja").read_text() == "{{ text }}"
    assert json.loads((output / "config.json").read_text()) == json.loads(config)
    again = tensors(output)
    assert again.keys() == dense.keys()
    assert all(torch.equal(again[name], dense[name]) for name in dense)
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(loaded.get_submodule(LAST).weight, dense[f"{LAST}.weight"])


@pytest.mark.parametrize("packed_format", FORMATS)
def test_experts_are_packed_where_they_are_stored_one_by_one(
    packed_format, pruned, tmp_path
):
    folder, operators = pruned(family="qwen3_moe")
    dense = tensors(folder)
    convert(folder, operators, packed_format)
    packed = tensors(folder)
    assert "model.layers.1.mlp.experts.3.up_proj.bitmask" in packed
    assert not any(f"{name}.weight" in packed for name in operators)
    for checked in (verify(folder), verify(folder, TWO_OF_FOUR)):
        assert checked.passed and len(checked.operators) == len(operators)
    assert unpack_checkpoint(folder, tmp_path / "unpacked") == len(operators)
    again = tensors(tmp_path / "unpacked")
    assert again.keys() == dense.keys()
    assert all(torch.equal(again[name], dense[name]) for name in dense)


@pytest.mark.parametrize("packed_format", FORMATS)
def test_what_cannot_be_packed_stays_dense_and_whole(
    packed_format, tiny_tokenizer, tmp_path
):
    """Mixtral's files have other names than its operators."""
    model = tiny_model("mixtral", torch.bfloat16)
    modifier = FISTAPruningModifier(mask_structure="2:4", preset="fast")
    run(model, modifier)
    report = PruningReport("mixtral", None, 1.0, modifier.results)
    folder = tmp_path / "pruned"
    with pytest.raises(ValueError, match=r"experts\.0.* use --format dense.* is whole"):
        pipeline.save(model, tiny_tokenizer, folder, report, packed_format)
    assert PruningReport.load(folder).storage_format == "dense"
    assert "sparsity_config" in json.loads((folder / "config.json").read_text())
    checked = verify(folder)
    assert checked.passed and len(checked.operators) == len(modifier.results)
    assert {path.name for path in tmp_path.iterdir()} == {"pruned"}


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last compressed-tensors with these formats, and a transformers of then."""
    target = tmp_path_factory.mktemp("published")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    install += ["--target", str(target), "compressed-tensors==0.14.0.1"]
    install += ["transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2"]
    subprocess.run(install, check=True)
    return target


@pytest.mark.parametrize("packed_format", FORMATS)
def test_compressed_tensors_reads_what_is_packed_and_writes_the_same_bytes(
    packed_format, published, tmp_path
):
    weights = {
        f"model.layers.{index}.up_proj.weight": project(
            normal(*shape, seed=index), TWO_OF_FOUR
        ).to(dtype)
        for index, (shape, dtype) in enumerate(
            [((16, 64), torch.bfloat16), ((24, 36), torch.float32)]
        )
    }
    packed = {}
    for name, weight in weights.items():
        for part, tensor in pack(weight, packed_format).items():
            packed[name.removesuffix("weight") + part] = tensor
    files = [tmp_path / "packed.safetensors", tmp_path / "dense.safetensors"]
    save_file(packed, files[0])
    save_file(weights, files[1])
    reader = Path(__file__).with_name("published_reader.py")
    process = subprocess.run(
        [sys.executable, reader, packed_format, *files],
        env=os.environ | {"PYTHONPATH": str(published)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.split() == ["2"]


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
packed, dense = (
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for folder in sys.argv[1:]
)
assert packed.keys() == dense.keys()
assert all(torch.equal(packed[name], dense[name]) for name in dense)
"""


@pytest.mark.parametrize("storage_format", ["sparse-24-bitmask", "dense-legacy"])
def test_transformers_of_2025_loads_whole_checkpoints(
    storage_format, pruned, published, tmp_path
):
    """(Its own loader fails on sparse-bitmask: it packs the empty model, on meta.)"""
    folder, operators = pruned()
    dense = shutil.copytree(folder, tmp_path / "dense")
    convert(folder, operators, storage_format)
    process = subprocess.run(
        [sys.executable, "-c", LOAD, folder, dense],
        env=os.environ | {"PYTHONPATH": str(published)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]


def test_unstructured_sparsity_packs_too(pruned, tmp_path):
    folder, operators = pruned("0:0", hidden_size=256, intermediate_size=512)
    dense = tensors(folder)
    with pytest.raises(ValueError, match=r"_proj: sparse-24-bitmask is for 2:4"):
        convert(folder, operators, "sparse-24-bitmask")
    assert convert(folder, operators, "sparse-bitmask") <= 0.58
    unpack_checkpoint(folder, tmp_path / "unpacked")
    again = tensors(tmp_path / "unpacked")
    assert all(torch.equal(again[name], dense[name]) for name in dense)


def test_the_legacy_form_differs_in_the_configuration_only(pruned):
    folder, operators = pruned()
    before = tensors(folder)
    assert convert(folder, operators, "dense-legacy") == 1
    content = json.loads((folder / "config.json").read_text())
    assert "sparsity_config" not in content
    sparsity = content["quantization_config"]["sparsity_config"]
    assert sparsity["format"] == "dense" and sparsity["targets"]
    after = tensors(folder)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_is_not_packed_is_not_unpacked(pruned, tmp_path):
    folder, _ = pruned()
    with pytest.raises(ValueError, match="has no packed weights"):
        unpack_checkpoint(folder, tmp_path / "unpacked")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    convert(folder, pruned()[1], "sparse-bitmask")
    with pytest.raises(FileExistsError, match="is not empty"):
        unpack_checkpoint(folder, tmp_path / "full")


def test_a_damaged_checkpoint_is_an_error_or_is_read(pruned, tmp_path):
    """A bit flipped or a file cut short, a thousand times: never anything else."""
    folder, operators = pruned()
    dense = tensors(folder)
    convert(folder, operators, "sparse-bitmask")
    generator = random.Random(0)
    files = sorted(folder.glob("*.safetensors")) + [folder / "config.json"]
    beside = set(tmp_path.iterdir())
    refused = 0
    for trial in range(1000):
        file = generator.choice(files)
        intact = file.read_bytes()
        damaged = bytearray(intact)
        if generator.random() < 0.3:
            del damaged[generator.randrange(len(damaged)) :]
        else:
            position = generator.randrange(min(len(damaged), 4000))
            damaged[position] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        output = tmp_path / f"unpacked-{trial}"
        with suppress(ValueError, OSError):
            verify(folder)
        try:
            unpack_checkpoint(folder, output)
        except (ValueError, OSError):
            refused += 1
            assert not output.exists()
        else:
            # another value may go unnoticed, or the name of an offset
            found = tensors(output)
            both = found.keys() & dense.keys()
            assert all(found[name].shape == dense[name].shape for name in both)
            shutil.rmtree(output)
        file.write_bytes(intact)
        assert set(tmp_path.iterdir()) == beside
    assert 200 < refused < 1000


def huge_shape(folder: Path) -> None:
    """A header that declares a terabyte."""
    header = {"x.weight": {"dtype": "F32", "shape": [2**19, 2**19]}}
    header["x.weight"]["data_offsets"] = [0, 2**40]
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + bytes(64)
    )


def index_of(shard: str) -> Callable[[Path], object]:
    def lie(folder: Path) -> None:
        index = {"weight_map": {f"{LAST}.weight": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return lie


def twice(folder: Path) -> None:
    """A dense weight beside the packed one."""
    stored = tensors(folder)
    rows, columns = stored[f"{LAST}.shape"].tolist()
    stored[f"{LAST}.weight"] = torch.zeros(rows, columns)
    save_file(stored, folder / "model.safetensors")


@pytest.mark.parametrize(
    "lie",
    [
        twice,
        huge_shape,
        index_of("../outside.safetensors"),
        index_of("/etc/hostname"),
        index_of("missing.safetensors"),
        index_of("config.json"),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "config.json").unlink(),
    ],
)
def test_a_checkpoint_that_lies_is_refused(pruned, tmp_path, lie):
    folder, operators = pruned()
    convert(folder, operators, "sparse-bitmask")
    beside = set(tmp_path.iterdir())
    lie(folder)
    with pytest.raises((ValueError, OSError)):
        unpack_checkpoint(folder, tmp_path / "unpacked")
    with suppress(ValueError, OSError):
        found = verify(folder)
        assert found.problems or found.failures
    assert set(tmp_path.iterdir()) == beside


def test_parts_may_lie_in_different_shards(pruned, tmp_path):
    folder, operators = pruned()
    dense = tensors(folder)
    convert(folder, operators, "sparse-bitmask")
    every = tensors(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    names = sorted(every)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: every[name] for name in held}, folder / file)
    index = {"weight_map": {name: f for f, held in halves.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    unpack_checkpoint(folder, tmp_path / "unpacked")
    again = tensors(tmp_path / "unpacked")
    assert all(torch.equal(again[name], dense[name]) for name in dense)


@pytest.mark.parametrize("packed_format", FORMATS)
def test_a_stream_of_tensors_is_unpacked_in_any_order(packed_format):
    weights = {
        f"layers.{index}.weight": project(normal(8, 16, seed=index), TWO_OF_FOUR)
        for index in range(2)
    }
    packed = [
        (name.removesuffix("weight") + part, tensor)
        for name, weight in weights.items()
        for part, tensor in pack(weight, packed_format).items()
    ]
    others = [("norm.weight", torch.ones(16))]
    for order in (packed + others, others + packed[::-1], packed[::2] + packed[1::2]):
        found = dict(unpacked(order))
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        assert found.keys() - weights.keys() <= {"norm.weight"}
    with pytest.raises(ValueError, match=r"parts of the packed weight of layers\.1"):
        list(unpacked(packed[:-1]))


def test_sizes_are_written_where_a_file_has_them(tmp_path: Path) -> None:
    """Those of Qwen2-VL on the hub have in one what transformers nests."""
    nested = {"text_config": {"intermediate_size": 48}, "intermediate_size": 7}
    for content, expected in (
        ({"intermediate_size": 48}, {"intermediate_size": 32}),
        (nested, {"text_config": {"intermediate_size": 32}, "intermediate_size": 7}),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        write_sizes(tmp_path, {"text_config.intermediate_size": 32})
        assert json.loads((tmp_path / "config.json").read_text()) == expected
