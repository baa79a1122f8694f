"""What a step of a recipe has to know of the other steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from llmcompressor.modifiers.transform.quip import QuIPModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from loguru import logger
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fista_modifier.distributed import current_ranks
from fista_modifier.modifiers.gptq import MaskedGPTQModifier

__all__ = [
    "HOW_TO_RUN",
    "applied_recipe",
    "check_changed_once",
    "check_own_folder",
    "check_quantisers",
    "check_zeros_stay",
    "modifiers_after",
    "modifiers_before",
    "modifiers_of_recipe",
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

ROTATING = (SpinQuantModifier, QuIPModifier)
"""The toolkit's modifiers that mix weights with one another."""
IN_PLACE = (SmoothQuantModifier, *ROTATING)
"""The toolkit's modifiers that multiply weights, whatever they were."""


def modifiers_of_recipe() -> Sequence[Modifier]:
    """Return the modifiers of the recipe that is applied, in order."""
    modifiers: Sequence[Modifier] = active_session().lifecycle.recipe.modifiers
    return modifiers


def modifiers_before(
    modifier: Modifier, modifiers: Sequence[Modifier]
) -> list[Modifier]:
    """
    Return the modifiers that come before one.

    :param modifier: a modifier of a recipe
    :param modifiers: all modifiers of the recipe, in order
    :return: those before it, in order
    """
    return list(takewhile(lambda one: one is not modifier, modifiers))


def modifiers_after(
    modifier: Modifier, modifiers: Sequence[Modifier]
) -> Sequence[Modifier]:
    """
    Return the modifiers that come after one.

    :param modifier: a modifier of a recipe
    :param modifiers: all modifiers of the recipe, in order
    :return: those after it, in order
    """
    return modifiers[len(modifiers_before(modifier, modifiers)) + 1 :]


def check_own_folder(modifier: Modifier, modifiers: Sequence[Modifier]) -> None:
    """
    Refuse a folder for unfinished work that an earlier step of the recipe has, too.

    :param modifier: a modifier with a ``resume_dir``
    :param modifiers: all modifiers of its recipe, in order
    :raises ValueError: if an earlier one has the same
    """
    own = modifier.resume_dir
    for other in modifiers_before(modifier, modifiers):
        its = getattr(other, "resume_dir", None)
        if own and its and Path(its).resolve() == Path(own).resolve():
            raise ValueError(
                f"resume_dir: '{own}' is that of {type(other).__name__}, too: name "
                "another folder for each step"
            )


def check_changed_once() -> None:
    """
    Refuse steps that change weights in place on each rank. The toolkit's pipelines let
    the ranks share the weights, so that each would change them once more
    (llm-compressor 0.14).

    :raises ValueError: if there are several ranks, and the recipe has such a step
    """
    if current_ranks().size == 1:
        return
    for one in modifiers_of_recipe():
        if isinstance(one, IN_PLACE):
            raise ValueError(
                f"{type(one).__name__} changes weights once on each rank, and the "
                "ranks share the weights: run this recipe with one process"
            )


def check_quantisers(model: PreTrainedModel, modifiers: Sequence[Modifier]) -> None:
    """
    Refuse a quantisation that would quantise nothing, and warn of operators that it
    leaves out. The toolkit would end such a run as any other.

    :param model: the model that is to be pruned, maybe on the meta device
    :param modifiers: all modifiers of the recipe
    :raises ValueError: if there is such a quantisation
    """
    own = [name for name, one in model.named_modules() if isinstance(one, Conv1D)]
    for one in modifiers:
        if not isinstance(one, QuantizationMixin):
            continue
        name = type(one).__name__
        targets = sorted(one.resolved_targets)
        kinds = "; its linear operators are of class Conv1D" if own else ""
        if not any(match_named_modules(model, targets, one.ignore)):
            raise ValueError(
                f"{name} would quantise nothing: targets {targets} minus ignore "
                f"{one.ignore} leave no module of {type(model).__name__}{kinds}. Leave "
                "it out, or name other targets"
            )
        if own:
            logger.warning(
                f"{name} quantises no operators of class Conv1D, which llm-compressor "
                f"does not know: {own[0]} and {len(own) - 1} others stay as they are"
            )


def check_zeros_stay(modifier: Modifier, modifiers: Sequence[Modifier]) -> None:
    """
    Refuse steps after a modifier that would give its zeros values again, while the
    report and config.json would still count them.

    :param modifier: a modifier that sets weights to zero
    :param modifiers: all modifiers of its recipe, in order
    :raises ValueError: if there is such a step
    """
    for one in modifiers_after(modifier, modifiers):
        name, own = type(one).__name__, type(modifier).__name__
        if isinstance(one, ROTATING):
            raise ValueError(
                f"{name} rotates weights, so that the zeros of {own} would get values "
                "again: put it before the pruning"
            )
        if isinstance(one, GPTQModifier) and not isinstance(one, MaskedGPTQModifier):
            raise ValueError(
                f"{name} gives the zeros of {own} values again: use "
                "MaskedGPTQModifier, which has the same fields and keeps them"
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


def applied_recipe() -> str:
    """
    Return the recipe that is applied as YAML, with a stage for each modifier. The
    toolkit's own form puts all into one stage, where a modifier hides another of its
    class, and groups change places. Fields on which the result does not depend, such as
    folders of this machine, are left out.

    :return: the recipe, from which ``oneshot()`` does the same again
    """
    stages = {
        f"step_{number}_stage": {
            f"{one.group or 'pruning'}_modifiers": {type(one).__name__: _given(one)}
        }
        for number, one in enumerate(modifiers_of_recipe(), 1)
    }
    dumped: str = yaml.safe_dump(
        stages, sort_keys=False, allow_unicode=True, default_flow_style=None, width=88
    )
    return dumped


def _given(modifier: Modifier) -> dict[str, Any]:
    settings = settings_of(modifier)
    return {name: value for name, value in settings.items() if value is not None}
