"""Groups of channels with explicit inputs, and least squares to check against."""

from __future__ import annotations

import torch
from problems import gram_statistics, inputs, normal
from torch import Tensor

from fista_modifier.structured import (
    ChannelProblem,
    FASPScore,
    FeatureMeans,
    Fluctuation,
    GreedyElimination,
    LocalSearch,
    Magnitude,
    PenaltyMethod,
    Selector,
)
from fista_modifier.structured.problem import damped_quadratic

SELECTORS: list[Selector] = [
    FASPScore(),
    Magnitude(),
    Fluctuation(),
    GreedyElimination(),
    LocalSearch(),
    PenaltyMethod(),
]


def named(value: object) -> str:
    return type(value).__name__


def means_of(pruned: Tensor, dense: Tensor | None, weight: Tensor) -> FeatureMeans:
    drift = None if dense is None else weight.float() @ (pruned - dense).mean(0)
    return FeatureMeans(pruned.mean(0), pruned.shape[0], drift)


def channel_problem(
    weight: Tensor,
    pruned: Tensor,
    keep: int,
    *,
    dense: Tensor | None = None,
    size: int = 1,
    intercept: bool = False,
) -> ChannelProblem:
    """
    :param weight: W, m×N
    :param pruned: X*ᵀ, tokens×N
    :param dense: Xᵀ, where it differs
    :param size: r; channel i owns columns i, i + n, i + 2n, ...
    """
    columns = torch.arange(weight.shape[1]).view(size, -1).T
    return ChannelProblem(
        weight,
        gram_statistics(pruned, dense),
        columns,
        keep,
        means=means_of(pruned, dense, weight),
        intercept=intercept,
    )


def redundant_mlp(
    channels: int, tokens: int, *, rank: int = 3, outputs: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """
    A gated MLP of more channels than the products of its few inputs have dimensions,
    with channels of unequal power.

    :return: W, and the inputs of the down projection, tokens×channels
    """
    features = inputs(tokens, rank, seed=10 * seed)
    gate = normal(channels, rank, seed=10 * seed + 2)
    up = normal(channels, rank, seed=10 * seed + 3)
    power = normal(channels, seed=10 * seed + 4).mul(0.7).exp()
    hidden = torch.nn.functional.silu(features @ gate.T) * (features @ up.T) * power
    return normal(outputs, channels, seed=10 * seed + 5), hidden


def damped_fit(
    problem: ChannelProblem,
    kept: list[int],
    dampening_frac: float,
    pruned: Tensor,
    dense: Tensor | None = None,
) -> tuple[Tensor, float]:
    """
    Least squares on the tokens themselves, float64, with damping as further tokens. If
    the problem has a bias, tokens are centred.

    :return: V_S, m×s, and the least ‖V_S X*_S − W X‖² + δ ‖V_S − W_S‖²
    """
    dense = pruned if dense is None else dense
    weight = problem.weight.double()
    outputs = dense.double() @ weight.T
    tokens = pruned.double()
    if problem.intercept:
        outputs, tokens = outputs - outputs.mean(0), tokens - tokens.mean(0)
    ridge = damped_quadratic(problem.fitted, dampening_frac).damping[0].double()
    columns = problem.kept_columns(torch.tensor(kept, dtype=torch.long))
    left = torch.cat([tokens[:, columns], ridge.sqrt() * torch.eye(len(columns))])
    right = torch.cat([outputs, ridge.sqrt() * weight[:, columns].T])
    solution = torch.linalg.lstsq(left, right).solution
    return solution.T, float((left @ solution - right).square().sum())
