"""The decoder layers of a model and the operators to prune in each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from compressed_tensors.utils import match_named_modules
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fista_modifier.models.operators import Operator

__all__ = [
    "DecoderLayer",
    "MaskName",
    "check_one_tower",
    "chosen_layers",
    "group_by_layer",
    "layer_targets",
    "mask_name",
]

MaskName = Literal["attention_mask", "decoder_attention_mask"]


@dataclass(eq=False)
class DecoderLayer:
    """
    A unit of pruning: a decoder layer, or a lone operator outside all of them, which is
    a layer of its own.

    :param name: the module's name
    :param module: the module that the pipeline runs
    :param in_sequence: whether it passes hidden states on to the next decoder layer
    :param operators: the operators to prune in it
    :param mask_name: name of the batch's mask that says what is padding in its input;
        None if no mask does
    """

    name: str
    module: torch.nn.Module
    in_sequence: bool = True
    operators: list[Operator] = field(default_factory=list)
    mask_name: MaskName | None = None


def layer_targets(
    model: PreTrainedModel,
    operators: Sequence[Operator],
    given: str | list[str] | None = None,
) -> list[str]:
    """
    Return the toolkit's sequential targets, which are the decoder layers. Where a
    family does not name its decoder layers, they are the blocks of those lists of
    modules that are in no other list and hold operators.

    :param model: the model
    :param operators: the operators to prune
    :param given: the targets that the user gave to ``oneshot()``, if any
    :return: class or module names
    :raises ValueError: if the given targets match nothing, or no layers are found
    """
    if given is not None:
        targets = [given] if isinstance(given, str) else list(given)
        if not dict(match_named_modules(model, targets)):
            raise ValueError(
                f"sequential_targets {targets} match no module of "
                f"{type(model).__name__}: leave them out, or name the class of the "
                "decoder layers"
            )
        return targets
    named = []
    if getattr(model, "_no_split_modules", None):
        named = list(infer_sequential_targets(model))
        if _share_inside(model, operators, named) >= 0.5:
            return named
    found = _classes_of_blocks(model)
    if found and _share_inside(model, operators, found) > 0:
        return found
    if named and dict(match_named_modules(model, named)):
        return named
    raise ValueError(
        f"no decoder layers are found in {type(model).__name__}, without which errors "
        "cannot be corrected: name their class, oneshot(sequential_targets=['…'])"
    )


def _share_inside(
    model: PreTrainedModel, operators: Sequence[Operator], targets: list[str]
) -> float:
    """
    Return the share of the operators that lie within modules that the targets match.
    """
    prefixes = tuple(f"{name}." for name, _ in match_named_modules(model, targets))
    inside = sum(operator.name.startswith(prefixes) for operator in operators)
    return inside / len(operators)


def _classes_of_blocks(model: PreTrainedModel) -> list[str]:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
    }
    outermost = [
        module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    ]
    classes = {
        type(block).__name__
        for blocks in outermost
        for block in blocks
        if _has_operators(block)
    }
    return sorted(classes - {"Linear", "Conv1D"})


def _has_operators(module: torch.nn.Module) -> bool:
    """Say whether a module has linear operators in it, or is one."""
    return any(isinstance(one, torch.nn.Linear | Conv1D) for one in module.modules())


def group_by_layer(
    model: PreTrainedModel, operators: list[Operator], layer_types: list[str]
) -> list[DecoderLayer]:
    """
    Assign operators to their decoder layers.

    :param model: the model
    :param operators: the operators to prune
    :param layer_types: the toolkit's sequential targets: class or module names of the
        decoder layers
    :return: all decoder layers, with or without operators, and then lone operators
    :raises ValueError: if a sequential target is a linear operator itself, so that
        there is no layer to correct errors in
    """
    modules = dict(match_named_modules(model, layer_types))
    for name, module in modules.items():
        if any(operator.module is module for operator in operators):
            raise ValueError(
                f"sequential target '{name}' is a linear operator itself; "
                "FISTAPruningModifier needs whole decoder layers: leave "
                "sequential_targets out, or name the decoder layer's class"
            )
    layers = {
        name: DecoderLayer(name, module, mask_name=mask_name(model, module))
        for name, module in modules.items()
        # encoders name the class of their embeddings, too
        if _has_operators(module)
    }
    lone = []
    for operator in operators:
        for name, layer in layers.items():
            if operator.name.startswith(name + "."):
                layer.operators.append(operator)
                break
        else:
            mask = mask_name(model, operator.module)
            lone.append(
                DecoderLayer(operator.name, operator.module, False, [operator], mask)
            )
    return [*layers.values(), *lone]


def chosen_layers(layers: Sequence[DecoderLayer], chosen: str) -> list[DecoderLayer]:
    """
    Return the decoder layers that a user chose by their numbers.

    :param layers: layers of a model
    :param chosen: numbers and ranges of decoder layers, from 0, such as "0-9" or
        "0-3,30"
    :return: the chosen layers; lone operators are never chosen
    :raises ValueError: if the text is something else, or the model has no such layer
    """
    in_sequence = [layer for layer in layers if layer.in_sequence]
    numbers: set[int] = set()
    for part in chosen.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ValueError(
                f"layers: '{part}' is neither a number nor a range; give them as in "
                "'0-9' or '0-3,30'"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < len(in_sequence):
            raise ValueError(
                f"layers: there is no '{part.strip()}': the model's "
                f"{len(in_sequence)} decoder layers are 0-{len(in_sequence) - 1}"
            )
        numbers.update(range(first, last + 1))
    return [in_sequence[number] for number in sorted(numbers)]


def check_one_tower(model: PreTrainedModel, layers: Iterable[DecoderLayer]) -> None:
    """
    Refuse layers that do not follow one another, such as those of an encoder and a
    decoder.

    :param model: the model
    :param layers: layers of the model, those to prune with operators
    :raises ValueError: if they belong to several models within the model
    """
    towers = [one for one in model.modules() if isinstance(one, PreTrainedModel)]
    owner = {  # the innermost, as outer ones come first
        module: tower
        for tower in towers
        for module in tower.modules()
        if module is not tower
    }
    first: dict[torch.nn.Module, str] = {}
    for layer in layers:
        if layer.in_sequence and layer.operators:
            first.setdefault(owner[layer.module], layer.name)
    if len(first) > 1:
        one, other, *_ = first.values()
        raise ValueError(
            "error_correction: full, which is also that of preset: best, follows the "
            f"pruned model from layer to layer, and {one} and {other} are of different "
            "parts of the model: put one part on the ignore list, or use "
            "error_correction: intra"
        )


def mask_name(model: PreTrainedModel, layer: torch.nn.Module) -> MaskName | None:
    """
    Return the name of the batch's mask that says what is padding in a layer's input.

    :param model: the model
    :param layer: a layer of the model
    :return: the name; None where the input is no text, as in a vision tower
    """
    if getattr(model.config, "is_encoder_decoder", False):
        if layer in set(model.get_decoder().modules()):
            return "decoder_attention_mask"
    around = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and layer in set(module.modules())
    ]
    return "attention_mask" if _embeds_tokens(around[-1]) else None


def _embeds_tokens(model: PreTrainedModel) -> bool:
    try:
        return isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    except (NotImplementedError, AttributeError):
        return False
