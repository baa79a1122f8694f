"""Random operators with explicit inputs, and the arithmetic to check against."""

from __future__ import annotations

import torch
from torch import Tensor

from fista_modifier.solver import GramStatistics

FLOAT32 = torch.finfo(torch.float32).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Correlated features of unequal power, tokens×n."""
    mixing = torch.eye(features) + 0.3 * normal(features, features, seed=seed + 1)
    return normal(tokens, features, seed=seed) @ mixing


def gram_statistics(pruned: Tensor, dense: Tensor | None = None) -> GramStatistics:
    """
    :param pruned: X*ᵀ, tokens×n
    :param dense: Xᵀ, where it differs
    """
    statistics = GramStatistics.empty(pruned.shape[1])
    statistics.accumulate(pruned, dense)
    return statistics


def true_error(
    candidate: Tensor, weight: Tensor, pruned: Tensor, dense: Tensor | None = None
) -> float:
    """‖V X* − W X‖_F from the tokens themselves, in float64."""
    dense = pruned if dense is None else dense
    candidate, weight = candidate.double(), weight.double()
    difference = candidate @ pruned.double().T - weight @ dense.double().T
    return float(difference.norm())


def error_slack(weight: Tensor, pruned: Tensor) -> float:
    """
    What an error² may be off by when its inner products, of size ‖W‖²·‖G‖, come from
    float32 matrix products over n features.
    """
    features = pruned.shape[1]
    gram = pruned.double().T @ pruned.double()
    return float(features * FLOAT32 * weight.double().norm() ** 2 * gram.norm())
