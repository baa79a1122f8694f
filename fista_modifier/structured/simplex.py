"""The capped simplex {0 ≤ z ≤ 1, Σ z = k}: the convex hull of the choices of k."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["project_to_capped_simplex"]


def project_to_capped_simplex(
    point: Tensor, total: float, metric: Tensor | None = None
) -> Tensor:
    """
    Project a point in a diagonal metric, min Σ_i d_i (z_i − y_i)². The solution is z =
    clip(y − τ/d, 0, 1) with the τ at which Σ z = k. That sum falls linearly between the
    2n values of τ at which an entry leaves 1 or reaches 0. These are sorted, so τ is
    found exactly.

    :param point: y, n
    :param total: k, between 0 and n
    :param metric: d, n, positive; None is 1
    :return: z, n, in the dtype of ``point``; computed in float64
    """
    target = point.double()
    weights = torch.ones_like(target) if metric is None else metric.double()
    breaks, order = torch.cat([weights * (target - 1), weights * target]).sort()
    slopes = torch.cat([1 / weights, -1 / weights])[order].cumsum(0)
    falls = torch.cat([slopes.new_zeros(1), slopes[:-1] * breaks.diff()]).cumsum(0)
    needed = len(point) - total
    # This is the last break at which the sum has not fallen too far.
    last = torch.searchsorted(falls, needed, right=True).sub(1)
    last = last.clamp(0, len(falls) - 2)
    rest = needed - falls[last]
    step = torch.where(slopes[last] > 0, rest / slopes[last], 0)
    shift = torch.minimum(breaks[last] + step, breaks[last + 1])
    return (target - shift / weights).clamp_(0, 1).to(point.dtype)
