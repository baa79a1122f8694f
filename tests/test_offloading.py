"""Models that are not in memory as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import checkpoint, tiny_model
from runs import prune, weights
from transformers import AutoModelForCausalLM

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


def test_matrices_in_main_memory_end_with_the_same_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = tiny_model("llama")
    prune(whole)
    monkeypatch.setattr(blocks, "BLOCK", 24)  # of 32 to 64 features
    in_blocks = tiny_model("llama")
    modifier = prune(in_blocks, offload_hessians=True)
    assert modifier.offload_hessians
    expected = weights(whole)
    for name, weight in weights(in_blocks).items():
        assert torch.equal(weight == 0, expected[name] == 0), name
        assert torch.allclose(weight, expected[name], rtol=1e-3, atol=1e-4), name
