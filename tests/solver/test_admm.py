import pytest
import torch
from problems import gram_statistics, inputs, normal
from torch import Tensor

from fista_modifier.solver import NofM, Unstructured
from fista_modifier.solver.admm import ADMM
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.patterns import project
from fista_modifier.solver.quadratic import Quadratic

TOKENS, FEATURES, ROWS = 96, 16, 5


class Fixed:
    """A pattern that leaves nothing to choose."""

    def __init__(self, support: Tensor) -> None:
        self.kept = support

    def support(self, scores: Tensor) -> Tensor:
        return self.kept


@pytest.fixture
def quadratic() -> Quadratic:
    """With diag(G) = 1, as column scaling makes it."""
    statistics = gram_statistics(
        inputs(TOKENS, FEATURES),
        inputs(TOKENS, FEATURES) + 0.2 * inputs(TOKENS, FEATURES, seed=5),
    )
    return Quadratic(statistics.scaled(statistics.column_scale()))


def test_where_nothing_is_to_be_chosen_it_ends_at_least_squares(quadratic):
    objective = LayerObjective(normal(ROWS, FEATURES), quadratic)
    support = normal(ROWS, FEATURES, seed=3) > 0
    weight = ADMM(quadratic, steps=2000)(objective, Fixed(support))
    gram, target = quadratic.statistics.gram.double(), objective.target.double()
    for row, kept in enumerate(support):
        expected = torch.linalg.solve(gram[kept][:, kept], target[row, kept])
        torch.testing.assert_close(
            weight[row, kept].double(), expected, rtol=1e-3, atol=1e-3
        )
    assert bool((weight[~support] == 0).all())


@pytest.mark.parametrize("pattern", [NofM(2, 4), Unstructured(0.5)], ids=str)
def test_its_support_is_better_than_that_of_the_largest_weights(quadratic, pattern):
    objectives = [
        LayerObjective(normal(ROWS, FEATURES, seed=seed), quadratic)
        for seed in range(4)
    ]
    admm = ADMM(quadratic, steps=10)
    for objective in objectives:
        weight = admm(objective, pattern)
        assert pattern.holds(weight)
        largest = project(objective.weight, pattern)
        assert objective.error(weight) < 0.9 * objective.error(largest)


def test_operators_that_share_an_inverse_are_solved_as_if_alone(quadratic):
    one, other = (
        LayerObjective(normal(ROWS, FEATURES, seed=seed), quadratic) for seed in (0, 1)
    )
    shared = ADMM(quadratic, steps=10)
    for objective in (one, other):
        alone = ADMM(quadratic, steps=10)(objective, NofM(2, 4))
        assert torch.equal(shared(objective, NofM(2, 4)), alone)
