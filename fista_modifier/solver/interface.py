"""What a solver is: from the sums of a stage to the pruned weights of its operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from fista_modifier.solver.gram import GramStatistics
from fista_modifier.solver.patterns import SparsityPattern
from fista_modifier.solver.trials import Trial

__all__ = ["PrunedWeight", "Solver", "SolverFactory"]


@dataclass(frozen=True)
class PrunedWeight:
    """
    :param weight: W*, m×n, with the pattern, in the dtype asked for
    :param error: ‖W* X* − W X‖_F of exactly this weight
    :param start_error: the same of the warm start, rounded and cast but not refitted
    :param output_norm: ‖W X‖_F, the yardstick of relative errors
    :param trials: the rounds of Algorithm 1, in order
    """

    weight: Tensor
    error: float
    start_error: float
    output_norm: float
    trials: list[Trial] = field(default_factory=list)

    @property
    def relative_error(self) -> float:
        """error / ‖WX‖_F; 0 where the operator's output is zero"""
        return self.relative(self.error)

    @property
    def relative_start_error(self) -> float:
        """start_error / ‖WX‖_F"""
        return self.relative(self.start_error)

    def relative(self, error: float) -> float:
        """
        :param error: such as that of a trial
        :return: error / ‖WX‖_F; 0 where the operator's output is zero
        """
        return error / self.output_norm if self.output_norm else 0.0

    def moved_to(self, device: torch.device | str) -> PrunedWeight:
        """:return: the same, with the weight on a device"""
        return replace(self, weight=self.weight.to(device))


class Solver(Protocol):
    """Prunes operators that share an input."""

    def prune(
        self, weights: Sequence[Tensor], patterns: Sequence[SparsityPattern]
    ) -> list[PrunedWeight]:
        """
        :param weights: dense weight W, m×n, of each operator, of any floating dtype
        :param patterns: that each of them is to have
        :return: W* of each, in the dtype and on the device of its W
        :raises ValueError: if a pattern does not fit the width n
        """
        ...


class SolverFactory(Protocol):
    """Makes a solver for a stage, as options do when they are called."""

    def __call__(self, statistics: GramStatistics) -> Solver:
        """
        :param statistics: Gram matrices of the shared input, n×n
        :return: a solver for the operators that have it
        """
        ...
