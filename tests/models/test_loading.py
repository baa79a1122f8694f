"""Models compute what they were trained to once they are loaded, and can be saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import tiny_model
from runs import prune, samples
from transformers import GenerationConfig

from fista_modifier.models import loading
from fista_modifier.models.generation import make_generation_config_storable
from fista_modifier.models.loading import load_model

SAMPLING = {"temperature": 0.9, "top_p": 0.6}  # as Vicuna has it


def test_soft_caps_of_attention_are_applied(tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    assert model.config.attn_logit_softcapping is not None
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(samples()).logits
        found = load_model(str(tmp_path), "float32")(samples()).logits
    torch.testing.assert_close(found, expected)


def test_other_models_have_the_attention_of_transformers(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config._attn_implementation == "sdpa"


def test_processes_need_room_for_the_model_that_they_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    config = loading.load_config(str(tmp_path))
    size = sum(one.numel() for one in model.parameters())
    usage = shutil.disk_usage(tmp_path)

    def check(dtype: str, free: int) -> None:
        found = usage._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _folder: found)
        monkeypatch.setattr(loading, "SHARED_MEMORY", tmp_path)
        loading._check_shared_memory(config, dtype)

    check("auto", 4 * size)
    check("bfloat16", 2 * size)
    for dtype in ("auto", "float32"):
        with pytest.raises(ValueError, match="--shm-size"):
            check(dtype, 4 * size - 1)


def test_settings_for_sampling_do_not_cost_the_run(
    tmp_path: Path, warnings: list[str]
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | SAMPLING))
    model = load_model(str(tmp_path))
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "dense")
    prune(model, preset="fast", ignore=["re:.*lm_head"])
    assert any("do_sample is true now" in warning for warning in warnings)
    model.save_pretrained(tmp_path / "out")
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (
        saved.do_sample and {key: getattr(saved, key) for key in SAMPLING} == SAMPLING
    )


def test_what_cannot_be_mended_is_refused_before_the_run() -> None:
    model = tiny_model("llama")
    model.generation_config.max_new_tokens = -1
    with pytest.raises(ValueError, match="could not be saved.*max_new_tokens"):
        prune(model, preset="fast")
    assert not model.generation_config.do_sample


def test_a_model_without_settings_is_refused_before_the_run() -> None:
    model = tiny_model("llama")
    model.generation_config = None
    with pytest.raises(ValueError, match="set model.generation_config = "):
        prune(model, preset="fast")
    model.generation_config = GenerationConfig()
    prune(model, preset="fast")


def test_settings_that_can_be_saved_stay() -> None:
    model = tiny_model("llama")
    before = model.generation_config.to_dict()
    make_generation_config_storable(model)
    assert model.generation_config.to_dict() == before
