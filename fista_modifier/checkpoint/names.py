"""The names of a checkpoint's tensors, in its files and in the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import SimpleNamespace

from compressed_tensors.offload import disable_onloading
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

__all__ = ["disagreements", "names_in_memory", "names_on_disk", "unmatched"]


def unmatched(
    parameters: Mapping[str, Tensor], present: Collection[str]
) -> tuple[list[str], list[str]]:
    """
    Find the names that only a model or only a checkpoint has. A parameter that has
    several names may be stored under one of them.

    :param parameters: the model's parameters and buffers, the tied ones as one object
    :param present: the names in the model of the checkpoint's tensors
    :return: the names that only the model has, and those that only the checkpoint has
    """
    stored = {id(parameters[name]) for name in present if name in parameters}
    missing = [name for name, value in parameters.items() if id(value) not in stored]
    return missing, sorted(set(present) - parameters.keys())


def names_in_memory(
    model: PreTrainedModel, stored: Iterable[str]
) -> dict[str, str] | None:
    """
    Find the names that a checkpoint's tensors have in the model. Transformers keeps the
    names of old checkpoints on disk: GPT-NeoX's output embedding is ``embed_out`` there
    and ``lm_head`` in memory.

    :param model: the model, which may be without weights
    :param stored: names of tensors in a checkpoint of the model
    :return: the name in the model of each stored name; a tensor that is no part of the
        model keeps its name. None if some tensors are joined or split when they are
        loaded, so that no single tensor of the model is what is stored
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    with disable_onloading():
        known = model.state_dict()
    names = {}
    for name in stored:
        names[name] = name
        # First as transformers loads it. But experts that are linear operators already,
        # and names that are the model's own, must not be converted.
        for steps in ((renamings, converters), (renamings, []), ([], [])):
            renamed, converted = rename_source_key(
                name, *steps, model.base_model_prefix, known
            )
            if renamed in known:
                if converted is not None:
                    return None
                names[name] = renamed
                break
    return names


def names_on_disk(model: PreTrainedModel) -> set[str]:
    """
    Find the names that a model's tensors get in a checkpoint of today's transformers.

    :param model: the model as transformers builds it, which may be without weights
    :return: the names in the files; that of the output embedding is among them even
        where it is tied
    """
    return set(revert_weight_conversion(model, dict(model.state_dict())))


def disagreements(
    model: PreTrainedModel, missing: Collection[str], unknown: Collection[str]
) -> list[str]:
    """
    Describe the names that only the model or only its files have.

    :param model: the model, which may be without weights
    :param missing: names that the model has and the files have not
    :param unknown: names that the files have and the model has not
    :return: a sentence for each name, except for those that transformers leaves out
    """
    found = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unknown))
    model._adjust_missing_and_unexpected_keys(found)
    return [f"{name} is missing" for name in missing if name in found.missing_keys] + [
        f"{name} is no part of the model that config.json describes"
        for name in unknown
        if name in found.unexpected_keys
    ]
