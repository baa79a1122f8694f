"""Quantised mixtures on disk. Transformers cannot load them, as it fuses experts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import apply_quantization_config
from safetensors.torch import load_file
from transformers import CompressedTensorsConfig, PretrainedConfig, PreTrainedModel

from fista_modifier.checkpoint.names import names_in_memory, unmatched
from fista_modifier.models.classes import weightless_model
from fista_modifier.models.experts import linearize_weightless

__all__ = ["are_quantised", "load_quantised_experts"]

SCALE = re.compile(r"experts\.\d+\.\w+\.weight_scale$")


def are_quantised(tensors: Iterable[str]) -> bool:
    """
    Say whether a checkpoint holds quantised experts, each by itself.

    :param tensors: the names of its tensors
    :return: whether there is the scale of one
    """
    return any(map(SCALE.search, tensors))


def load_quantised_experts(
    files: Iterable[Path], config: PretrainedConfig
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """
    Load a quantised mixture in dense form, its experts as linear operators. Buffers
    that are in no file have no values.

    :param files: the checkpoint's files
    :param config: its config.json
    :return: the model, the names that only the model has, and those that only the files
        have
    :raises ValueError: if the tensors do not fit the model, or the compression is not
        one of compressed-tensors
    """
    bare = deepcopy(config)
    quantization = bare.__dict__.pop("quantization_config")
    model = weightless_model(bare)
    linearize_weightless(model)
    model.to_empty(device="cpu")
    compressor = ModelCompressor.from_compression_config(
        CompressedTensorsConfig(**quantization)
    )
    apply_quantization_config(model, compressor.quantization_config)
    compressor.compress_model(model)  # gives operators the tensors of the files
    loaded: set[str] = set()
    for file in sorted(set(files)):
        tensors = load_file(file)
        names = names_in_memory(model, tensors) or {}
        named = {names.get(name, name): tensor for name, tensor in tensors.items()}
        try:
            model.load_state_dict(named, strict=False, assign=True)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        loaded |= named.keys()
    model.tie_weights()
    described = model.state_dict(keep_vars=True)
    missing, unknown = unmatched(described, loaded)
    compressor.decompress_model(model)
    return model, missing, unknown
