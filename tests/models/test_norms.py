"""Norms that scale by 1 + w, which the toolkit replaces while it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import checkpoint, tiny_model
from llmcompressor.modeling.offset_norm import norm_calibration_context
from runs import prune, run, samples, weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from fista_modifier import FISTAPruningModifier, RecoveryModifier
from fista_modifier.models.loading import load_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_pruning_leaves_them_as_they_are(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    dense = weights(model)
    norms = [name for name in dense if "norm" in name]
    assert norms
    prune(model, preset="fast")
    after = weights(model)
    for name in norms:
        assert after[name].dtype == dtype
        assert torch.equal(after[name], dense[name]), name


def test_the_stand_in_computes_what_the_norm_computes() -> None:
    model = tiny_model("gemma3", torch.bfloat16)
    with torch.no_grad():
        expected = model(samples()).logits
        with norm_calibration_context(model):
            found = model(samples()).logits
    assert torch.equal(found, expected)


def scaled(model: PreTrainedModel) -> PreTrainedModel:
    """What a modifier does that makes some features smaller."""
    with norm_calibration_context(model):
        norm = model.model.layers[0].input_layernorm
        norm.weight.data.mul_(0.5)
    return model


def test_what_a_modifier_changes_is_kept(tmp_path: Path) -> None:
    """Also where weights are on a disk, so that they are read anew each time."""
    name = "model.layers.0.input_layernorm.weight"
    before = weights(tiny_model("gemma3"))[name]
    in_memory = scaled(tiny_model("gemma3"))
    on_disk = AutoModelForCausalLM.from_pretrained(
        checkpoint("gemma3"),
        device_map={
            **dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu"),
            "model.rotary_emb": "cpu",
            "model.layers": "disk",
        },
        offload_folder=tmp_path / "offloaded",
    )
    run(on_disk, FISTAPruningModifier(sparsity=0.5, targets=["re:.*q_proj"]))
    scaled(on_disk).save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for found in (in_memory, saved):
        after = weights(found)[name]
        torch.testing.assert_close(1 + after, (1 + before) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_recovery_takes_the_model_for_what_it_was_loaded_from(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny_model("gemma3", dtype).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    sparse = FISTAPruningModifier(
        mask_structure="2:4", preset="fast", ignore=["re:.*lm_head"]
    )
    run(model, [sparse, RecoveryModifier()])
    saved = weights(load_model(str(tmp_path)))
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(weights(model)[name], saved[name])
