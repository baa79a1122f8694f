"""The problems of the operators of one stage, in scaled columns, as they are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fista_modifier.solver.gram import GramStatistics
from fista_modifier.solver.interface import PrunedWeight
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.patterns import SparsityPattern
from fista_modifier.solver.quadratic import Quadratic
from fista_modifier.solver.support import fill_support, refit_
from fista_modifier.solver.trials import Trial

__all__ = [
    "RESOLUTION",
    "Candidate",
    "OperatorProblem",
    "StageProblem",
]

REFIT_TOLERANCE = 1e-3
"""
The share of the squared error by which a step of a refit must lower it. A step that
lowers it by less is the last.
"""

RESOLUTION = 1e-3
"""
The share of ‖WX‖_F up to which all errors count as equal. Such errors are roots of
differences of float32 sums, and rounding hides how they differ.
"""


@dataclass(frozen=True)
class Candidate:
    """
    A weight with the pattern, of known error.

    :param weight: V in scaled columns, float32 m×n, with values that the dtype of the
        operator can hold
    :param error: ‖V X* − W X‖_F of exactly this weight
    """

    weight: Tensor
    error: float


class StageProblem:
    """
    What the operators that share an input have in common.

    :param statistics: Gram matrices of the shared input, n×n
    :param damping: what is added to each entry of diag(G); None is nothing
    :param column_scaling: whether to solve for V diag(G)^½ (G with its damping) instead
        of V
    """

    def __init__(
        self,
        statistics: GramStatistics,
        *,
        damping: float | None = None,
        column_scaling: bool = True,
    ) -> None:
        self.device = statistics.execution_device
        self.features = statistics.features
        self._scale: Tensor | None = None
        ridge = (
            None if damping is None else torch.full_like(statistics.gram[0], damping)
        )
        if column_scaling:
            self._scale = statistics.column_scale(ridge)
            statistics = statistics.scaled(self._scale)
            ridge = None if ridge is None else ridge / self._scale.square()
            self._scale = self._scale.to(self.device)
        self.quadratic = Quadratic(statistics, ridge)

    def operator(self, weight: Tensor, pattern: SparsityPattern) -> OperatorProblem:
        """
        Return the problem of one operator.

        :param weight: dense weight W, m×n, of any floating dtype
        :param pattern: the pattern that W* is to have
        :return: the problem of this operator
        :raises ValueError: if the pattern does not fit the width n
        """
        pattern.check_columns(self.features)
        return OperatorProblem(self, weight, pattern)

    def scaled(self, weight: Tensor) -> Tensor:
        """
        Scale the columns of a weight.

        :param weight: m×n
        :return: the weight in scaled columns
        """
        return weight if self._scale is None else weight * self._scale

    def unscaled(self, weight: Tensor) -> Tensor:
        """
        Undo the scaling of a weight's columns.

        :param weight: a weight in scaled columns, m×n
        :return: the weight itself
        """
        return weight if self._scale is None else weight / self._scale


class OperatorProblem:
    """
    One operator of a stage. Every candidate is judged by its true error after it was
    cast to the dtype of the weight, so that the error reported is that of the
    checkpoint.

    :param stage: the stage with its sums
    :param weight: dense weight W, m×n, of any floating dtype
    :param pattern: the pattern that W* is to have
    """

    def __init__(
        self, stage: StageProblem, weight: Tensor, pattern: SparsityPattern
    ) -> None:
        self.stage = stage
        self.pattern = pattern
        self.objective = LayerObjective(
            stage.scaled(weight.to(stage.device, torch.float32)), stage.quadratic
        )
        self._like = weight

    def rounded(self, weight: Tensor) -> Candidate:
        """
        Round a weight to the pattern, and cast it.

        :param weight: V in scaled columns, m×n, without the pattern
        :return: the weight's largest entries, where the pattern has any, with their
            error
        """
        return self.cast(weight * self.pattern.support(weight.abs()))

    def cast(self, weight: Tensor) -> Candidate:
        """
        Cast a weight to the dtype of the operator and measure its error.

        :param weight: V in scaled columns, m×n
        :return: the weight as the dtype of the operator stores it, with its error
        """
        stored = self.stage.unscaled(weight).to(self._like.dtype).to(torch.float32)
        stored = self.stage.scaled(stored)
        return Candidate(stored, self.objective.error(stored))

    def refit(self, start: Candidate, support: Tensor | None = None) -> Candidate:
        """
        Refit a candidate on its support.

        :param start: a candidate with the pattern
        :param support: bool m×n; None for the entries of ``start`` that are not zero
        :return: least squares values on the support if they are better; otherwise
            ``start``
        """
        support = start.weight != 0 if support is None else support
        refitted = self.cast(self.refitted_(start.weight.clone(), support, start.error))
        return refitted if refitted.error < start.error else start

    def refitted_(self, weight: Tensor, support: Tensor, error: float) -> Tensor:
        """
        Refit a weight in place.

        :param weight: V in scaled columns, m×n, changed in place
        :param support: bool m×n, the entries that may be non-zero
        :param error: an error of the weight; the steps end where they lower its square
            by less than the share :data:`REFIT_TOLERANCE`
        :return: the weight, with least squares values on the support
        """
        tolerance = REFIT_TOLERANCE * error**2 / 2
        return refit_(self.objective, weight, support, tolerance=tolerance)

    def filled(self, best: Candidate) -> Candidate:
        """
        Use up the non-zeros that the pattern allows.

        :param best: a candidate with the pattern
        :return: the candidate with as many non-zeros as the pattern allows; ``best``
            itself if it has them, or if the cast would raise its error by more than
            :data:`RESOLUTION` hides
        """
        # Damping would move the last entries towards W, at the cost of the error.
        undamped = LayerObjective(
            self.objective.weight, Quadratic(self.stage.quadratic.statistics)
        )
        weight = fill_support(undamped, best.weight, self.pattern)
        if weight is best.weight:
            return best
        filled = self.cast(weight)
        # Few tokens may ask for values that half precision cannot hold; the error is
        # NaN then.
        limit = max(best.error, RESOLUTION * self.objective.output_norm)
        return filled if filled.error <= limit else best

    def solution(
        self, best: Candidate, start_error: float, trials: list[Trial] | None = None
    ) -> PrunedWeight:
        """
        Return the result of the operator.

        :param best: W* in scaled columns, with its error
        :param start_error: error of the warm start
        :param trials: rounds of a search for λ
        :return: W* in the dtype and on the device of W, and how well it went
        """
        # After the addition no zero is negative.
        weight = self.stage.unscaled(best.weight).add(0.0)
        return PrunedWeight(
            weight=weight.to(self._like),
            error=best.error,
            start_error=start_error,
            output_norm=self.objective.output_norm,
            trials=trials or [],
        )
