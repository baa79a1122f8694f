"""The configuration of a model whose operators have become smaller."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain, combinations, product
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from fista_modifier.models.classes import weightless_model
from fista_modifier.models.experts import linearize_weightless

__all__ = [
    "ConfigChange",
    "apply_changes",
    "changes_for",
    "settings_in",
    "shapes_of",
]

ConfigChange = tuple[tuple[str, ...], Any]
"""The path to a value in a nested configuration, and the new value."""

Shapes = Mapping[str, torch.Size]


def shapes_of(model: PreTrainedModel) -> dict[str, torch.Size]:
    """
    Return the shapes of a model's parameters.

    :param model: any model
    :return: the shapes, by the parameters' names
    """
    # offloaded weights that are tied are not always one object
    with disable_onloading():
        named = model.named_parameters(remove_duplicate=False)
        return {name: value.shape for name, value in named}


def changes_for(
    model: PreTrainedModel, shapes: Shapes, sizes: Mapping[int, int]
) -> list[ConfigChange]:
    """
    Find the values of the model's configuration that make transformers build the
    smaller model. No names are needed: new sizes are tried in the place of old ones (or
    of values that are None, because some families derive them from others), until the
    parameters have the new shapes, and nothing else that the model computes with has
    changed, such as the scale of attention.

    :param model: the model as it is now
    :param shapes: the new shapes of parameters, by their names; the others keep theirs
    :param sizes: the new size for each old one: of channels, heads and their groups
    :return: the changes
    :raises ValueError: if no such configuration is found, so that no loader would take
        the smaller model
    """
    wanted = shapes_of(model) | dict(shapes)
    before = _built(model.config, ())
    reasons = []
    for changes in _candidates(model.config, sizes):
        after = _built(model.config, changes) if changes else before
        if after and shapes_of(after) == wanted and _computes_alike(before, after):
            reason = _refusal(model, changes, wanted)
            if reason is None:
                return list(changes)
            reasons.append(reason)
    reasons.append(
        "no setting leads to layers of these sizes and changes nothing else, as where "
        "a size follows from the width of the model"
    )
    raise ValueError(
        f"transformers has no configuration of {type(model).__name__} with the smaller "
        f"sizes {dict(sizes)}: {reasons[0]}"
    )


def apply_changes(config: PretrainedConfig, changes: Sequence[ConfigChange]) -> None:
    """
    Make changes in a configuration.

    :param config: changed in place
    :param changes: changes from :func:`changes_for`
    """
    for path, value in changes:
        owner: Any = config
        for name in path[:-1]:
            owner = getattr(owner, name)
        setattr(owner, path[-1], value)


def _candidates(
    config: PretrainedConfig, sizes: Mapping[int, int]
) -> Iterator[tuple[ConfigChange, ...]]:
    """
    Yield changes to try, likely ones first: few before many, of each size none (what is
    derived from other settings), one, two, three or all values of the old size. Then
    values that are missing.
    """
    places = [
        [(path, new) for path in _places(config, old)] for old, new in sizes.items()
    ]
    some = [
        chain(
            *(combinations(found, count) for count in sorted({*range(4), len(found)}))
        )
        for found in places
    ]
    for chosen in sorted(product(*some), key=lambda parts: sum(map(len, parts))):
        yield tuple(chain(*chosen))
    missing = list(_places(config, None))
    if len(sizes) == 1:
        (new,) = sizes.values()
        yield from (((path, new),) for path in missing)


def settings_in(
    config: PretrainedConfig, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """
    Yield the settings of a configuration and of those within it, without switches.

    :param config: a configuration
    :param prefix: the path to it
    :return: the path to each value, and the value
    """
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from settings_in(value, (*prefix, name))
        elif not name.startswith("_") and not isinstance(value, bool):
            yield (*prefix, name), value


def _places(config: PretrainedConfig, value: int | None) -> Iterator[tuple[str, ...]]:
    for path, found in settings_in(config):
        if found is value or (value is not None and found == value):
            yield path


def _built(
    config: PretrainedConfig, changes: Sequence[ConfigChange]
) -> PreTrainedModel | None:
    """Build the model of a changed configuration; None if there is no such model."""
    config = copy.deepcopy(config)
    try:
        apply_changes(config, changes)
        model = weightless_model(config)
        linearize_weightless(model)
    except (ValueError, TypeError, AttributeError, StrictDataclassError):
        return None
    return model


def _computes_alike(before: PreTrainedModel | None, after: PreTrainedModel) -> bool:
    """
    Say whether two models of other sizes compute alike. The size of a head can become
    smaller in place of the number of heads, for the same shapes of parameters: then the
    scale of attention and the positions' frequencies change. And a number of heads that
    no longer fits another one leaves groups of no heads.
    """
    if before is None:
        return True
    modules = dict(after.named_modules())
    for name, module in before.named_modules():
        now = vars(modules.get(name, module))
        for attribute, value in vars(module).items():
            other = now.get(attribute, value)
            if isinstance(value, float) and value != other:
                return False
            # in Gemma 2 no scale or buffer may tell
            if attribute == "head_dim" and value != other:
                return False
            if type(value) is type(other) is int and value > 0 >= other:
                return False
    buffers = {name: value.shape for name, value in after.named_buffers()}
    return all(
        buffers.get(name, value.shape) == value.shape
        for name, value in before.named_buffers()
    )


def _refusal(
    model: PreTrainedModel, changes: Sequence[ConfigChange], wanted: Shapes
) -> str | None:
    """
    Return the reason why transformers or an engine would not load a changed
    configuration, though a model is built from it in memory; None if they would.
    """
    config = copy.deepcopy(model.config)
    apply_changes(config, changes)
    try:
        type(config).from_dict(config.to_dict())
    except (ValueError, TypeError, StrictDataclassError) as error:
        return f"{error.__cause__ or error} Choose another sparsity"
    new = _undeclared(config, wanted)
    if new and (new := new - _undeclared(model.config, shapes_of(model))):
        return (
            f"they need {', '.join(sorted(new))}, which {type(config).__name__} does "
            "not declare, so that an engine may not read it"
        )
    return None


def _undeclared(config: PretrainedConfig, shapes: Shapes) -> set[str]:
    """
    Return the names of settings that the shapes of a model need, and that its
    configuration was given though its class has no such field. Engines may know only
    those that it has.
    """
    if not is_dataclass(config):  # a class of the model's own code
        return set()
    declared = {one.name for one in fields(config)}
    return {
        name
        for name in vars(config).keys() - declared
        if not name.startswith("_") and not _builds(_without(config, name), shapes)
    }


def _builds(config: PretrainedConfig, wanted: Shapes) -> bool:
    model = _built(config, ())
    return model is not None and shapes_of(model) == wanted


def _without(config: PretrainedConfig, name: str) -> PretrainedConfig:
    changed = copy.deepcopy(config)
    delattr(changed, name)
    return changed
