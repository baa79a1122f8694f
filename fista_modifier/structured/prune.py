"""The way from a problem to the smaller weight, by a selector and a restorer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fista_modifier.structured.problem import ChannelProblem
from fista_modifier.structured.restoration import Restorer
from fista_modifier.structured.selection import Selector

__all__ = ["PrunedChannels", "prune_channels", "rounded_change"]


@dataclass(frozen=True, eq=False)
class PrunedChannels:
    """
    The channels of a group that stay, and the consumers' weight on them.

    :param kept: the channels that stay in ascending order, long k
    :param weight: weight of the consumers on the columns that stay, in ascending order,
        m×k·r in the dtype of W
    :param bias: what is to be added to the consumers' bias, float32 m; None is nothing
    :param error: ‖V X* + c 1ᵀ − W X‖_F of exactly this weight and bias change
    :param output_norm: ‖W X‖_F, the yardstick of relative errors
    """

    kept: Tensor
    weight: Tensor
    bias: Tensor | None
    error: float
    output_norm: float

    @property
    def relative_error(self) -> float:
        """The error as a share of ‖WX‖_F; 0 where the consumers' output is zero."""
        return self.error / self.output_norm if self.output_norm else 0.0


def prune_channels(
    problem: ChannelProblem,
    selector: Selector,
    restorer: Restorer,
    own_bias: Tensor | None = None,
) -> PrunedChannels:
    """
    Choose the channels of a group that stay, and find the consumers' weights on them.

    :param problem: W, the sums over its inputs, and the number of channels to keep
    :param selector: chooses the channels
    :param restorer: finds the weights on them
    :param own_bias: the consumers' bias, m, to whose dtype the new bias is rounded;
        None leaves the change of the bias as it is
    :return: the smaller weight, cast to the dtype of W, and its error after the cast
    :raises ValueError: if the method needs means or a bias that the problem lacks
    """
    kept = selector(problem)
    restored = restorer(problem, kept)
    weight = restored.weight.to(problem.weight)
    bias = rounded_change(restored.bias, own_bias)
    error = problem.error(problem.widened(weight, kept), bias)
    return PrunedChannels(kept, weight, bias, error, problem.objective.output_norm)


def rounded_change(change: Tensor | None, own_bias: Tensor | None) -> Tensor | None:
    """
    Return what a change of a bias comes to once the bias is stored.

    :param change: what is to be added to the bias, float32 m; None is nothing
    :param own_bias: the bias, m of any floating dtype; None if there is none
    :return: the change after the rounding of the new bias, float32 m
    """
    if change is None or own_bias is None:
        return change
    own = own_bias.to(change.device)
    return (own + change).to(own.dtype).float() - own.float()
