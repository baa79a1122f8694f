"""Models that are not in memory as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import checkpoint, tiny_model
from runs import prune, weights
from transformers import AutoModelForCausalLM


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
