"""Which operators share an input, and in which order they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fista_modifier.calibration.operators import Operator
from fista_modifier.calibration.replay import LayerCall

__all__ = ["Stage", "find_stages"]


@dataclass
class Stage:
    """
    Operators that are given the same tensor, such as q/k/v or gate/up: they share all
    Gram matrices, and none of them can disturb the input of another.

    :param operators: in the order of their calls
    :param calls: how often they are called in one run of the layer
    """

    operators: list[Operator]
    calls: int = 1


def find_stages(
    operators: Sequence[Operator], calls: Iterable[LayerCall]
) -> list[Stage]:
    """
    Watch the layer run. No names are needed: the order of pruning is the order of
    execution, and a stage is what receives one and the same tensor. One batch is
    enough, unless some operators (experts of a mixture) have not been called by then.

    :param operators: operators of one decoder layer
    :param calls: batches to watch, until all operators have been seen
    :return: stages in the order of execution; operators that no batch reaches are in
        none of them
    """
    stages: list[Stage] = []
    unseen = list(operators)
    for call in calls:
        found = _watch(unseen, call)
        stages += found
        seen = {operator for stage in found for operator in stage.operators}
        unseen = [operator for operator in unseen if operator not in seen]
        if not unseen:
            break
    return stages


def _watch(operators: Sequence[Operator], call: LayerCall) -> list[Stage]:
    """The stages that one run of the layer shows."""
    inputs: dict[Operator, list[Tensor]] = {}  # the tensors are kept: no address recurs

    def record(operator: Operator) -> RemovableHandle:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            inputs.setdefault(operator, []).append(args[0])

        return operator.module.register_forward_pre_hook(hook)

    with ExitStack() as hooks:
        for operator in operators:
            hooks.enter_context(record(operator))
        call.run()

    stages: list[Stage] = []
    for operator, seen in inputs.items():
        for stage in stages:
            if _same(inputs[stage.operators[0]], seen):
                stage.operators.append(operator)
                break
        else:
            stages.append(Stage([operator], len(seen)))
    return stages


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two operators were called with the same memory, every time."""
    return len(one) == len(other) and all(
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
        for a, b in zip(one, other, strict=True)
    )
