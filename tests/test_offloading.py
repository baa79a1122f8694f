"""Models that are not in memory as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import checkpoint, tiny_model
from runs import SAMPLES, calibration, prune, samples, weights
from transformers import AutoModelForCausalLM

from fista_modifier.calibration import activations
from fista_modifier.solver import blocks


@pytest.mark.parametrize(
    "fields", [{}, {"error_correction": "full"}, {"preset": "paper"}], ids=str
)
def test_layers_on_disk_end_with_the_same_weights(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    in_memory = tiny_model("llama")
    prune(in_memory, **fields)
    on_disk = AutoModelForCausalLM.from_pretrained(
        checkpoint("llama"),
        device_map={
            "model.embed_tokens": "cpu",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "model.layers": "disk",
            "lm_head": "cpu",
        },
        offload_folder=tmp_path / "offloaded",
    )
    layer = on_disk.model.layers[0]
    assert layer.self_attn.q_proj.weight.device.type == "meta"
    prune(on_disk, **fields)
    on_disk.save_pretrained(tmp_path / "pruned")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    expected = weights(in_memory)
    for name, weight in weights(saved).items():
        assert torch.equal(weight, expected[name]), name


def test_tied_embeddings_on_disk_are_known_to_be_tied(tmp_path: Path) -> None:
    parts = ("model.embed_tokens", "model.layers", "lm_head")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint("gemma3"),
        device_map=dict.fromkeys(parts, "disk")
        | {"model.norm": "cpu", "model.rotary_emb": "cpu"},
        offload_folder=tmp_path,
    )
    with pytest.raises(ValueError, match="'lm_head' shares its weight"):
        prune(model, targets=["Linear", "lm_head"])


def test_matrices_in_main_memory_end_with_the_same_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # with fewer tokens than inputs, rounding decides which of two supports it is
    enough = {"oneshot_arguments": {"dataset": calibration(samples(16, 48, seed=1))}}
    whole = tiny_model("llama")
    prune(whole, **enough)
    monkeypatch.setattr(blocks, "BLOCK", 24)  # of 32 to 64 features
    in_blocks = tiny_model("llama")
    modifier = prune(in_blocks, offload_hessians=True, **enough)
    assert modifier.offload_hessians
    expected = weights(whole)
    for name, weight in weights(in_blocks).items():
        assert torch.equal(weight == 0, expected[name] == 0), name
        assert torch.allclose(weight, expected[name], rtol=1e-4, atol=1e-5), name


def mapped_files() -> set[str]:
    """What this process has mapped into its memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if len(line.split()) > 5}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "family, fields",
    [
        ("llama", {}),
        ("llama", {"error_correction": "full"}),
        ("opt", {"preset": "fast"}),
        ("mixtral", {}),
    ],
)
def test_activations_on_disk_end_with_the_same_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    fields: dict[str, Any],
) -> None:
    in_memory = tiny_model(family)
    prune(in_memory, **fields)
    monkeypatch.setattr(activations, "SMALLEST", 1)
    seen: set[str] = set()
    on_disk = tiny_model(family)
    for name, module in on_disk.named_modules():
        if name.endswith(("fc2", "o_proj")):
            module.register_forward_hook(lambda *_: seen.update(mapped_files()))
    folder = tmp_path / "new" / "activations"
    prune(on_disk, activations_dir=str(folder), **fields)
    assert any(name.startswith(f"{folder}/") for name in seen)
    assert list(folder.iterdir()) == []
    assert not any(name.startswith(f"{folder}/") for name in mapped_files())
    expected = weights(in_memory)
    for name, weight in weights(on_disk).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("preset", ["default", "fast", "paper"])
def test_what_the_toolkit_carries_to_the_next_layer_is_on_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    monkeypatch.setattr(activations, "SMALLEST", 1)
    model = tiny_model("llama")
    files: list[str | None] = []
    model.model.layers[1].register_forward_pre_hook(
        lambda _module, args: files.append(args[0].untyped_storage().filename)
    )
    one_pass = {"propagate_error": False}
    prune(
        model,
        preset=preset,
        activations_dir=str(tmp_path),
        oneshot_arguments=one_pass,
    )
    # the model itself with one batch, as loaded and eager, and the first pass; then the
    # layer is replayed
    recorded = files[2 : 2 + SAMPLES]
    assert len(recorded) == SAMPLES
    assert all(name and name.startswith(f"{tmp_path}/") for name in recorded)


FULL_DISK = """
import resource
from families import tiny_model
from fista_modifier.calibration import activations
from runs import prune
activations.SMALLEST = 1
model = tiny_model("llama")
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
prune(model, activations_dir={folder!r})
"""


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", FULL_DISK.format(folder=str(tmp_path))],
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert f"could not keep activations in {tmp_path}: " in process.stderr
    assert "name another activations_dir" in process.stderr
    assert list(tmp_path.iterdir()) == []
