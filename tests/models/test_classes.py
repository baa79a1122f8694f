"""A model is of the class that its configuration names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import invoke
from model_kinds import CAUSAL, KINDS, OTHERS
from transformers import CLIPConfig, LlamaConfig, PretrainedConfig

from fista_modifier import pipeline
from fista_modifier.models.classes import (
    check_predicts_text,
    model_class,
    weightless_model,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_loaded_as_the_class_that_it_was_saved_from(
    kind: str, tmp_path: Path
) -> None:
    saved = KINDS[kind].save(tmp_path)
    loaded = pipeline.load_model(str(tmp_path))
    assert type(loaded).__name__ == KINDS[kind].architecture
    values = loaded.state_dict()
    assert values.keys() == saved.state_dict().keys()
    for name, value in saved.state_dict().items():
        assert torch.equal(values[name], value), name
    skeleton = weightless_model(pipeline.load_config(str(tmp_path)))
    assert type(skeleton) is type(loaded)
    assert skeleton.num_parameters() == loaded.num_parameters()


@pytest.mark.parametrize("kind", ["mpt", "vision", "t5"])
def test_without_a_name_it_is_the_language_model_of_its_kind(kind: str) -> None:
    assert model_class(KINDS[kind].config()).__name__ == KINDS[kind].architecture


def test_without_a_language_model_it_is_the_plain_one() -> None:
    assert model_class(CLIPConfig()).__name__ == "CLIPModel"


@pytest.mark.parametrize(
    "name", ["LLaMAForCausalLM", "GPT2LMHeadModel", "LlamaConfig", "pipeline", "torch"]
)
def test_a_name_that_is_no_class_for_the_configuration_counts_for_nothing(
    name: str,
) -> None:
    config = LlamaConfig(architectures=[name])
    assert model_class(config).__name__ == "LlamaForCausalLM"


def test_an_architecture_that_cannot_be_built_is_named() -> None:
    with pytest.raises(ValueError, match="MysteryModel cannot be built"):
        model_class(PretrainedConfig(architectures=["MysteryModel"]))


def test_a_configuration_that_its_class_cannot_use_is_said() -> None:
    config = LlamaConfig(architectures=["LlamaForCausalLM"], hidden_act="none such")
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be built.*none such"):
        weightless_model(config)


def test_code_that_comes_with_a_checkpoint_is_not_run() -> None:
    """Nor is another model taken in its place: a reward model has no such head."""
    config = LlamaConfig(architectures=["OwnRewardModel"])
    config.auto_map = {"AutoModel": "modeling_own.OwnRewardModel"}
    with pytest.raises(ValueError, match="OwnRewardModel .*trust_remote_code"):
        model_class(config)
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    config.auto_map = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    assert model_class(config).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("kind", KINDS)
def test_only_language_models_have_a_perplexity(kind: str) -> None:
    config = KINDS[kind].model().config
    if kind in CAUSAL or kind == "vision":
        return check_predicts_text(config)
    with pytest.raises(ValueError, match=f"{KINDS[kind].architecture} has no perplex"):
        check_predicts_text(config)


@pytest.mark.parametrize("command", ["eval", "compare"])
def test_the_perplexity_of_an_encoder_is_refused_before_any_work(
    command: str, tmp_path: Path
) -> None:
    OTHERS["encoder"].save(tmp_path / "model")
    (tmp_path / "text.txt").write_text("text")
    arguments = [command, tmp_path / "model", "--text", tmp_path / "text.txt"]
    if command == "compare":
        arguments += ["--pattern", "2:4"]
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert "BertForMaskedLM has no perplexity" in " ".join(result.output.split())
