"""Every recipe that prunes and then quantises: the zeros of the loaded checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_model
from runs import calibration, run, samples
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from fista_modifier.solver import parse_pattern

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PRUNING = RECIPES / "fista-2of4.yaml"
QUANTISED = sorted(
    path for path in RECIPES.glob("*.yaml") if "quantization_stage" in path.read_text()
)
CHAINS = [path for path in QUANTISED if "structured_stage" not in path.read_text()]
# wide enough for the groups of 128 columns of 4-bit schemes
WIDE = {"hidden_size": 128, "intermediate_size": 256}
TOKENS = samples(16, 32, seed=1)


def zeros(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: model.get_submodule(name).weight == 0
        for name in FAMILIES["llama"].operators
    }


@pytest.fixture(scope="module")
def pruned() -> dict[str, Tensor]:
    """What pruning alone, with the same data, sets to zero."""
    model = run(tiny_model("llama", **WIDE), str(PRUNING), dataset=calibration(TOKENS))
    return zeros(model)


def test_there_are_chains():
    assert len(CHAINS) == 7
    assert len(QUANTISED) == 8


@pytest.mark.parametrize("recipe", CHAINS, ids=lambda path: path.stem)
def test_what_pruning_set_to_zero_is_zero_in_the_loaded_checkpoint(
    recipe, pruned, tiny_tokenizer, tmp_path, awq_on_cpu
):
    run(
        tiny_model("llama", **WIDE),
        str(recipe),
        dataset=calibration(TOKENS),
        output_dir=tmp_path,
        processor=tiny_tokenizer,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    pattern = parse_pattern("2:4", None)
    for name, found in zeros(loaded).items():
        assert int(pruned[name].sum()) == pruned[name].numel() // 2
        assert bool(found[pruned[name]].all()), name
        assert pattern.holds(loaded.get_submodule(name).weight), name
        # rounding may add zeros, to the smallest weights only
        assert found.float().mean() < 0.65, name
    with torch.no_grad():
        assert bool(loaded(TOKENS[:1]).logits.isfinite().all())


def test_a_smaller_model_gets_zeros_and_is_quantised(tiny_tokenizer, tmp_path):
    run(
        tiny_model("llama", **WIDE),
        str(RECIPES / "fasp-2of4-w8a8.yaml"),
        dataset=calibration(TOKENS),
        output_dir=tmp_path,
        processor=tiny_tokenizer,
    )
    stored = load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    assert loaded.config.intermediate_size == WIDE["intermediate_size"] - 64
    pattern = parse_pattern("2:4", None)
    for name, found in zeros(loaded).items():
        assert stored[f"{name}.weight"].dtype == torch.int8, name
        assert pattern.holds(loaded.get_submodule(name).weight), name
        assert 0.5 <= found.float().mean() < 0.65, name
    with torch.no_grad():
        assert bool(loaded(TOKENS[:1]).logits.isfinite().all())
