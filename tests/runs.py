"""Runs of the modifier through the toolkit's ``oneshot()`` on tiny models."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from families import VOCABULARY
from llmcompressor import oneshot
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier import FISTAPruningModifier

SAMPLES, LENGTH = 6, 12


def samples(count: int = SAMPLES, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Calibration tokens without padding, count×length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (count, length), generator=generator)


def calibration(tokens: Tensor | None = None) -> Dataset:
    tokens = samples() if tokens is None else tokens
    return Dataset.from_dict(
        {
            "input_ids": tokens.tolist(),
            "attention_mask": torch.ones_like(tokens).tolist(),
        }
    )


def run(model: PreTrainedModel, recipe: Any, **arguments: Any) -> PreTrainedModel:
    """``oneshot()`` over the same samples in the same order each time."""
    settings: dict[str, Any] = {
        "dataset": calibration(),
        # all samples are tokenised: any object will do
        "processor": object(),
        "shuffle_calibration_samples": False,
    }
    return oneshot(model=model, recipe=recipe, **(settings | arguments))


def prune(
    model: PreTrainedModel, *, oneshot_arguments: dict[str, Any] | None = None, **fields
) -> FISTAPruningModifier:
    """
    :param model: pruned in place
    :param oneshot_arguments: further arguments of ``oneshot()``
    :param fields: of the modifier; 2:4 by default
    :return: the modifier, with its results
    """
    modifier = FISTAPruningModifier(**({"mask_structure": "2:4"} | fields))
    run(model, modifier, **(oneshot_arguments or {}))
    return modifier


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}
