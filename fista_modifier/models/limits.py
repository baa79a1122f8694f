"""The limits of a model: its vocabulary, its positions, and what it has to be given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from loguru import logger
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fista_modifier.data import max_sequence_length
from fista_modifier.models.classes import weightless_model
from fista_modifier.models.tracing import configs_of

__all__ = [
    "check_calibration",
    "check_length",
    "check_nothing_shared",
    "check_tokens",
    "check_vocabulary",
    "longest_sequence",
]

POSITIONS = {"wpe", "embed_positions", "position_embeddings", "positions_embed"}
"""The names that families give to their table with an entry for each position."""
DECODED = {"decoder_input_ids", "decoder_inputs_embeds", "labels"}
"""What a decoder's text can be given as."""
# Some tables have a few entries that no position uses, at their beginning.
SPARE_POSITIONS = 2


def check_calibration(model: PreTrainedModel, calibration: Dataset) -> None:
    """
    Refuse calibration data that a model cannot be run on.

    :param model: the model that is about to be calibrated
    :param calibration: data with ``input_ids``, of which nothing is cut off later
    :raises ValueError: if the model cannot be run on them
    """
    check_vocabulary(model, calibration)
    _check_decoder(model, calibration)
    longest = max((len(ids) for ids in _token_ids(calibration)), default=0)
    check_length(model, longest)


def _check_decoder(model: PreTrainedModel, calibration: Dataset) -> None:
    """
    Refuse text alone where a decoder has to be given a text of its own. Some
    encoder–decoders make it of the encoder's, so two tokens are tried.

    :raises ValueError: if there is none
    """
    if not model.config.is_encoder_decoder or DECODED & {*calibration.column_names}:
        return
    first = next(_token_ids(calibration), torch.zeros(0, dtype=torch.int64))
    try:
        with torch.no_grad():
            model(input_ids=first[None, :2].to(model.device))
    except Exception as error:  # transformers' code may raise anything
        raise ValueError(
            f"{type(model).__name__} cannot be calibrated on text alone, because its "
            "decoder has to be given a text of its own: call oneshot() with data that "
            "have 'labels' or 'decoder_input_ids', too"
        ) from error


def check_vocabulary(model: PreTrainedModel, data: object) -> None:
    """
    Refuse data with token ids that are not in a model's vocabulary.

    :param model: the model that is about to be calibrated
    :param data: what a loader loads; only a data set of ``datasets`` is looked at
    :raises ValueError: if a token id is not in the vocabulary
    """
    for ids in _token_ids(data):
        check_tokens(model, ids)


def _token_ids(data: object) -> Iterator[Tensor]:
    """Yield the token ids of each row of a data set. Other data have none."""
    if isinstance(data, Dataset) and "input_ids" in data.column_names:
        for row in data.select_columns("input_ids"):
            yield torch.as_tensor(row["input_ids"]).flatten()


def check_tokens(model: PreTrainedModel, ids: Tensor) -> None:
    """
    Refuse token ids that are not in a model's vocabulary.

    :param model: the model that is to read them
    :param ids: token ids
    :raises ValueError: if one of them is not in the vocabulary, nor stands for an image
        or the like
    """
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if size is None or not ids.numel():
        return
    outside = ids[(ids < 0) | (ids >= size)]
    if not len(outside):
        return
    stand_ins = _stand_ins(model.config.to_dict())
    for token in outside.tolist():
        if token not in stand_ins:
            raise ValueError(
                f"token id {token} is not in the vocabulary of {type(model).__name__}, "
                f"which goes from 0 to {size - 1}: take the tokenizer that belongs to "
                "the model, or resize the model's embeddings for it"
            )


def longest_sequence(config: PretrainedConfig) -> int:
    """
    Return the length of the calibration samples that suits a model.

    :param config: the model's configuration
    :return: what :func:`~fista_modifier.data.max_sequence_length` names, at most as
        many tokens as the model has positions
    """
    length = max_sequence_length(config)
    maximum = getattr(config.get_text_config(), "max_position_embeddings", None)
    if maximum is None or length <= maximum - SPARE_POSITIONS:
        return length
    return min(length, _positions(weightless_model(config), maximum) or length)


def check_nothing_shared(model: PreTrainedModel) -> None:
    """
    Refuse a model in which layers compute with the keys and values of earlier ones. A
    layer that is run by itself would find none, or those of another run.

    :param model: the model that is to be pruned, maybe on the meta device
    :raises ValueError: if its layers share keys and values
    """
    for config in configs_of(model):
        if shared := getattr(config, "num_kv_shared_layers", None):
            raise ValueError(
                f"{shared} layers of {type(model).__name__} take keys and values from "
                "earlier ones (num_kv_shared_layers in config.json): such a model "
                "cannot be pruned layer by layer"
            )


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """
    Refuse a sequence that is longer than a model's table of positions, and warn of one
    that is longer than the model was made for.

    :param model: the model that is to read the sequence, on any device
    :param tokens: number of tokens of the sequence
    :raises ValueError: if the model has an embedding for each position, and too few
    """
    config = model.config.get_text_config()
    maximum = getattr(config, "max_position_embeddings", None)
    if maximum is None or tokens <= maximum - SPARE_POSITIONS:
        return
    positions = _positions(model, maximum)
    if positions is not None and tokens > positions:
        raise ValueError(
            f"sequences of {tokens} tokens are too long for {type(model).__name__}, "
            f"which has {positions} positions: use --seq-len {positions} or less"
        )
    if tokens > maximum:
        logger.bind(log_once=True).warning(
            f"Sequences of {tokens} tokens are longer than the {maximum} that "
            f"{type(model).__name__} was made for"
        )


def _positions(model: PreTrainedModel, maximum: int) -> int | None:
    """
    Return the number of positions in the model's table; None if there is no table.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in POSITIONS and isinstance(
            module, torch.nn.Embedding
        ):
            if 0 <= module.num_embeddings - maximum <= SPARE_POSITIONS:
                # RoBERTa counts its spare positions among the maximum
                spare = 0 if module.padding_idx is None else module.padding_idx + 1
                return min(maximum, module.num_embeddings - spare)
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in POSITIONS and len(buffer) == maximum:
            return maximum
    return None


def _stand_ins(config: dict[str, Any]) -> set[int]:
    """
    Return the ids in a configuration that stand for images and the like. A model
    replaces them by what they stand for.
    """
    found = set()
    for name, value in config.items():
        if isinstance(value, dict):
            found |= _stand_ins(value)
        elif isinstance(value, int) and name.endswith(("_token_id", "_token_index")):
            found.add(value)
    return found
