"""Tiny models of other kinds than those of families.py, as their own classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BartConfig,
    BertConfig,
    BioGptConfig,
    BloomConfig,
    DbrxConfig,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OpenAIGPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    SwitchTransformersConfig,
    T5Config,
    Zamba2Config,
)

from fista_modifier.models.classes import model_class

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MPT = {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
_BART = {
    f"{side}_{what}": value
    for side in ("encoder", "decoder")
    for what, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
}


@dataclass(frozen=True)
class Kind:
    """
    :param config: makes a configuration
    :param architecture: the class that a checkpoint of it names
    """

    config: Callable[[], PretrainedConfig]
    architecture: str

    def model(self) -> PreTrainedModel:
        """Random, always the same."""
        config = self.config()
        config.architectures = [self.architecture]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model_class(config)(config).eval()

    def save(self, folder: Path) -> PreTrainedModel:
        """:return: the model that is now in the folder"""
        model = self.model()
        model.save_pretrained(folder)
        return model


CAUSAL = {
    "mpt": Kind(lambda: MptConfig(**_MPT), "MptForCausalLM"),
    "bloom": Kind(
        lambda: BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        "BloomForCausalLM",
    ),
    "falcon_alibi": Kind(
        lambda: FalconConfig(**_SIZES, alibi=True, new_decoder_architecture=False),
        "FalconForCausalLM",
    ),
    "mamba": Kind(
        lambda: MambaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            time_step_rank=4,
        ),
        "MambaForCausalLM",
    ),
    "biogpt": Kind(lambda: BioGptConfig(**_SIZES), "BioGptForCausalLM"),
    "openai_gpt": Kind(lambda: OpenAIGPTConfig(**_GPT), "OpenAIGPTLMHeadModel"),
    "gpt_neox": Kind(lambda: GPTNeoXConfig(**_SIZES), "GPTNeoXForCausalLM"),
    "zamba2": Kind(
        lambda: Zamba2Config(
            **_SIZES
            | {"num_hidden_layers": 4, "num_key_value_heads": 4}
            | {"layers_block_type": ["hybrid", "mamba", "hybrid", "mamba"]},
            attention_head_dim=16,
            mamba_d_state=8,
            n_mamba_heads=4,
            mamba_ngroups=1,
            num_mem_blocks=1,
            chunk_size=16,
            use_mem_rope=True,
            adapter_rank=8,
        ),
        "Zamba2ForCausalLM",
    ),
    "dbrx": Kind(
        lambda: DbrxConfig(
            **_MPT,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        ),
        "DbrxForCausalLM",
    ),
}
OTHERS = {
    "reward": Kind(
        lambda: LlamaConfig(**_SIZES, num_labels=1), "LlamaForSequenceClassification"
    ),
    "embedding": Kind(lambda: LlamaConfig(**_SIZES), "LlamaModel"),
    "encoder": Kind(lambda: BertConfig(**_SIZES), "BertForMaskedLM"),
    "encoder_embedding": Kind(lambda: BertConfig(**_SIZES), "BertModel"),
    "t5": Kind(lambda: T5Config(**_T5, num_layers=2), "T5ForConditionalGeneration"),
    "switch": Kind(
        lambda: SwitchTransformersConfig(
            **_T5,
            num_layers=2,
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_experts=2,
        ),
        "SwitchTransformersForConditionalGeneration",
    ),
    "bart": Kind(
        lambda: BartConfig(
            vocab_size=64, d_model=32, max_position_embeddings=64, **_BART
        ),
        "BartForConditionalGeneration",
    ),
    "vision": Kind(
        lambda: Qwen2VLConfig(
            text_config=_SIZES
            | {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 2],
                }
            },
            vision_config={
                "embed_dim": 32,
                "hidden_size": 32,
                "depth": 1,
                "num_heads": 4,
                "mlp_ratio": 2,
            },
            image_token_id=60,
            video_token_id=61,
            vision_start_token_id=62,
            vision_end_token_id=63,
        ),
        "Qwen2VLForConditionalGeneration",
    ),
}
KINDS = CAUSAL | OTHERS
