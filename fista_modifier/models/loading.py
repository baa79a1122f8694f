"""Configurations, models and tokenizers, from a folder or the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory
from compressed_tensors.offload import load_offloaded_model
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fista_modifier.distributed import current_ranks
from fista_modifier.models.classes import model_class, weightless_model

__all__ = [
    "check_not_packed",
    "load_config",
    "load_model",
    "load_to_prune",
    "load_tokenizer",
    "weight_bytes",
]

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps memory that processes share."""


def load_config(model: str) -> PretrainedConfig:
    """
    Load the configuration of a model.

    :param model: folder of a checkpoint, or its id on the hub
    :return: its configuration
    :raises FileNotFoundError: if there is no such model
    """
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"no model at '{model}': it is neither a folder with a config.json nor a "
            f"model that the hub serves from here ({str(error).splitlines()[0]})"
        ) from error


def check_not_packed(model: str, config: PretrainedConfig) -> None:
    """
    Refuse a checkpoint of which transformers cannot read the weights.

    :param model: folder of the checkpoint, or its id on the hub
    :param config: its configuration
    :raises ValueError: if it has the configuration of an engine of 2025
    """
    stored: Any = getattr(config, "quantization_config", None)
    sparsity = stored.get("sparsity_config") if isinstance(stored, dict) else None
    if sparsity and not stored.get("config_groups"):
        remedy = f"'fista-prune unpack {model} -o DENSE' gives the dense form"
        if sparsity.get("format") == "dense":
            remedy = "prune with --format dense"
        raise ValueError(
            f"{model} is stored for engines of 2025 ({sparsity.get('format')}), and "
            f"transformers cannot load it: {remedy}"
        )


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a model.

    :param model: folder of a checkpoint, or its id on the hub
    :return: its tokenizer
    :raises FileNotFoundError: if there is no such model
    :raises ValueError: if it has no tokenizer, or a damaged one
    """
    load_config(model)
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # errors are of many kinds, and few name a file
        raise ValueError(
            f"the tokenizer of '{model}' could not be loaded: "
            f"{str(error) or type(error).__name__}"
        ) from error


def load_model(
    model: str, dtype: str | torch.dtype = "auto", *, to_accelerator: bool = False
) -> PreTrainedModel:
    """
    Load a model into this process.

    :param model: folder of a checkpoint, or its id on the hub
    :param dtype: dtype of the weights; "auto" is that of the checkpoint
    :param to_accelerator: whether to spread the model over the accelerators, if there
        are any
    :return: the model, of the class that its config.json names
    :raises FileNotFoundError: if there is no such model
    :raises ValueError: if transformers has no class for it, or cannot read its weights
    """
    config = load_config(model)
    check_not_packed(model, config)
    spread = to_accelerator and torch.accelerator.is_available()
    return model_class(config).from_pretrained(
        model, dtype=dtype, device_map="auto" if spread else None, **_attention(config)
    )


def load_to_prune(
    model: str, dtype: str | torch.dtype = "auto", offload_folder: Path | None = None
) -> PreTrainedModel:
    """
    Load a model that is to be pruned. It stays in main memory, because the toolkit
    onloads layer by layer. If there are several ranks, the first one loads it, and all
    share its memory.

    :param model: folder of a checkpoint, or its id on the hub
    :param dtype: dtype of the weights; "auto" is that of the checkpoint
    :param offload_folder: an empty folder on a disk, for the weights that half of the
        free main memory has no room for. The model needs it as long as it is in use
    :return: the model, of the class that its config.json names
    :raises FileNotFoundError: if there is no such model
    :raises ValueError: if transformers has no class for it, or the ranks have too
        little shared memory
    """
    if current_ranks().size == 1 and offload_folder is None:
        return load_model(model, dtype)
    config = load_config(model)
    cls = model_class(config)
    place: dict[str, Any]
    if offload_folder is None:
        _check_shared_memory(config, dtype)
        place = {"device_map": {"": "cpu"}, "max_memory": {}}
    else:
        place = {
            "device_map": "auto_offload",
            "max_memory": {"cpu": get_max_memory()["cpu"] // 2},  # for activations, too
            "offload_folder": offload_folder,
        }
    with load_offloaded_model(cls):
        return cls.from_pretrained(model, dtype=dtype, **place, **_attention(config))


def weight_bytes(model: PreTrainedModel, dtype: str | torch.dtype) -> int:
    """
    Return the size of a model's weights.

    :param model: the model, maybe on the meta device
    :param dtype: dtype that they are loaded in; "auto" is the model's own
    :return: bytes
    """
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return sum(
        one.numel() * (named or one.dtype).itemsize  # "auto" names none
        for one in model.parameters()
    )


def _check_shared_memory(config: PretrainedConfig, dtype: str | torch.dtype) -> None:
    """
    Refuse a model that does not fit into the memory that processes share. Containers
    often have little of it, and a process that needs more is killed without a word.

    :raises ValueError: if the model does not fit
    """
    if not SHARED_MEMORY.exists():
        return
    size = weight_bytes(weightless_model(config), dtype)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < size:
        raise ValueError(
            f"the processes share the model in {SHARED_MEMORY}, which has "
            f"{free / 1e9:.1f} GB free, and its weights take {size / 1e9:.1f} GB: give "
            "the container more (docker run --shm-size), or start a single process"
        )


def _attention(config: PretrainedConfig) -> dict[str, str]:
    """
    Return the attention to load a model with. Torch's fused kernels, which transformers
    takes by default, leave out soft caps of the scores.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {} if capped is None else {"attn_implementation": "eager"}
