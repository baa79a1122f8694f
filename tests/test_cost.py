"""The predicted cost is that of real runs."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path
from typing import Any

import cost as profile
import pytest
import torch
from command_line import invoke
from datasets import Dataset
from families import (
    FAMILIES,
    LAYERS,
    MIXTURES,
    MULTIMODAL,
    checkpoint,
    tiny_model,
)
from model_kinds import KINDS
from transformers import AutoConfig, LlamaConfig

from fista_modifier import FASPPruningModifier, FISTAPruningModifier, pipeline
from fista_modifier.cost import peak_device_memory, reconstruction_memory, shape_of
from fista_modifier.modifiers.forecast import forecasts
from fista_modifier.pruning.presets import PRESETS
from fista_modifier.pruning.reconstruction import reconstruct

WIDE = {"hidden_size": 128, "intermediate_size": 320, "max_position_embeddings": 64}


NARROW_EXPERTS = {
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 96,
    "head_dim": 32,
}


@pytest.mark.parametrize(
    "preset, family, settings",
    [
        ("default", "llama", WIDE),
        ("best", "llama", WIDE),
        ("fast", "llama", WIDE),
        ("default", "mixtral", WIDE),
        ("default", "qwen2_moe", WIDE | NARROW_EXPERTS),
    ],
)
def test_the_operations_are_those_that_a_run_counts(
    preset: str, family: str, settings: dict[str, int]
) -> None:
    model = tiny_model(family, **settings)
    tokens = torch.randint(2, 60, (32, 64))
    ones = torch.ones_like(tokens).tolist()
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": ones})
    modifier = FISTAPruningModifier(
        mask_structure="2:4", preset=preset, ignore=["re:.*lm_head"]
    )
    measured = profile.counted(model, object(), data, modifier)
    shape = shape_of(model.config, 64)
    expected = profile.predicted(model.config, shape, 32, PRESETS[preset])
    for phase, value in expected.items():
        assert value == pytest.approx(measured.get(phase, 0.0), rel=0.2), phase
    total = sum(measured.values())
    assert sum(expected.values()) == pytest.approx(total, rel=0.2)


@pytest.mark.parametrize(
    "structures, correction",
    [(["mlp"], "intra"), (["mlp", "heads"], "intra"), (["mlp", "heads"], "full")],
)
def test_the_operations_of_structured_pruning_are_those_that_a_run_counts(
    structures: list[str], correction: str
) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    model = tiny_model("mistral", **WIDE, **heads)  # LLaMA's would not be 6 heads
    tokens = torch.randint(2, 60, (32, 64))
    ones = torch.ones_like(tokens).tolist()
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": ones})
    modifier = FASPPruningModifier(
        sparsity=0.3,
        structures=structures,
        error_correction=correction,
        reconstruction_rate=0.001,  # a rate that is too high would cost a second try
        multiple_of=4,
        ignore=["re:.*lm_head"],
    )
    (found,) = forecasts(
        [modifier], model.config, 64, lambda: tiny_model("mistral", **WIDE, **heads)
    )
    expected = profile.predicted(model.config, found.shape, 32, found.procedure)
    measured = profile.counted(model, object(), data, modifier)
    for phase in ("recording", "replays and sums", "reconstruction"):
        assert expected[phase] == pytest.approx(measured[phase], rel=0.2), phase
    # torch's counter leaves factorisations and triangular solutions out
    assert measured["solver"] < expected["solver"] < 4 * measured["solver"]


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_the_operations_of_alternating_minimisation_are_those_that_a_run_counts(
    family: str,
) -> None:
    sizes = {**WIDE, "num_hidden_layers": 1}  # each step is counted one by one
    model = tiny_model(family, **sizes)
    tokens = torch.randint(2, 60, (32, 64))
    data = Dataset.from_dict({"input_ids": tokens.tolist()})
    modifier = FASPPruningModifier(
        sparsity=0.3,
        preset="paper",
        restorer="alternating",
        multiple_of=4,
        ignore=["re:.*lm_head"],
    )
    (found,) = forecasts(
        [modifier], model.config, 64, lambda: tiny_model(family, **sizes)
    )
    expected = profile.predicted(model.config, found.shape, 32, found.procedure)
    measured = profile.counted(model, object(), data, modifier)
    assert expected["solver"] == pytest.approx(measured["solver"], rel=0.2)


@pytest.mark.parametrize("family", FAMILIES | MULTIMODAL)
def test_shapes_come_from_a_configuration_alone(family: str) -> None:
    config = AutoConfig.from_pretrained(checkpoint(family))
    shape = shape_of(config, 16)
    assert shape.layers == LAYERS
    assert shape.parameters == tiny_model(family).num_parameters()
    assert [len(stage.rows) for stage in shape.stages] == [
        len(stage) for stage in (FAMILIES | MULTIMODAL)[family].stages
    ]
    assert [stage.wave for stage in shape.stages] == [0, 1, 2, 3]
    assert shape.attention > 0


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_given_their_share_of_the_tokens(family: str) -> None:
    shape = shape_of(AutoConfig.from_pretrained(checkpoint(family)), 16)
    assert shape.parameters == tiny_model(family).num_parameters()
    # two of four for each token; gate and up projections are a stage, down another
    experts = [stage for stage in shape.stages if stage.share < 1]
    assert [stage.share for stage in experts] == 8 * [0.5]
    assert sorted(len(stage.rows) for stage in experts) == 4 * [1] + 4 * [2]
    assert {stage.wave for stage in experts} == {2, 3}


def test_operators_outside_the_layers_have_no_part_in_their_shape() -> None:
    """OPT-350m's embeddings are narrower than its layers: the first is a projection."""
    projected = AutoConfig.from_pretrained(checkpoint("opt", word_embed_proj_dim=16))
    shape = shape_of(projected, 16)
    usual = shape_of(AutoConfig.from_pretrained(checkpoint("opt")), 16)
    assert (shape.layers, shape.hidden) == (usual.layers, usual.hidden)
    assert shape.stages == usual.stages


