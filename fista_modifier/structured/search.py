"""
Selectors that count what the other channels can make up for, by exact error changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fista_modifier.structured.pivots import PivotTable
from fista_modifier.structured.problem import ChannelProblem
from fista_modifier.structured.restoration import DAMPENING, LeastSquares
from fista_modifier.structured.selection import Selector

__all__ = [
    "GreedyElimination",
    "LocalSearch",
    "table_of",
]

GAIN = 1e-3
"""
The gain that a swap must exceed, as a share of the cost of its removal alone. A smaller
gain may be rounding.
"""


@dataclass(frozen=True)
class GreedyElimination:
    """
    The structured optimal brain surgeon of ZipLM (Kurtić et al. 2023). Channels leave
    one after the other: each time the one whose removal costs least if all that stay
    are refitted. The inverse of G is updated exactly. The costs are those of damped
    least squares towards the dense output, drift included.

    :param dampening_frac: damping, as that of
        :class:`~fista_modifier.structured.restoration.LeastSquares`
    """

    dampening_frac: float = DAMPENING

    def __call__(self, problem: ChannelProblem) -> Tensor:
        table = table_of(problem, torch.arange(problem.channels), self.dampening_frac)
        for _ in range(problem.channels - problem.keep):
            costs = table.worths().masked_fill(~table.kept, torch.inf)
            # what rounding hides is nearly explained by the others, so it costs little
            table.flip(costs.nan_to_num(-torch.inf, torch.inf).argmin())
        return table.kept.nonzero().squeeze(1)


@dataclass(frozen=True)
class LocalSearch:
    """
    OSSCAR's idea (Meng et al. 2024) in exact form. A kept and a removed channel change
    places while that lowers the damped least squares error, the best such pair first.
    The change of the error is exact for each pair, refit included. The result is never
    worse than the start in this error.

    :param start: selector to start from
    :param dampening_frac: damping, as that of
        :class:`~fista_modifier.structured.restoration.LeastSquares`
    :param candidates: how many kept channels are tried, those that cost least alone;
        each is tried with all removed channels
    :param max_swaps: swaps at most
    """

    start: Selector = field(default_factory=GreedyElimination)
    dampening_frac: float = DAMPENING
    candidates: int = 64
    max_swaps: int = 1000

    def __call__(self, problem: ChannelProblem) -> Tensor:
        kept = self.start(problem)
        if problem.keep == problem.channels:
            return kept
        table = table_of(problem, kept, self.dampening_frac)
        for _ in range(self.max_swaps):
            swap = self._best_swap(table)
            if swap is None:
                break
            for channel in swap:
                table.flip(channel)
        found = table.kept.nonzero().squeeze(1)
        # with few tokens of very different powers, rounding adds up over the pivots
        before, after = (
            damped_error(problem, one, self.dampening_frac) for one in (kept, found)
        )
        return found if after < before else kept

    def _best_swap(self, table: PivotTable) -> tuple[Tensor, Tensor] | None:
        """
        Return the channel that leaves and the one that returns; None if no pair gains.
        """
        costs = table.worths().masked_fill(~table.kept, torch.inf)
        order = costs.argsort()[: min(self.candidates, int(table.kept.sum()))]
        removed = (~table.kept).nonzero().squeeze(1)
        trials = [table.worths_without(channel, removed) for channel in order]
        gains = torch.stack(trials) - costs[order, None]
        gains = gains.nan_to_num(-torch.inf)  # hidden by rounding
        best, partner = divmod(int(gains.argmax()), gains.shape[1])
        if not gains[best, partner] > GAIN * costs[order[best]].abs():
            return None
        return order[best], removed[partner]


def damped_error(problem: ChannelProblem, kept: Tensor, dampening_frac: float) -> float:
    """
    Return the damped least squares error of some channels, by one factorisation.

    :param problem: W and the sums over its inputs
    :param kept: the channels, long
    :param dampening_frac: damping, as a fraction of the features' typical power
    :return: E(S), as defined for :class:`~fista_modifier.structured.pivots.PivotTable`
    """
    weight, bias = LeastSquares(dampening_frac)(problem, kept)
    columns = problem.kept_columns(kept)
    change = weight - problem.objective.weight[:, columns]
    damping = problem.damped(dampening_frac).quadratic.damping[columns]
    pull = (damping * change.square()).sum(dtype=torch.float64)
    return problem.error(problem.widened(weight, kept), bias) ** 2 + float(pull)


def table_of(
    problem: ChannelProblem, kept: Tensor, dampening_frac: float
) -> PivotTable:
    """
    Make the pivot table of some channels.

    :param problem: W and the sums over its inputs
    :param kept: the channels, long
    :param dampening_frac: damping, as a fraction of the features' typical power
    :return: the table of these channels
    """
    mask = torch.zeros(problem.channels, dtype=torch.bool)
    mask[kept.cpu()] = True
    return PivotTable(problem.damped(dampening_frac), problem.columns, mask)
