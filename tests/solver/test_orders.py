"""An order of channels in which n:m keeps more."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from fista_modifier.solver import NofM, Reordered, Within, pattern_of
from fista_modifier.solver import orders as module
from fista_modifier.solver.orders import kept_share, regrouped

TWO_OF_FOUR = NofM(2, 4)


def uneven(rows: int, channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, channels, generator=generator) ** 8


def best_of_two_groups(scores: Tensor) -> float:
    """Of all ways to part eight channels into two groups of four"""
    others = range(1, 8)
    return max(
        kept_share(
            scores[:, [0, *some, *(one for one in others if one not in some)]],
            TWO_OF_FOUR,
        )
        for some in combinations(others, 3)
    )


def test_two_groups_gain_most_of_what_the_best_of_all_gain() -> None:
    gained = possible = 0.0
    for seed in range(20):
        scores = uneven(3, 8, seed)
        before, best = kept_share(scores, TWO_OF_FOUR), best_of_two_groups(scores)
        order = regrouped(scores, TWO_OF_FOUR)
        found = kept_share(scores[:, order], TWO_OF_FOUR)
        assert before <= found < best + 1e-12
        gained, possible = gained + found - before, possible + best - before
    assert gained > 0.6 * possible


def test_what_competes_is_parted() -> None:
    """Row r has its only large entries in channels 4r to 4r + 3, one group."""
    scores = torch.full((4, 16), 1e-6)
    for row in range(4):
        scores[row, 4 * row : 4 * row + 4] = 1
    assert kept_share(scores, TWO_OF_FOUR) == pytest.approx(0.5, abs=1e-4)
    order = regrouped(scores, TWO_OF_FOUR)
    assert kept_share(scores[:, order], TWO_OF_FOUR) > 1 - 1e-5


@pytest.mark.parametrize(
    ("n", "m", "rows", "channels"), [(2, 4, 5, 64), (1, 4, 7, 32), (4, 8, 3, 48)]
)
def test_it_is_a_permutation_that_keeps_more(
    n: int, m: int, rows: int, channels: int
) -> None:
    scores, pattern = uneven(rows, channels), NofM(n, m)
    order = regrouped(scores, pattern)
    assert torch.equal(order.sort().values, torch.arange(channels))
    assert kept_share(scores[:, order], pattern) > kept_share(scores, pattern)


def test_of_many_groups_only_some_are_dealt_out_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = uneven(64, 256)
    before = kept_share(scores, TWO_OF_FOUR)
    whole = kept_share(scores[:, regrouped(scores, TWO_OF_FOUR)], TWO_OF_FOUR)
    monkeypatch.setattr(module, "DEALT", 16)
    parts = kept_share(scores[:, regrouped(scores, TWO_OF_FOUR)], TWO_OF_FOUR)
    assert before + 0.7 * (whole - before) < parts < whole


@pytest.mark.parametrize(
    ("scores", "pattern"),
    [
        (torch.ones(3, 8), TWO_OF_FOUR),
        (uneven(3, 8), NofM(4, 4)),
        (uneven(3, 4), TWO_OF_FOUR),
        (torch.zeros(2, 16), TWO_OF_FOUR),
    ],
)
def test_without_a_better_order_it_is_the_old_one(
    scores: Tensor, pattern: NofM
) -> None:
    order = regrouped(scores, pattern)
    assert torch.equal(order, torch.arange(scores.shape[1]))


def test_channels_that_do_not_fill_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        regrouped(uneven(2, 10), TWO_OF_FOUR)


def test_a_weight_has_the_pattern_once_its_columns_are_in_order() -> None:
    scores = uneven(6, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    pattern = Reordered(TWO_OF_FOUR, order)
    weight = scores * pattern.support(scores)
    assert pattern.holds(weight)
    assert TWO_OF_FOUR.holds(weight[:, order])
    assert not TWO_OF_FOUR.holds(weight)
    expected = TWO_OF_FOUR.support(scores[:, order])
    assert torch.equal(pattern.support(scores)[:, order], expected)
    assert pattern_of(str(pattern)) == TWO_OF_FOUR


def test_zeros_stay_in_another_order_too() -> None:
    scores = uneven(6, 16)
    allowed = uneven(6, 16, seed=1) > 0.01
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    pattern = Within(Reordered(TWO_OF_FOUR, order), allowed)
    weight = scores * pattern.support(scores)
    assert not weight[~allowed].any()
    assert pattern.holds(weight)
    assert TWO_OF_FOUR.holds(weight[:, order])


def test_rounding_does_not_choose_among_channels_that_are_never_kept() -> None:
    """Whatever their places, so that all assignments of them are equally good."""
    scores = uneven(64, 48)
    scores[:, ::3] *= 1e-6
    order = regrouped(scores, TWO_OF_FOUR)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        noise = 1 + 2e-7 * torch.randn(scores.shape, generator=generator)
        assert torch.equal(regrouped(scores * noise, TWO_OF_FOUR), order)
