"""The recovery of a pruned model: which weights are trained, and what is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.models.experts import linearize
from fista_modifier.models.layers import group_by_layer, layer_targets
from fista_modifier.models.operators import Operator, operators_in
from fista_modifier.pruning.results import (
    Calibration,
    OperatorResult,
    PruningReport,
    RecoveryResult,
)
from fista_modifier.recovery.training import Training, train_operators

__all__ = [
    "counted_zeros",
    "kept_entries",
    "operators_to_train",
    "pruned_operators",
    "recover",
    "with_recovery",
]


def recover(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokens: Dataset,
    report: PruningReport,
    data: Calibration,
    training: Training,
    *,
    resume: Path | None = None,
    sharded: bool = False,
    teacher_name: str = "",
) -> PruningReport:
    """
    Train the weights that pruning kept in the report's operators. In layers that lost
    channels, all operators are trained, because each has to make up for what is gone.
    Operators that only lost channels have no zeros to keep. See
    :func:`train_operators`.

    :param model: the pruned model, as it was loaded; changed in place
    :param teacher: the dense model, with the same vocabulary
    :param tokens: ``input_ids`` and ``attention_mask`` of equal lengths
    :param report: the report of the pruning
    :param data: the data that the tokens are from
    :param training: how to train
    :param resume: folder that keeps the state of the training
    :param sharded: whether each process trains a part of the model; then only the first
        one's model is changed
    :param teacher_name: the teacher's folder or hub id
    :return: the report, with the recovery and the zeros that are there now
    :raises ValueError: as for :func:`train_operators`, or if the model does not have
        the report's operators
    :raises RuntimeError: if the training has diverged
    """
    operators = operators_to_train(model, report.operators)
    recovery = train_operators(
        model,
        teacher,
        tokens,
        operators,
        kept_entries(operators),
        data,
        training,
        resume=resume,
        sharded=sharded,
        teacher_name=teacher_name,
    )
    return with_recovery(report, recovery, counted_zeros(operators))


def operators_to_train(
    model: PreTrainedModel, results: Sequence[OperatorResult]
) -> list[Operator]:
    """
    Return the operators to train: those that were pruned, each once, and all operators
    of the layers that lost channels.

    :param model: the pruned model
    :param results: what became of each operator
    :return: the operators
    :raises ValueError: if the model does not have one of these operators
    """
    operators = pruned_operators(model, results)
    smaller = [operators[one.name] for one in results if one.is_smaller]
    if smaller:
        targets = layer_targets(model, smaller)
        for layer in group_by_layer(model, smaller, targets):
            if layer.in_sequence and layer.operators:
                every = operators_in(layer.module, layer.name)
                operators = {one.name: one for one in every} | operators
    return [*operators.values()]


def pruned_operators(
    model: PreTrainedModel,
    results: Sequence[OperatorResult],
    linearize: Callable[[PreTrainedModel], None] = linearize,
) -> dict[str, Operator]:
    """
    Find the operators that were pruned.

    :param model: the pruned model; its experts become linear operators if they were
        pruned
    :param results: what became of each operator
    :param linearize: makes linear operators of experts
    :return: each operator once, by its name
    :raises ValueError: if the model does not have one of these operators
    """
    names = list(dict.fromkeys(one.name for one in results))
    if not dict(model.named_modules()).keys() >= set(names):
        linearize(model)  # the report has the experts of a mixture one by one
    modules: dict[str, Any] = dict(model.named_modules())
    missing = [name for name in names if not hasattr(modules.get(name), "weight")]
    if missing:
        raise ValueError(
            f"the report names {missing[0]}, which {type(model).__name__} does not "
            "have: it is the report of another model"
        )
    return {name: Operator(name, modules[name]) for name in names}


def kept_entries(operators: Iterable[Operator]) -> dict[str, Tensor]:
    """
    Return the masks of what is not zero in operators.

    :param operators: operators of a pruned or smaller model
    :return: bool out×in of each operator that has zeros, by its name
    """
    return {
        one.name: mask for one in operators if not bool((mask := one.weight != 0).all())
    }


def counted_zeros(operators: Iterable[Operator]) -> dict[str, int]:
    """
    Count the zeros of operators. Rounding after a training may have added some; where
    nothing was set to zero, training may have changed some.

    :param operators: operators of a trained model
    :return: the number of zeros of each, by its name
    """
    return {one.name: int((one.weight == 0).sum()) for one in operators}


def with_recovery(
    report: PruningReport, recovery: RecoveryResult, zeros: Mapping[str, int]
) -> PruningReport:
    """
    Add a training to a report.

    :param report: the report of the pruning
    :param recovery: the result of the training
    :param zeros: number of zeros of each trained operator after it, by its name;
        others have as many as before
    :return: the report with the training and these numbers
    """
    # a chain has an operator twice, and only the last entry is of what is stored
    last = {one.name: place for place, one in enumerate(report.operators)}
    return replace(
        report,
        recovery=[*report.recovery, recovery],
        operators=[
            replace(one, zeros=zeros.get(one.name, one.zeros))
            if last[one.name] == place
            else one
            for place, one in enumerate(report.operators)
        ],
    )
