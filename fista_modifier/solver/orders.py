"""An order of channels in which an n:m pattern costs less."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fista_modifier.solver.patterns import NofM

__all__ = ["kept_share", "regrouped"]

DEALT = 512
"""
The most groups among which channels are dealt out at once. The time for this grows with
the cube of their number.
"""


def regrouped(scores: Tensor, pattern: NofM) -> Tensor:
    """
    Spread the large entries of each row over its groups, so that fewer of them compete
    for the n places of one group (after Pool & Yu, 2021). At first, each group gets
    channels of all sizes. Then the channels at one place of all groups are dealt out
    anew, by the assignment that keeps most beside what the other places have. This is
    done once for each place, as a second time gains next to nothing.

    :param scores: importance of each entry, at least zero, m×channels
    :param pattern: n:m
    :return: long, a permutation: the channel at each place. It is the given order if no
        better one was found
    :raises ValueError: if the channels do not fill whole groups
    """
    channels = scores.shape[1]
    pattern.check_columns(channels)
    order = torch.arange(channels, device=scores.device)
    if pattern.n == pattern.m or channels == pattern.m:
        return order
    by_size = scores.sum(0).argsort(descending=True, stable=True)
    groups = by_size.view(pattern.m, -1).T.contiguous()
    for place in range(pattern.m):
        for some in _parts(len(groups), place):
            groups[some] = _dealt(groups[some], place, scores, pattern.n)
    found = groups.flatten()
    better = kept_share(scores[:, found], pattern) > kept_share(scores, pattern)
    return found if better else order


def kept_share(scores: Tensor, pattern: NofM) -> float:
    """
    Return the share of all scores that a pattern keeps.

    :param scores: importance of each entry, at least zero, m×n
    :param pattern: n:m
    :return: the share; 1 if all scores are zero
    """
    total = float(scores.sum(dtype=torch.float64))
    kept = (scores * pattern.support(scores)).sum(dtype=torch.float64)
    return float(kept) / total if total else 1.0


def _parts(groups: int, turn: int) -> list[Tensor]:
    """
    Split the numbers of the groups at random into parts of at most :data:`DEALT`. Each
    turn has other parts.
    """
    generator = torch.Generator().manual_seed(turn)
    places = torch.randperm(groups, generator=generator)
    return list(torch.tensor_split(places, -(-groups // DEALT)))


def _dealt(groups: Tensor, place: int, scores: Tensor, n: int) -> Tensor:
    """
    Deal out anew the channels at one place of the groups (number×m), and return the new
    groups. A channel c adds max(0, S_rc − t_rg) to what row r keeps of group g, with
    t_rg the n-th largest of the others there. The sum over r is half of Σ|S_rc − t_rg|,
    apart from terms that are the same for all assignments.

    Channels that add nothing where they come could change places with one another.
    Rounding would choose among such assignments, so these channels are sorted.
    """
    others = torch.cat([groups[:, :place], groups[:, place + 1 :]], 1)
    thresholds = scores[:, others].topk(n).values[..., -1]
    candidates = groups[:, place]
    # float32 would lose small gains beside the terms that all assignments share
    gains = torch.cdist(scores[:, candidates].T.double(), thresholds.T.double(), p=1)
    _, receivers = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    receivers = torch.from_numpy(receivers).to(groups.device)
    added = (scores[:, candidates] - thresholds[:, receivers]).clamp(min=0).sum(0)
    receivers[added == 0] = receivers[added == 0].sort().values
    dealt = groups.clone()
    dealt[receivers, place] = candidates
    return dealt
