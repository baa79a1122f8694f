"""The rounds of the search for λ."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Trial"]


class Trial(NamedTuple):
    """
    One round of Algorithm 1.

    :param penalty: λ, in units of :func:`~fista_modifier.solver.tuning.lambda_unit`
    :param error: 𝓔_total = ‖W_{K+1}* X* − W X‖_F after rounding
    :param best_error: lowest error so far, the warm start's included
    :param iterations: FISTA iterations done
    :param rounding: 𝓔_round / 𝓔_total
    """

    penalty: float
    error: float
    best_error: float
    iterations: int = 0
    rounding: float = 0.0

    def in_units_of(self, unit: float) -> Trial:
        """
        Return the trial with both errors divided by a number.

        :param unit: the number
        :return: the trial, with errors of 0 if the number is 0
        """
        return self._replace(
            error=self.error / unit if unit else 0.0,
            best_error=self.best_error / unit if unit else 0.0,
        )
