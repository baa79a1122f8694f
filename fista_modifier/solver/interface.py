"""
The interface of a solver: from the sums of a stage to its operators' pruned weights.
"""

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
    The pruned weight of one operator, with its error.

    :param weight: W*, m×n, with the pattern, in the dtype asked for
    :param error: ‖W* X* − W X‖_F of exactly this weight
    :param start_error: that error of the warm start, rounded and cast but not refitted
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
        """The error as a share of ‖WX‖_F; 0 where the operator's output is zero."""
        return self.relative(self.error)

    @property
    def relative_start_error(self) -> float:
        """
        The start error as a share of ‖WX‖_F; 0 where the operator's output is zero.
        """
        return self.relative(self.start_error)

    def relative(self, error: float) -> float:
        """
        Return an error as a share of ‖WX‖_F.

        :param error: an error such as that of a trial
        :return: error / ‖WX‖_F; 0 where the operator's output is zero
        """
        return error / self.output_norm if self.output_norm else 0.0

    def moved_to(self, device: torch.device | str) -> PrunedWeight:
        """
        Return the same result with the weight on a device.

        :param device: the device
        :return: the result
        """
        return replace(self, weight=self.weight.to(device))


class Solver(Protocol):
    """A method that prunes operators which share an input."""

    def prune(
        self, weights: Sequence[Tensor], patterns: Sequence[SparsityPattern]
    ) -> list[PrunedWeight]:
        """
        Prune each operator to its pattern.

        :param weights: dense weight W, m×n, of each operator, of any floating dtype
        :param patterns: the pattern that each operator is to have
        :return: W* of each operator, in the dtype and on the device of its W
        :raises ValueError: if a pattern does not fit the width n
        """
        ...


class SolverFactory(Protocol):
    """
    A function that makes a solver for a stage. Options that can be called serve as one.
    """

    def __call__(self, statistics: GramStatistics) -> Solver:
        """
        Make the solver of a stage.

        :param statistics: Gram matrices of the shared input, n×n
        :return: a solver for the operators that have this input
        """
        ...
