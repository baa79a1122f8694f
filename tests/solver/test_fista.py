import pytest
import torch
from problems import FLOAT32, gram_statistics, inputs, normal
from sklearn.linear_model import Lasso
from torch import Tensor

from fista_modifier.solver import GramStatistics
from fista_modifier.solver.fista import fista, soft_threshold
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.quadratic import Quadratic
from fista_modifier.solver.tuning import LambdaBisection, lambda_unit

TOKENS, FEATURES, ROWS = 96, 24, 6


@pytest.fixture
def objective() -> LayerObjective:
    """X* differs from X, so that the target is not W's own output."""
    pruned = inputs(TOKENS, FEATURES)
    dense = pruned + 0.3 * inputs(TOKENS, FEATURES, seed=5)
    return LayerObjective(
        normal(ROWS, FEATURES), Quadratic(gram_statistics(pruned, dense))
    )


def solve(objective: LayerObjective, penalty: float, steps: int = 5000) -> Tensor:
    """Iterate for as long as the weight moves at all."""
    start = objective.weight
    return fista(objective, penalty, start, steps, tolerance=1e-9).weight


def test_soft_threshold_shrinks_towards_zero():
    values = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])
    expected = torch.tensor([-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0])
    assert torch.equal(soft_threshold(values, 1.0), expected)
    assert torch.equal(soft_threshold(values, 0.0), values)


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0])
def test_the_minimum_is_that_of_scikit_learn(scale):
    """
    Lasso's α is λ/p, as it halves the mean of the squares where f halves their sum.
    """
    weight, pruned = normal(ROWS, FEATURES), inputs(TOKENS, FEATURES)
    dense = pruned + 0.3 * inputs(TOKENS, FEATURES, seed=5)
    problem = LayerObjective(weight, Quadratic(gram_statistics(pruned, dense)))
    penalty = scale * lambda_unit(problem)
    features = pruned.double().numpy()
    outputs = (dense.double() @ weight.double().T).numpy()
    solution = solve(problem, penalty).double().numpy()
    for row in range(ROWS):
        lasso = Lasso(penalty / TOKENS, fit_intercept=False, tol=1e-12, max_iter=10**5)
        lasso.fit(features, outputs[:, row])

        def value(candidate, target=outputs[:, row]):
            smooth = ((features @ candidate - target) ** 2).sum() / 2
            return smooth + penalty * abs(candidate).sum()

        assert value(solution[row]) == pytest.approx(value(lasso.coef_), rel=1e-5)


@pytest.mark.parametrize("scale", [0.03, 0.3, 1.0])
def test_the_solution_meets_the_optimality_conditions(objective, scale):
    """
    0 ∈ ∇f(V) + λ∂‖V‖₁. The slack is that of the gradient's own float32 products: sums
    of n terms.
    """
    penalty = scale * lambda_unit(objective)
    solution = solve(objective, penalty)
    gradient = objective.gradient(solution)
    gram = objective.quadratic.statistics.gram
    sizes = solution.abs() @ gram.abs() + objective.target.abs()
    slack = FEATURES * FLOAT32 * float(sizes.max())
    zero = solution == 0
    assert 0 < int(zero.sum()) < zero.numel()
    assert slack < 0.01 * penalty
    stationary = (gradient + penalty * solution.sign())[~zero]
    assert float(stationary.abs().max()) <= slack
    assert float(gradient[zero].abs().max()) <= penalty + slack


@pytest.mark.parametrize("penalty", [0.0, 0.7, 5.0])
def test_a_diagonal_gram_has_a_closed_form(penalty):
    """Each entry is soft-thresholded by itself: V_ij = S(W_ij·G_jj, λ) / G_jj."""
    diagonal = torch.linspace(1, 4, FEATURES)
    weight = normal(ROWS, FEATURES)
    problem = LayerObjective(weight, Quadratic(GramStatistics(torch.diag(diagonal))))
    expected = soft_threshold(weight * diagonal, penalty) / diagonal
    # the slowest entry contracts by 1 − 1/4 a step: after 200 steps by 1e-25
    solution = fista(problem, penalty, torch.zeros_like(weight), 200, 0.0).weight
    assert torch.equal(solution == 0, expected == 0)
    assert float((solution - expected).abs().max()) <= 8 * FLOAT32 * 4


def test_without_penalty_the_dense_weight_stays(objective):
    """Where X* = X, W is the minimum for λ = 0, and FISTA has nothing to do."""
    weight = normal(ROWS, FEATURES)
    problem = LayerObjective(
        weight, Quadratic(gram_statistics(inputs(TOKENS, FEATURES)))
    )
    solution = fista(problem, 0.0, weight, 20, tolerance=1e-5)
    assert solution.iterations == 1
    assert float((solution.weight - weight).norm()) < 1e-5 * float(weight.norm())


def test_a_large_penalty_prunes_everything(objective):
    penalty = float(objective.target.abs().max()) * (1 + 1e-3)
    assert not solve(objective, penalty).any()
    assert solve(objective, 0.9 * penalty).any()


