"""Tiny random models of the supported families, saved and loaded as users load them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 64
LAYERS = 2
SLIDING_WINDOW = 4

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    # attention of the usual 0.02 is all but uniform in so small a model
    "initializer_range": 0.15,
}
_LLAMA_LIKE: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """
    :param config: configuration class
    :param settings: arguments of a tiny configuration
    :param layers: name of the list of decoder layers
    :param stages: what shares an input in a layer, in the order of execution
    """

    config: type[PretrainedConfig]
    settings: dict[str, Any]
    layers: str = "model.layers"
    stages: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )

    @property
    def operators(self) -> set[str]:
        """Names of all operators that are pruned by default."""
        return {
            f"{self.layers}.{layer}.{operator}"
            for layer in range(LAYERS)
            for stage in self.stages
            for operator in stage
        }


FAMILIES = {
    "llama": Family(LlamaConfig, _LLAMA_LIKE),
    "mistral": Family(MistralConfig, _LLAMA_LIKE | {"sliding_window": SLIDING_WINDOW}),
    "qwen2": Family(Qwen2Config, _LLAMA_LIKE),
    "qwen3": Family(Qwen3Config, _LLAMA_LIKE | {"head_dim": 8}),
    "gemma3": Family(
        Gemma3TextConfig,
        _LLAMA_LIKE
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": Family(
        Gemma2Config,
        _LLAMA_LIKE
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 1.0,
            "sliding_window": SLIDING_WINDOW,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": Family(
        Phi3Config,
        _LLAMA_LIKE | {"sliding_window": SLIDING_WINDOW},
        stages=(
            ("self_attn.qkv_proj",),
            ("self_attn.o_proj",),
            ("mlp.gate_up_proj",),
            ("mlp.down_proj",),
        ),
    ),
    "opt": Family(
        OPTConfig,
        _COMMON
        | {
            "init_std": 0.15,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
        },
        layers="model.decoder.layers",
        stages=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ),
    ),
    "gpt2": Family(
        GPT2Config,
        _COMMON | {"n_embd": 32, "n_inner": 48, "n_layer": LAYERS, "n_head": 4},
        layers="transformer.h",
        stages=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    ),
}

_EXPERTS = {"num_experts_per_tok": 2, "norm_topk_prob": True}
MIXTURES = {
    "mixtral": Family(MixtralConfig, _LLAMA_LIKE | _EXPERTS | {"num_local_experts": 4}),
    "qwen3_moe": Family(
        Qwen3MoeConfig,
        _LLAMA_LIKE
        | _EXPERTS
        | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "qwen2_moe": Family(
        Qwen2MoeConfig,
        _LLAMA_LIKE
        | _EXPERTS
        | {
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
}
"""
The mixtures of experts. Their experts are linear operators only once the model is
linearised, as in ``oneshot()``.
"""

MULTIMODAL = {
    "gemma3_vision": Family(
        Gemma3Config,
        {
            "text_config": FAMILIES["gemma3"].settings,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 60,
            "boi_token_index": 61,
            "eoi_token_index": 62,
        },
        layers="model.language_model.layers",
    )
}
"""
The models that have more in them than a language model. Their tensors have other names
in a checkpoint than in memory.
"""

_checkpoints = tempfile.TemporaryDirectory(prefix="tiny-models-")


@cache
def checkpoint(family: str, **changes: Any) -> Path:
    """
    :param family: a key of ``FAMILIES``, ``MIXTURES`` or ``MULTIMODAL``
    :param changes: settings of the configuration that differ from the family's
    :return: folder of a float32 checkpoint with non-trivial biases and norms
    """
    chosen = (FAMILIES | MIXTURES | MULTIMODAL)[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = chosen.config(**(chosen.settings | changes))
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    path = Path(tempfile.mkdtemp(prefix=f"{family}-", dir=_checkpoints.name))
    model.save_pretrained(path)
    return path


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """
    :param family: a key of ``FAMILIES``, ``MIXTURES`` or ``MULTIMODAL``
    :param dtype: in which to load it
    :param changes: settings of the configuration that differ from the family's
    :return: the same model at each call, loaded anew
    """
    path = checkpoint(family, **changes)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
