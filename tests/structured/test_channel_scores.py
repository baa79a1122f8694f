from dataclasses import replace

import pytest
import torch
from channel_problems import channel_problem
from problems import gram_statistics, inputs, normal

from fista_modifier.structured import (
    ChannelProblem,
    FASPScore,
    FeatureMeans,
    Fluctuation,
    Magnitude,
)
from fista_modifier.structured.selection import highest

TOKENS, FEATURES, ROWS = 40, 12, 5


def best(scores: list[float], keep: int) -> list[int]:
    ranked = sorted(range(len(scores)), key=lambda channel: -scores[channel])
    return sorted(ranked[:keep])


def setting() -> tuple[torch.Tensor, torch.Tensor, ChannelProblem]:
    weight = normal(ROWS, FEATURES) * normal(FEATURES, seed=1).exp()
    pruned = inputs(TOKENS, FEATURES) * normal(FEATURES, seed=2).exp()
    pruned = pruned + 3 * normal(FEATURES, seed=5)
    return weight, pruned, channel_problem(weight, pruned, 3, size=2)


def test_fasp_sums_the_scores_of_wanda():
    weight, pruned, problem = setting()
    scores = [
        sum(
            float(weight[row, column].abs() * pruned[:, column].norm())
            for row in range(ROWS)
            for column in (channel, channel + 6)
        )
        for channel in range(6)
    ]
    assert FASPScore()(problem).tolist() == best(scores, 3)


def test_fluctuation_is_the_variance_by_the_squared_norm():
    weight, pruned, problem = setting()
    own = pruned.var(0) * weight.norm(dim=0).square()
    scores = (own[:6] + own[6:]).tolist()
    assert Fluctuation()(problem).tolist() == best(scores, 3)
    assert Fluctuation()(problem).tolist() != FASPScore()(problem).tolist()


def test_fluctuation_needs_means():
    _, _, problem = setting()
    with pytest.raises(ValueError, match="needs the means"):
        Fluctuation()(replace(problem, means=None))


def test_fluctuation_does_not_want_constants():
    pruned = inputs(TOKENS, 3)
    pruned[:, 0] = 1000
    problem = ChannelProblem(
        torch.ones(2, 3),
        gram_statistics(pruned),
        torch.arange(3)[:, None],
        2,
        FeatureMeans(pruned.mean(0), TOKENS),
    )
    assert Fluctuation()(problem).tolist() == [1, 2]


def test_magnitude_counts_consumers_and_producers():
    weight, _, problem = setting()
    squares = weight.square().sum(0)
    consumers = squares[:6] + squares[6:]
    assert Magnitude()(problem).tolist() == best(consumers.tolist(), 3)
    lowest = int(consumers.argmin())
    norms = torch.zeros(6)
    norms[lowest] = 2 * consumers.sum().sqrt()
    kept = Magnitude()(replace(problem, producer_norms=norms))
    assert lowest in kept.tolist()
    small = replace(problem, producer_norms=norms / 1e6)
    assert torch.equal(Magnitude()(small), Magnitude()(problem))


def test_the_first_of_equal_channels_stay():
    assert highest(torch.tensor([0.0, 1, 1, 2, 1]), 3).tolist() == [1, 2, 3]