def test_sparsity_grows_with_the_penalty():
    """Certain where features do not correlate (in general s(λ) may dip a little)."""
    weight = normal(ROWS, FEATURES)
    diagonal = torch.linspace(1, 4, FEATURES)
    problem = LayerObjective(weight, Quadratic(GramStatistics(torch.diag(diagonal))))
    counts = [
        int((solve(problem, 10.0**power, 500) == 0).sum())
        for power in torch.linspace(-3, 1.5, 19).tolist()
    ]
    assert counts == sorted(counts)
    assert counts[0] < 5 and counts[-1] == weight.numel()


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_bisection_finds_the_penalty_of_a_sparsity(objective, sparsity):
    """
    Theorem 1. The sparsity changes by single entries, so that one of the 144 is the
    closest one can ask for. Sixty halvings of log(M/λ₀) exhaust float64.
    """
    unit = lambda_unit(objective)
    search = LambdaBisection(1e-5, 1e2)

    def zeros(penalty: float) -> float:
        solution = fista(objective, penalty * unit, objective.weight, 300).weight
        return float((solution == 0).double().mean())

    assert zeros(search.low) <= sparsity <= zeros(search.high)
    for _ in range(60):
        reached = zeros(search.value)
        if abs(reached - sparsity) <= 1 / objective.weight.numel():
            break
        search.update(increase=reached < sparsity)
    assert abs(reached - sparsity) <= 1 / objective.weight.numel()


def test_bisection_halves_the_interval_and_stays_inside():
    search = LambdaBisection(1e-5, 1e3)
    assert search.value == 1e-5
    search.update(increase=True)
    assert search.value == pytest.approx(0.1)
    search.update(increase=True)
    assert search.value == pytest.approx(10)
    search.update(increase=False)
    assert search.value == pytest.approx(1)
    assert (search.low, search.high) == pytest.approx((0.1, 10))
    for increase in [True, False] * 50:
        search.update(increase=increase)
        assert 0.1 <= search.low <= search.value <= search.high <= 10


def spectrum(kind: str, seed: int) -> Tensor:
    """Gram matrices whose largest eigenvalues are far apart, close or equal."""
    match kind:
        case "zero":
            return torch.zeros(64, 64)
        case "identity":
            return torch.eye(64)
        case "one feature":
            return torch.full((1, 1), 3.0)
        case "cluster":  # one eigenvalue 5 % above 255 equal ones
            base = torch.linalg.qr(normal(256, 256, seed=seed)).Q
            return torch.eye(256) + 0.05 * torch.outer(base[0], base[0])
        case "random":
            tokens = normal(512, 256, seed=seed)
        case "few tokens":
            tokens = normal(16, 256, seed=seed)
        case "correlated":
            tokens = inputs(512, 128, seed=seed)
        case "outlier features":  # as in language models
            tokens = normal(512, 256, seed=seed)
            tokens[:, [7, 100]] *= 30
            tokens[:, 100] += 50
        case "common direction":
            tokens = normal(512, 256, seed=seed) + 5 * normal(1, 256, seed=seed + 1)
        case "power law":
            tokens = normal(512, 256, seed=seed) / torch.arange(1, 257) ** 0.5
    return gram_statistics(tokens).gram


@pytest.mark.parametrize(
    "kind",
    [
        "zero",
        "identity",
        "one feature",
        "cluster",
        "random",
        "few tokens",
        "correlated",
        "outlier features",
        "common direction",
        "power law",
    ],
)
def test_the_lipschitz_constant_is_the_largest_eigenvalue(kind):
    """From above, or a step is too long; closely, or all steps are too short."""
    for seed in range(4):
        gram = spectrum(kind, seed)
        features = gram.shape[0]
        largest = float(torch.linalg.eigvalsh(gram.double())[-1])
        lipschitz = Quadratic(GramStatistics(gram)).lipschitz
        assert lipschitz >= largest * (1 - features * FLOAT32)
        assert lipschitz <= 1.03 * largest


def test_no_token_leaves_the_start(objective):
    weight = normal(ROWS, FEATURES)
    problem = LayerObjective(weight, Quadratic(GramStatistics.empty(FEATURES)))
    solution = fista(problem, 1.0, weight)
    assert solution.iterations == 0
    assert torch.equal(solution.weight, weight)


@pytest.mark.parametrize("steps", [1, 7])
def test_iterations_end_at_their_number(objective, steps):
    start = torch.zeros_like(objective.weight)
    penalty = 0.1 * lambda_unit(objective)
    assert fista(objective, penalty, start, steps, 0.0).iterations == steps


def test_iterations_end_when_the_weight_stands_still(objective):
    penalty = 0.1 * lambda_unit(objective)
    tolerance = 1e-6
    first = fista(objective, penalty, objective.weight, 10**4, tolerance)
    assert 1 < first.iterations < 10**4
    again = fista(objective, penalty, solve(objective, penalty), 10**4, tolerance)
    assert again.iterations <= 2


def test_the_error_falls_as_nesterov_promises(objective):
    """F(V_k) − F* ≤ 2L‖V₀ − V*‖² / (k+1)² (Beck & Teboulle 2009, theorem 4.4)."""
    penalty = 0.03 * lambda_unit(objective)
    optimum = solve(objective, penalty)

    def value(candidate: Tensor) -> float:
        l1 = float(candidate.abs().sum(dtype=torch.float64))
        return objective.error(candidate) ** 2 / 2 + penalty * l1

    start = torch.zeros_like(optimum)
    distance = float((start - optimum).norm()) ** 2
    for steps in [1, 3, 10, 30]:
        reached = fista(objective, penalty, start, steps, 0.0).weight
        bound = 2 * objective.quadratic.lipschitz * distance / (steps + 1) ** 2
        assert value(reached) - value(optimum) <= bound
