"""What keeps a model from being trained in the run that prunes it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from math import prod

from accelerate.utils import get_max_memory
from compressed_tensors.offload import disable_onloading
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.dev import get_main_device
from transformers import PretrainedConfig, PreTrainedModel

from fista_modifier.cost import ROOM, training_memory
from fista_modifier.models.classes import check_predicts_text, weightless_model
from fista_modifier.models.experts import linearize_weightless
from fista_modifier.models.loading import weight_bytes
from fista_modifier.modifiers.base import LayerwiseModifier
from fista_modifier.recovery.training import check_enough

__all__ = [
    "check_recoverable",
    "check_trainable",
    "free_memory",
    "lack_of_memory",
]


def check_recoverable(
    config: PretrainedConfig,
    modifiers: Iterable[Modifier],
    *,
    processes: int,
    sequences: int,
    length: int,
    memory: float | None,
    dtype: str = "auto",
    on_disk: bool = False,
) -> None:
    """
    Refuse to train a model that is to be pruned, or to do so with little room.

    :param config: the model's configuration
    :param modifiers: what is to be done to the model
    :param processes: how many processes the run has
    :param sequences: how many calibration sequences there are
    :param length: their tokens
    :param memory: the device's free memory in bytes; None if that is not known
    :param dtype: dtype of the model's weights; "auto" is the model's own
    :param on_disk: whether weights may be on a disk
    :raises ValueError: if the model cannot be trained in this run, or the prediction of
        the memory leaves less than a fifth of what is free
    """
    check_trainable(config, processes, sequences, length)
    if on_disk:
        raise ValueError("weights may be on a disk (--offload)")
    if memory is None:
        return
    model = weightless_model(config)
    linearize_weightless(model)  # experts, which are fused so far
    pruners = [one for one in modifiers if isinstance(one, LayerwiseModifier)]
    if lack := lack_of_memory(model, pruners, ROOM * memory, dtype):
        raise ValueError(f"{lack} ({100 * ROOM:.0f} % of what is free)")


def check_trainable(
    config: PretrainedConfig, processes: int, sequences: int, length: int
) -> None:
    """
    Refuse to train a model, whatever memory there is.

    :param config: the model's configuration
    :param processes: how many processes the run has
    :param sequences: how many calibration sequences there are
    :param length: their tokens
    :raises ValueError: if the model cannot be trained in this run
    """
    if processes > 1:
        raise ValueError(
            "recovery needs a single process: prune with several, and run 'torchrun … "
            "-m fista_modifier.cli recover' afterwards"
        )
    check_predicts_text(config)
    check_enough(sequences, length)


def lack_of_memory(
    model: PreTrainedModel,
    pruners: Iterable[LayerwiseModifier],
    room: float,
    dtype: str = "auto",
) -> str:
    """
    Say that a training may not fit.

    :param model: the model, maybe on the meta device
    :param pruners: the modifiers that prune it
    :param room: the bytes that there are for it
    :param dtype: dtype of the model's weights; "auto" is the model's own
    :return: what is lacking; nothing if it seems to fit
    """
    found = chain.from_iterable(one.find_operators(model) for one in pruners)
    trained = {one.module: prod(one.shape) for one in found}
    with disable_onloading():  # a list of onloaded weights is the whole model
        parameters, size = model.num_parameters(), weight_bytes(model, dtype)
    width = size // parameters
    needed = training_memory(sum(trained.values()), parameters, width)
    if needed <= room:
        return ""
    return (
        f"recovery would take about {needed / 1e9:.1f} GB beside activations and "
        f"logits of a batch, and there are {room / 1e9:.1f} GB for it"
    )


def free_memory() -> float | None:
    """
    Return the free memory of the device that trains.

    :return: bytes; None of an accelerator that accelerate does not know
    """
    device = get_main_device()
    place = "cpu" if device.type == "cpu" else device.index or 0
    free: float | None = get_max_memory().get(place)
    return free
