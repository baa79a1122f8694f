"""The class of a model, from its configuration."""

from __future__ import annotations

from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

__all__ = ["check_predicts_text", "model_class", "weightless_model"]

FALLBACKS = (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModel,
)
"""
The auto classes in which a configuration is looked up, in this order, if it names no
class of transformers that fits.
"""


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """
    Return the class that a checkpoint was saved from, whatever it is for: a language
    model with or without images, a reward model, an encoder. Code that comes with a
    checkpoint is not run.

    :param config: the checkpoint's ``config.json``; without ``architectures``, the
        language model of its kind is taken
    :return: the class
    :raises ValueError: if transformers has no class that fits; the message names the
        architecture
    """
    named = [name for name in config.architectures or () if isinstance(name, str)]
    candidates = [getattr(transformers, name, None) for name in named]
    # transformers gives some configurations a class that was made for another
    mapped = [auto._model_mapping.get(type(config), None) for auto in FALLBACKS]
    auto_map = getattr(config, "auto_map", None) or {}
    own_code = {str(value).rpartition(".")[2] for value in auto_map.values()}
    if not own_code.intersection(named):
        candidates += mapped
    for candidate in candidates:
        # AutoModel has several classes for some configurations
        for one in candidate if isinstance(candidate, tuple) else (candidate,):
            if _fits(one, config) or (one is not None and one in mapped):
                return cast(type[PreTrainedModel], one)
    architecture = " or ".join(named) or type(config).__name__
    why = "transformers has no such class for this configuration"
    if own_code.intersection(named):
        why = "it needs code that comes with the checkpoint (trust_remote_code)"
    raise ValueError(
        f"{architecture} cannot be built: {why}. Models of transformers itself can be "
        "pruned here; a model with code of its own can be loaded by that code and "
        "given to oneshot()"
    )


def _fits(candidate: Any, config: PretrainedConfig) -> bool:
    if not (isinstance(candidate, type) and issubclass(candidate, PreTrainedModel)):
        return False
    described: Any = getattr(candidate, "config_class", None)
    return described is not None and isinstance(config, described)


def weightless_model(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """
    Build a model on the meta device, without memory for its weights.

    :param config: the model's configuration
    :param options: options of the model's class, such as ``attn_implementation``
    :return: the model
    :raises ValueError: if transformers has no class for it, or its class cannot be
        built from the configuration, such as where a library is not installed
    """
    cls = model_class(config)
    try:
        with torch.device("meta"):
            return cls._from_config(config, **options)
    except Exception as error:  # transformers' code may raise anything
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{cls.__name__} cannot be built: {why}") from error


def check_predicts_text(config: PretrainedConfig) -> None:
    """
    Refuse a model that has no perplexity.

    :param config: configuration of a model whose perplexity is about to be measured
    :raises ValueError: if the model does not predict each token of a text from those
        before it; the message names its class
    """
    cls = model_class(config)
    if cls.can_generate() and not config.is_encoder_decoder:
        return
    raise ValueError(
        f"{cls.__name__} has no perplexity: it is no language model that predicts each "
        "token of a text from those before it"
    )
