"""Sums over the inputs of operators, and those that the toolkit's own pass shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from torch import Tensor

from fista_modifier.calibration.padding import RealTokens, real_rows
from fista_modifier.calibration.stages import Stage
from fista_modifier.models.operators import Operator
from fista_modifier.solver.gram import GramStatistics

__all__ = ["SumsInPass", "check_finite", "empty_statistics"]


class SumsInPass:
    """
    Sums that are taken while the toolkit's pass runs a dense layer. They spare the
    replay of operators whose X* is X. The n×n matrices are made when the layer is first
    called, and only if no other layer has such matrices at that time. So a pipeline
    that runs several layers before it leaves the first needs no more memory, and its
    other layers are replayed. So are experts, as the pass routes padding to them, too.

    :param operators: the operators, none of which reads a context
    :param offload: whether to keep n×n matrices in main memory
    :param others: says whether another layer has sums now
    """

    def __init__(
        self,
        operators: Sequence[Operator],
        offload: bool,
        others: Callable[[], bool],
    ) -> None:
        self._operators = operators
        self._offload = offload
        self._others = others
        self._started = False
        self._sums: dict[Operator, GramStatistics] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def start(self) -> None:
        """Make the matrices, unless this is not the first call or others have some."""
        if not self._started and not self._others():
            self._sums = {
                one: empty_statistics([one], self._offload, drifts=False)
                for one in self._operators
            }
        self._started = True

    def hooks(
        self, real: Callable[[], RealTokens]
    ) -> Iterator[tuple[torch.nn.Module, Callable[..., None]]]:
        """
        Yield the hooks, to be called before a forward with keyword arguments.

        :param real: returns what is not padding in the batch that runs now
        :return: module and hook of each operator
        """
        for operator in self._operators:

            def add(
                _module: torch.nn.Module,
                args: tuple[Any, ...],
                _kwargs: dict[str, Any],
                operator: Operator = operator,
            ) -> None:
                if operator in self._sums:
                    self.add(operator, real_rows(args[0], real().own))

            yield operator.module, add

    def add(self, operator: Operator, tokens: Tensor) -> None:
        """
        Add the tokens of one batch.

        :param operator: an operator that has sums
        :param tokens: its input, real tokens × features
        """
        self._sums[operator].accumulate(tokens)

    def take(self, wave: Sequence[Stage]) -> list[GramStatistics] | None:
        """
        Return the sums for the stages of a wave, and keep them no longer.

        :param wave: stages for which X* is X
        :return: statistics of each stage; None if there are none for one of them
        :raises ValueError: if an activation is NaN or infinite
        """
        firsts = [stage.operators[0] for stage in wave]
        routed = any(stage.routed for stage in wave)
        if routed or not all(one in self._sums for one in firsts):
            return None
        taken = [self._sums.pop(one) for one in firsts]
        for stage, statistics in zip(wave, taken, strict=True):
            check_finite(stage, statistics)
        return taken


def empty_statistics(
    operators: Sequence[Operator], offload: bool, *, drifts: bool
) -> GramStatistics:
    """
    Return statistics of zero tokens for operators that share their input.

    :param operators: all operators that are given the input
    :param offload: whether to keep n×n matrices in main memory
    :param drifts: whether X* may differ from X
    :return: the statistics, on the device that executes the operators
    """
    weights = [operator.weight for operator in operators] if drifts else []
    device = get_execution_device(operators[0].module)
    return GramStatistics.empty(operators[0].shape[1], device, weights, offload)


def check_finite(stage: Stage, statistics: GramStatistics) -> None:
    """
    Refuse sums that no weight can be found from.

    :param stage: the stage whose statistics they are
    :param statistics: the sums over its inputs
    :raises ValueError: if an activation is NaN or infinite; the message names the
        operators
    """
    if not statistics.is_finite():
        raise ValueError(
            f"the input of {stage.names} contains NaN or infinity; load the "
            "model in bfloat16 or float32, or look for broken weights in the "
            "layers before it"
        )
