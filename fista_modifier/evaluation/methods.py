"""The pruning methods that can be compared, by their names."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Protocol

from datasets import Dataset
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fista_modifier import pipeline
from fista_modifier.models.experts import linearize
from fista_modifier.models.operators import operators_in
from fista_modifier.models.targets import (
    IGNORE,
    TARGETS,
    check_prunable,
    find_operators,
)
from fista_modifier.modifiers.fista import FISTAPruningModifier
from fista_modifier.pruning.presets import PRESETS, Preset
from fista_modifier.solver import SparsityPattern
from fista_modifier.solver.patterns import project

__all__ = [
    "FISTA_METHODS",
    "METHODS",
    "Pruner",
    "pruner",
    "recipe",
    "warm_starts",
]

FISTA_METHODS: dict[str, Preset] = {
    "fista-paper": "paper",
    "fista-fast": "fast",
    "fista": "default",
    "fista-best": "best",
}
METHODS = ("dense", "magnitude", "wanda", "sparsegpt", *FISTA_METHODS)
"""The names of all methods that can be compared. The method "dense" prunes nothing."""


class Pruner(Protocol):
    """A method with its settings."""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        calibration: Dataset,
    ) -> pipeline.PruningRun: ...


def warm_starts() -> str:
    """Return a sentence on where each preset of FISTAPruner starts."""
    starts = [
        f"{PRESETS[preset].options.start} ({method})"
        for method, preset in FISTA_METHODS.items()
    ]
    return f"Warm starts: {', '.join(starts)}."


def pruner(method: str, pattern: SparsityPattern) -> Pruner:
    """
    Return a pruning method. Every method prunes the same operators and has its own
    defaults otherwise. SparseGPT and Wanda are the toolkit's.

    :param method: one of ``METHODS`` but "dense"
    :param pattern: the pattern to prune to
    :return: the method, which can be pickled
    :raises ValueError: for an unknown method
    """
    if method == "magnitude":
        return partial(prune_by_magnitude, pattern=pattern)
    if method not in METHODS or method == "dense":
        raise ValueError(f"method '{method}' is none of {', '.join(METHODS)}")
    if method in FISTA_METHODS:
        return partial(pipeline.prune, recipe=recipe(method, pattern))
    return partial(prune_by_peer, method=method, pattern=pattern)


def recipe(method: str, pattern: SparsityPattern, **changes: Any) -> Modifier:
    """
    Return the modifier of a method. It has its own defaults except for its pattern,
    targets, exceptions and changes.

    :param method: "wanda", "sparsegpt" or a key of ``FISTA_METHODS``
    :param pattern: the pattern to prune to
    :param changes: fields of the modifier that get other values
    :return: the modifier
    """
    fields: dict[str, Any] = {
        "sparsity": pattern.sparsity,
        "targets": TARGETS,
        "ignore": IGNORE,
    }
    if method in FISTA_METHODS:
        fields["mask_structure"] = str(pattern)
        fields["preset"] = FISTA_METHODS[method]
        return FISTAPruningModifier(**fields | changes)
    # the toolkit's own modifiers count the pruned weights of a group
    peer = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    n, m = pattern.group or (0, 0)
    fields["mask_structure"] = f"{m - n}:{m}"
    return peer(**fields | changes)


def prune_by_peer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Dataset,
    *,
    method: str,
    pattern: SparsityPattern,
) -> pipeline.PruningRun:
    """
    Prune by a modifier of the toolkit what this package prunes, which leaves out the
    routers of mixtures.

    :param model: changed in place
    :param tokenizer: the model's tokenizer
    :param calibration: the calibration tokens
    :param method: "wanda" or "sparsegpt"
    :param pattern: the pattern to prune to
    :return: the pruned model
    """
    linearize(model)
    pruned = {operator.name for operator in find_operators(model, TARGETS, IGNORE)}
    # the toolkit compares names that end in a dot
    others = [
        rf"re:{re.escape(one.name)}\.?$"
        for one in operators_in(model, "")
        if one.name not in pruned
    ]
    modifier = recipe(method, pattern, ignore=IGNORE + others)
    return pipeline.prune(model, tokenizer, calibration, modifier)


def prune_by_magnitude(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Dataset,
    *,
    pattern: SparsityPattern,
) -> pipeline.PruningRun:
    """
    Keep each operator's largest weights. The data are not used.

    :param model: changed in place
    :param tokenizer: not used
    :param calibration: not used
    :param pattern: the pattern to prune to
    :return: the pruned model
    """
    linearize(model)  # as oneshot() does for the other methods
    for operator in find_operators(model, TARGETS, IGNORE):
        check_prunable(operator, pattern)
        operator.save(project(operator.weight, pattern))
    return pipeline.PruningRun(model)