@pytest.mark.parametrize(
    "kind, stages",
    {
        "mpt": [1, 1, 1, 1],
        "bloom": [1, 1, 1, 1],
        "falcon_alibi": [2, 1, 1],  # attention and MLP side by side
        "gpt_neox": [1, 1, 1, 1],
        "biogpt": [3, 1, 1, 1],
        "openai_gpt": [1, 1, 1, 1],
        "mamba": [1, 1, 1],  # dt_proj is not called
        "encoder": [3, 1, 1, 1],
        "reward": [3, 1, 2, 1],
        "embedding": [3, 1, 2, 1],
        "t5": [3, 1, 1, 2, 1, 1, 1],  # a layer of the decoder
        "bart": [3, 1, 1, 2, 1, 1, 1],
        "vision": [3, 1, 2, 1],
    }.items(),
)
def test_layers_of_every_kind_are_watched(kind: str, stages: list[int]) -> None:
    model = KINDS[kind].model()
    shape = shape_of(model.config, 16)
    assert shape.estimate is None
    assert shape.layers == (4 if model.config.is_encoder_decoder else 2)
    assert shape.parameters == model.num_parameters()
    assert [len(stage.rows) for stage in shape.stages] == stages
    assert shape.attention > 0 or kind == "mamba"


def test_a_layer_that_depends_on_values_is_estimated_and_said_to_be(
    tmp_path: Path,
) -> None:
    """DBRX's experts are fused, and the toolkit does not know how to part them."""
    config = KINDS["dbrx"].model().config
    shape = shape_of(config, 16)
    assert shape.layers == 2 and shape.estimate is not None
    assert [stage.rows for stage in shape.stages[:2]] == [(64,), (32,)]
    assert shape.attention == 4 * 16**2 * 32
    config.save_pretrained(tmp_path)
    result = invoke("plan", tmp_path, "--seq-len", 16)
    assert result.exit_code == 0, result.output
    assert "Coarser than usual" in " ".join(result.output.split())


def test_long_sequences_are_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.from_pretrained(checkpoint("mistral"))
    exact = shape_of(config, 48)
    monkeypatch.setattr("fista_modifier.cost.shape.WATCHED", 16)
    assert shape_of(config, 48) == exact


def test_a_70b_model_fits_a_device_of_24_gb() -> None:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    shape = shape_of(config, 2048)
    assert math.isclose(shape.parameters / 1e9, 70.55, abs_tol=0.01)
    for procedure in PRESETS.values():
        assert 2 * 4 * 28672**2 < peak_device_memory(shape, procedure) < 24e9


def test_the_memory_of_a_reconstruction_is_what_torch_allocates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama", torch.bfloat16, **WIDE)
    length = 64
    tokens = torch.randint(2, 60, (4, length))
    ones = torch.ones_like(tokens).tolist()
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": ones})
    peaks: list[int] = []

    def profiled(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.profile(profile_memory=True) as seen:
            result = reconstruct(*args, **kwargs)
        changes = [
            (event.start_ns(), event.nbytes())
            for event in seen.profiler.kineto_results.events()
            if event.name() == "[memory]"
        ]
        peaks.append(max(accumulate(size for _, size in sorted(changes))))
        return result

    monkeypatch.setattr("fista_modifier.pruning.reconstruction.reconstruct", profiled)
    recipe = FISTAPruningModifier(mask_structure="2:4", ignore=["re:.*lm_head"])
    pipeline.prune(model, object(), data, recipe)
    shape = shape_of(model.config, length)
    assert max(peaks) == pytest.approx(reconstruction_memory(shape, 2), rel=0.2)


def test_plan_prints_time_and_memory(tmp_path: Path) -> None:
    AutoConfig.from_pretrained(checkpoint("llama")).save_pretrained(tmp_path)
    result = invoke("plan", tmp_path, "--device", "h100-80gb", "--devices", 2)
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    for expected in ("reconstruction", "on 2 such devices", "which fits"):
        assert expected in output


def test_what_cannot_be_planned_is_said(tmp_path: Path) -> None:
    result = invoke("plan", checkpoint("llama"), "--device", "tpu")
    assert result.exit_code == 1 and "device 'tpu' is none of" in result.output
    result = invoke("plan", tmp_path / "nothing")
    assert result.exit_code == 1 and "no model at" in result.output
