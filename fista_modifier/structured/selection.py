"""Selectors that score each channel by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fista_modifier.structured.problem import ChannelProblem

__all__ = ["FASPScore", "Fluctuation", "Magnitude", "Selector", "highest"]


class Selector(Protocol):
    """A method that chooses the channels that stay."""

    def __call__(self, problem: ChannelProblem) -> Tensor:
        """
        Choose the channels that stay.

        :param problem: W, the sums over its inputs, and the number k to keep
        :return: the kept channels in ascending order, long k
        """
        ...


def highest(scores: Tensor, keep: int) -> Tensor:
    """
    Return the channels with the highest scores.

    :param scores: n
    :param keep: k
    :return: the channels with the k highest scores, the first ones among equals, in
        ascending order, long k
    """
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


@dataclass(frozen=True)
class FASPScore:
    """
    FASP's selector (Hu et al. 2025). It scores a channel by Wanda's |W_ij| ‖X_j‖,
    summed over the rows and over the columns of the channel.
    """

    def __call__(self, problem: ChannelProblem) -> Tensor:
        norms = problem.statistics.gram.diagonal().sqrt().to(problem.device)
        scores = problem.objective.weight.abs().sum(0) * norms
        return highest(problem.per_channel(scores), problem.keep)


@dataclass(frozen=True)
class Magnitude:
    """
    The selector by magnitude. It scores a channel by the norm of all weights that leave
    with it: its columns of the consumers and, if their norms are given, its rows of the
    producers.
    """

    def __call__(self, problem: ChannelProblem) -> Tensor:
        squares = problem.per_channel(problem.objective.weight.square().sum(0))
        if problem.producer_norms is not None:
            squares = squares + problem.producer_norms.to(squares).square()
        return highest(squares, problem.keep)


@dataclass(frozen=True)
class Fluctuation:
    """
    FLAP's selector (An et al. 2024). It scores a channel by the variance of a feature
    times the squared norm of its column, summed over the columns of the channel. This
    is what removal costs if features are uncorrelated and a bias takes up their means.

    The means are the problem's ``means``. The variances follow from them and diag(G).
    """

    def __call__(self, problem: ChannelProblem) -> Tensor:
        """
        Choose the channels with the highest scores.

        :raises ValueError: if the problem has no means
        """
        if problem.means is None:
            raise ValueError("FLAP's score needs the means of the features")
        variances = problem.means.variances(problem.statistics).to(problem.device)
        scores = problem.objective.weight.square().sum(0) * variances
        return highest(problem.per_channel(scores), problem.keep)
