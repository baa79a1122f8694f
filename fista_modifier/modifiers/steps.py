"""What a step of a recipe has to know of the other steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from compressed_tensors.offload.cache import DistributedCPUCache, DistributedDiskCache
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import PreTrainedModel

from fista_modifier.distributed import current_ranks

__all__ = [
    "HOW_TO_RUN",
    "check_own_folder",
    "check_scaled_once",
    "modifiers_before",
    "settings_of",
]

HOW_TO_RUN = {
    "offload_hessians",
    "activations_dir",
    "resume_dir",
    "layers",
    "distribute",
}
"""The names of the fields on which the result does not depend."""


def modifiers_before(modifier: Modifier) -> list[Modifier]:
    """
    Return the modifiers that come before one in the recipe that is applied.

    :param modifier: a modifier of the recipe
    :return: those before it, in order
    """
    modifiers: Sequence[Modifier] = active_session().lifecycle.recipe.modifiers
    return list(takewhile(lambda one: one is not modifier, modifiers))


def check_own_folder(modifier: Modifier) -> None:
    """
    Refuse a folder for unfinished work that an earlier step of the recipe has, too.

    :param modifier: a modifier with a ``resume_dir``
    :raises ValueError: if an earlier one has the same
    """
    own = modifier.resume_dir
    for other in modifiers_before(modifier):
        its = getattr(other, "resume_dir", None)
        if own and its and Path(its).resolve() == Path(own).resolve():
            raise ValueError(
                f"resume_dir: '{own}' is that of {type(other).__name__}, too: name "
                "another folder for each step"
            )


def check_scaled_once(model: PreTrainedModel) -> None:
    """
    Refuse SmoothQuant on weights that ranks share, since each rank of llm-compressor
    0.14 would scale them once more.

    :param model: the model that the recipe is applied to
    :raises ValueError: if the recipe has such a step, and ranks share the weights
    """
    modifiers = active_session().lifecycle.recipe.modifiers
    smooth = [type(one) for one in modifiers if isinstance(one, SmoothQuantModifier)]
    if not smooth or current_ranks().size == 1:
        return
    shared = (DistributedCPUCache, DistributedDiskCache)
    if any(isinstance(module._parameters, shared) for module in model.modules()):
        raise ValueError(
            f"{smooth[0].__name__} scales weights once on each rank, and these ranks "
            "share the weights: run this recipe with one process"
        )


def settings_of(modifier: Modifier) -> dict[str, Any]:
    """
    Return the fields of a modifier on which its result depends. The toolkit's own
    modifiers keep their state in fields whose names end in an underscore.

    :param modifier: any modifier
    :return: the values of these fields, as JSON has them
    """
    fields = set(type(modifier).model_fields) - set(Modifier.model_fields) - HOW_TO_RUN
    settings = {name for name in fields if not name.endswith("_")}
    dumped: dict[str, Any] = modifier.model_dump(mode="json", include=settings)
    return dumped
