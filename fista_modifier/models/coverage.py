"""The share of a model's weights that its operators hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from compressed_tensors.offload import disable_onloading
from loguru import logger
from transformers.pytorch_utils import Conv1D

from fista_modifier.models.layers import DecoderLayer

__all__ = ["share_of_weights", "warn_of_other_weights"]

NOTABLE = 0.02
"""
The share of the decoder layers' weights above which matrices outside all linear
operators bring a warning.
"""
SHOWN = 4
"""The most parameters that a warning names."""


def share_of_weights(layers: Iterable[DecoderLayer], pruned: Sequence[str]) -> float:
    """
    Return the share of the decoder layers' weights that was pruned.

    :param layers: layers of a model
    :param pruned: names of the operators that were pruned
    :return: the weights of pruned operators in decoder layers, as a share of all
        matrices there
    """
    sizes = {
        name: size
        for layer in layers
        if layer.in_sequence
        for name, size in _matrices(layer).items()
    }
    inside = sum(sizes.get(f"{name}.weight", 0) for name in pruned)
    return inside / max(sum(sizes.values()), 1)


def warn_of_other_weights(layers: Sequence[DecoderLayer]) -> None:
    """
    Warn of matrices that belong to no linear operator, if they are more than a small
    share. They cannot be targets. Experts that are stacked in one parameter are such
    matrices.

    :param layers: layers of a model; layers without operators do not count
    """
    others: Counter[str] = Counter()
    total = 0
    for layer in layers:
        if not (layer.in_sequence and layer.operators):
            continue
        linear = {
            f"{layer.name}.{name}.weight"
            for name, module in layer.module.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D)
        }
        for name, size in _matrices(layer).items():
            total += size
            if name not in linear:
                others[re.sub(r"\.\d+\.", ".*.", name)] += size
    if others.total() > NOTABLE * total:
        names = ", ".join(name for name, _ in others.most_common(SHOWN))
        logger.warning(
            f"{100 * others.total() / total:.0f} % of the decoder layers' weights "
            f"belong to no linear operator and stay dense: {names}"
            + (" and others" if len(others) > SHOWN else "")
        )


def _matrices(layer: DecoderLayer) -> dict[str, int]:
    """
    Return the number of entries of each parameter of more than one dimension, by the
    parameter's name.
    """
    with disable_onloading():
        return {
            f"{layer.name}.{name}": parameter.numel()
            for name, parameter in layer.module.named_parameters()
            if parameter.ndim > 1
        }
