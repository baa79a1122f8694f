import pytest
import torch
from problems import normal

from fista_modifier.structured.simplex import project_to_capped_simplex


@pytest.mark.parametrize("total", [1, 7, 12.5, 19])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spread", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_projection_satisfies_the_kkt_conditions(seed, spread, weighted, total):
    """
    d (z − y) + τ = 0 where 0 < z < 1, with one τ; the slope is upward where z = 0 and
    downward where z = 1.
    """
    point = spread * normal(20, seed=seed).double()
    metric = normal(20, seed=seed + 5).mul(3).exp().double() if weighted else None
    shares = project_to_capped_simplex(point, total, metric)
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert float(shares.sum()) == pytest.approx(total, abs=1e-9)
    slopes = (shares - point) * (1 if metric is None else metric)
    inside = (shares > 0) & (shares < 1)
    lower = slopes[shares == 1].tolist() + slopes[inside].tolist()
    upper = slopes[shares == 0].tolist() + slopes[inside].tolist()
    # every slope of a one is at most −τ, every slope of a zero at least that
    assert max(lower, default=-1e9) <= min(upper, default=1e9) + 1e-9 * spread * 1e3


def test_points_of_the_set_stay():
    point = torch.tensor([0.0, 0.25, 0.75, 1.0])
    assert torch.allclose(project_to_capped_simplex(point, 2), point)


@pytest.mark.parametrize("total", [0, 4])
def test_the_extremes_are_single_points(total):
    shares = project_to_capped_simplex(normal(4), total)
    assert shares.tolist() == [total / 4] * 4


def test_vertices_are_reached_exactly():
    """Where the entries lie far apart, no share is left that rounding made."""
    point = torch.tensor([50.0, -3.0, 7.0, -9.0, 20.0])
    assert project_to_capped_simplex(point, 3).tolist() == [1, 0, 1, 0, 1]


def test_equal_entries_share():
    shares = project_to_capped_simplex(torch.ones(4), 1)
    assert torch.allclose(shares, torch.full((4,), 0.25))
