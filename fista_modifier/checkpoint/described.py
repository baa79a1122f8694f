"""The model that a checkpoint's config.json describes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from transformers import (
    AutoConfig,
    CompressedTensorsConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion

from fista_modifier.checkpoint.quantised_experts import (
    are_quantised,
    load_quantised_experts,
)
from fista_modifier.checkpoint.shards import as_value_error
from fista_modifier.models.classes import model_class, weightless_model
from fista_modifier.models.experts import linearize, linearize_weightless

__all__ = ["described_config", "is_quantised", "load_dense", "skeleton"]

DEPTH = re.compile(r"n_layers?|num_(\w+_)?layers|(en|de)coder_layers")
"""The names that configurations give to the number of layers."""


def described_config(folder: Path, tensors: int) -> PretrainedConfig:
    """
    Read the configuration of a checkpoint.

    :param folder: the checkpoint
    :param tensors: the number of its tensors
    :return: what config.json describes
    :raises ValueError: if it describes no model, with the reason
    """
    file = folder / "config.json"
    with as_value_error(f"{file} describes no model"):
        _check_depth(json.loads(file.read_text(encoding="utf-8")), tensors)
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )


def is_quantised(config: PretrainedConfig) -> bool:
    """
    Say whether a checkpoint is quantised.

    :param config: its configuration
    :return: whether some of its tensors have a scheme
    """
    quantization = getattr(config, "quantization_config", None) or {}
    return bool(quantization.get("config_groups"))


def skeleton(folder: Path, config: PretrainedConfig, tensors: int) -> PreTrainedModel:
    """
    Build the model of config.json, without memory for its weights.

    :param folder: the checkpoint
    :param config: its configuration, which loses its quantisation
    :param tensors: the number of its tensors
    :return: the model. The experts of a mixture are linear operators if transformers
        saves them under those names
    :raises ValueError: if it cannot be built, with the reason
    """
    with as_value_error(f"{folder / 'config.json'} describes no model"):
        config.__dict__.pop("quantization_config", None)
        model = weightless_model(config)
        if _stores_operators(model, tensors):
            linearize_weightless(model)
        return model


def load_dense(
    folder: Path, files: Mapping[str, Path], config: PretrainedConfig
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """
    Load a checkpoint in dense form with transformers, experts as linear operators.

    :param folder: the checkpoint
    :param files: the file of each tensor
    :param config: its configuration
    :return: the model, the names that only the model has, and those that only the files
        have
    :raises ValueError: if it cannot be loaded, with the reason
    """
    how: dict[str, Any] = {"config": config}
    if is_quantised(config):
        how = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    with as_value_error(f"{folder} cannot be loaded"):
        if is_quantised(config) and are_quantised(files):
            return load_quantised_experts(files.values(), config)
        model, loading = model_class(config).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **how,
        )
        linearize(model)
    return model, sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])


def _stores_operators(model: PreTrainedModel, tensors: int) -> bool:
    """Say whether transformers saves a mixture under the names of its operators."""
    fused = dict(get_non_linearized_moes(model))
    count = sum(len(experts.down_proj) for experts in fused.values())
    if not 0 < count <= tensors:  # a billion experts would take too long to build
        return False
    named = model.state_dict()
    stored = set(revert_weight_conversion(model, named))
    experts = tuple(f"{name}." for name in fused)
    linear = {f"{name}0.up_proj.weight" for name in experts}
    return linear | {name for name in named if not name.startswith(experts)} <= stored


def _check_depth(config: dict[str, Any], tensors: int) -> None:
    """
    Refuse a configuration with more layers than there are tensors. A model of a billion
    layers would take too long to build.

    :raises ValueError: if there are more layers than tensors, as each layer has some
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _check_depth(value, tensors)
        elif DEPTH.fullmatch(key) and isinstance(value, int) and value > tensors:
            raise ValueError(f"{key} is {value}, and there are {tensors} tensors")
