from dataclasses import replace

import pytest
import torch
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
from llmcompressor.modifiers.pruning.wanda import wanda_sparsify
from problems import error_slack, gram_statistics, inputs, normal, true_error
from torch import Tensor

from fista_modifier.solver import (
    FAST,
    PAPER,
    GramStatistics,
    NofM,
    SolverOptions,
    SparsityPattern,
    Unstructured,
    prune_weight,
)
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.patterns import project
from fista_modifier.solver.quadratic import Quadratic
from fista_modifier.solver.support import fill_support, refit_
from fista_modifier.solver.warm_start import warm_start

TOKENS, FEATURES, ROWS = 96, 32, 12
STARTS = ["dense", "magnitude", "wanda", "sparsegpt"]
PRESETS = {"paper": PAPER, "default": SolverOptions(), "fast": FAST}
OPTIONS = {
    f"{name}-{start}": replace(preset, start=start)
    for name, preset in PRESETS.items()
    for start in [*STARTS, "admm"]
}
PATTERNS = [Unstructured(0.5), Unstructured(0.77), NofM(2, 4), NofM(1, 4), NofM(4, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    """X* and X, transposed."""
    pruned = inputs(TOKENS, FEATURES)
    return pruned, pruned + 0.2 * inputs(TOKENS, FEATURES, seed=5)


def has_exactly(weight: Tensor, pattern: SparsityPattern) -> bool:
    """Whether not one entry more is zero than the pattern asks for."""
    if isinstance(pattern, NofM):
        groups = weight.reshape(weight.shape[0], -1, pattern.m)
        return bool(((groups != 0).sum(-1) == pattern.n).all())
    return int((weight == 0).sum()) == round(pattern.sparsity * weight.numel())


def rounded_start(
    kind, weight: Tensor, statistics: GramStatistics, pattern: SparsityPattern
) -> Tensor:
    """The warm start as it would be stored."""
    start = weight.float()
    if kind != "dense":
        start = warm_start(kind, start, statistics.gram, pattern)
    return project(start, pattern).to(weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_result_is_never_worse_than_its_start(tokens, options, pattern, dtype):
    """By the outputs' error in float64, of the weight as it would be stored."""
    pruned, dense = tokens
    weight = normal(ROWS, FEATURES).to(dtype)
    solution = prune_weight(weight, gram_statistics(pruned, dense), pattern, options)
    error = true_error(solution.weight, weight, pruned, dense)
    slack = error_slack(weight, pruned)
    assert solution.error**2 == pytest.approx(error**2, abs=slack)
    assert error**2 <= solution.start_error**2 + slack
    assert solution.weight.dtype == dtype
    assert has_exactly(solution.weight, pattern)
    bests = [solution.start_error] + [trial.best_error for trial in solution.trials]
    assert bests == sorted(bests, reverse=True)
    lowest = min([solution.start_error] + [trial.error for trial in solution.trials])
    # with refit, the refitted warm start may be better than all of them
    assert bests[-1] <= lowest if options.refit else bests[-1] == lowest
    assert solution.error**2 <= bests[-1] ** 2 + slack


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("start", STARTS)
def test_the_papers_start_is_the_rounded_warm_start(tokens, start, pattern, dtype):
    pruned, dense = tokens
    weight, statistics = normal(ROWS, FEATURES).to(dtype), gram_statistics(*tokens)
    options = replace(PAPER, start=start)
    solution = prune_weight(weight, statistics, pattern, options)
    before = rounded_start(start, weight, statistics, pattern)
    expected = true_error(before, weight, pruned, dense)
    slack = error_slack(weight, pruned)
    assert solution.start_error**2 == pytest.approx(expected**2, abs=slack)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("start", ["dense", "magnitude", "wanda"])
def test_fista_improves_on_starts_that_only_select(tokens, start, pattern):
    """Features correlate, so that what is kept can make up for what is pruned."""
    weight, statistics = normal(ROWS, FEATURES), gram_statistics(*tokens)
    options = replace(PAPER, start=start)
    solution = prune_weight(weight, statistics, pattern, options)
    assert solution.error < 0.99 * solution.start_error
    output = true_error(torch.zeros_like(weight), weight, *tokens)
    assert solution.relative_error == pytest.approx(solution.error / output, rel=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("preset", ["default", "fast"])
def test_a_feature_of_great_power_hardly_changes_the_result(tokens, preset, pattern):
    """The same operator, but for the unit of its first input and of weights on it."""
    unit = torch.ones(FEATURES)
    unit[0] = 100
    weight, errors = normal(ROWS, FEATURES), []
    for scale in (torch.ones(FEATURES), unit):
        statistics = gram_statistics(*(one * scale for one in tokens))
        solution = prune_weight(weight / scale, statistics, pattern, PRESETS[preset])
        errors.append(solution.error)
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_nothing_to_prune_leaves_the_dense_weight():
    weight, pruned = normal(ROWS, FEATURES), inputs(TOKENS, FEATURES)
    for pattern in [Unstructured(0.0), NofM(4, 4)]:
        options = replace(PAPER, start="magnitude")
        solution = prune_weight(weight, gram_statistics(pruned), pattern, options)
        assert torch.equal(solution.weight, weight)
        assert solution.error == 0


def test_the_weight_given_and_its_statistics_stay_as_they_are(tokens):
    weight, statistics = normal(ROWS, FEATURES), gram_statistics(*tokens)
    for options in OPTIONS.values():
        prune_weight(weight, statistics, NofM(2, 4), options)
    assert torch.equal(weight, normal(ROWS, FEATURES))
    assert torch.equal(statistics.gram, gram_statistics(*tokens).gram)


def test_a_width_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="divisible by 3, got 32"):
        prune_weight(normal(ROWS, FEATURES), GramStatistics.empty(FEATURES), NofM(2, 3))


def test_the_search_ends_after_patience_rounds_without_improvement(tokens):
    weight, statistics = normal(ROWS, FEATURES), gram_statistics(*tokens)
    for patience in [1, 2, 4]:
        options = replace(PAPER, patience=patience, epsilon=0.0, start="magnitude")
        solution = prune_weight(weight, statistics, Unstructured(0.5), options)
        bests = [solution.start_error] + [t.best_error for t in solution.trials]
        stood_still = [a == b for a, b in zip(bests, bests[1:], strict=False)]
        assert all(stood_still[-patience:])
        runs = "".join("s" if still else "m" for still in stood_still)
        assert max(map(len, runs.split("m"))) == patience


def test_the_search_ends_at_last(tokens):
    weight, statistics = normal(ROWS, FEATURES), gram_statistics(*tokens)
    options = replace(PAPER, patience=10**6, epsilon=0.0, max_iterations=1)
    solution = prune_weight(weight, statistics, Unstructured(0.5), options)
    assert len(solution.trials) == 100


def test_an_improvement_below_epsilon_ends_the_search(tokens):
    weight, statistics = normal(ROWS, FEATURES), gram_statistics(*tokens)
    options = replace(PAPER, epsilon=0.9, start="magnitude")
    solution = prune_weight(weight, statistics, Unstructured(0.5), options)
    first = next(t for t in solution.trials if t.error < solution.start_error)
    assert solution.trials[-1] is first


def test_all_penalties_lie_in_the_interval_asked_for(tokens):
    weight, statistics = normal(ROWS, FEATURES), gram_statistics(*tokens)
    options = replace(PAPER, lambda_init=1e-3, lambda_max=1e-1)
    solution = prune_weight(weight, statistics, Unstructured(0.5), options)
    assert solution.trials[0].penalty == 1e-3
    assert all(1e-3 <= trial.penalty <= 1e-1 for trial in solution.trials)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("data", ["few tokens", "one token", "dead features"])
def test_poor_data_break_nothing(data, options, pattern):
    pruned = inputs({"few tokens": 9, "one token": 1}.get(data, TOKENS), FEATURES)
    if data == "dead features":
        pruned[:, ::3] = 0
    weight, statistics = normal(ROWS, FEATURES), gram_statistics(pruned)
    solution = prune_weight(weight, statistics, pattern, options)
    error = true_error(solution.weight, weight, pruned)
    assert error**2 <= solution.start_error**2 + error_slack(weight, pruned)
    assert has_exactly(solution.weight, pattern)
    assert bool(solution.weight.isfinite().all())


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_without_data_what_is_kept_stays_dense(options, pattern):
    weight, statistics = normal(ROWS, FEATURES), GramStatistics.empty(FEATURES)
    solution = prune_weight(weight, statistics, pattern, options)
    kept = solution.weight != 0
    assert has_exactly(solution.weight, pattern)
    # 40 steps of ADMM may round twice each
    rtol = 80 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(solution.weight[kept], weight[kept], rtol=rtol, atol=0.0)
    assert solution.error == solution.relative_error == 0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_operator_of_zeros_stays_zero(tokens, options):
    weight, statistics = torch.zeros(ROWS, FEATURES), gram_statistics(*tokens)
    solution = prune_weight(weight, statistics, NofM(2, 4), options)
    assert not solution.weight.any()
    assert solution.relative_error == 0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_identical_features_break_nothing(options):
    """SparseGPT's Cholesky and conjugate gradients both meet a singular matrix."""
    pruned = inputs(TOKENS, FEATURES)
    pruned[:, 1::2] = pruned[:, ::2]
    weight, pattern = normal(ROWS, FEATURES), NofM(2, 4)
    solution = prune_weight(weight, gram_statistics(pruned), pattern, options)
    error = true_error(solution.weight, weight, pruned)
    assert has_exactly(solution.weight, pattern)
    assert solution.error**2 == pytest.approx(error**2, abs=error_slack(weight, pruned))
    assert solution.error <= solution.start_error


def least_squares(
    weight: Tensor, free: Tensor, fixed: Tensor, pruned: Tensor, dense: Tensor
) -> Tensor:
    """The best values at ``free``, each row by itself, in float64."""
    solution = fixed.double().clone()
    features, outputs = pruned.double(), dense.double() @ weight.double().T
    for row, chosen in enumerate(free):
        rest = outputs[:, row] - features[:, ~chosen] @ solution[row, ~chosen]
        solution[row, chosen] = torch.linalg.lstsq(features[:, chosen], rest).solution
    return solution


@pytest.mark.parametrize("others", ["zero", "dense"])
def test_refit_is_least_squares_on_the_support(tokens, others):
    """
    Conjugate gradients end within n = 32 steps in exact arithmetic; with rounding
    it takes some more.
    """
    pruned, dense = tokens
    weight = normal(ROWS, FEATURES)
    free = weight.abs() > 0.7
    start = torch.where(free, weight, 0) if others == "zero" else weight
    objective = LayerObjective(weight, Quadratic(gram_statistics(pruned, dense)))
    expected = least_squares(weight, free, start, pruned, dense)
    solution = refit_(objective, start.clone(), free, iterations=2 * FEATURES)
    assert torch.equal(solution[~free], start[~free])
    condition = float(torch.linalg.cond(objective.quadratic.statistics.gram.double()))
    tolerance = condition * torch.finfo(torch.float32).eps
    assert tolerance < 0.01
    assert float((solution - expected).norm()) <= tolerance * float(expected.norm())


def test_refit_lowers_the_error_of_every_row_at_every_step(tokens):
    pruned, dense = tokens
    weight = normal(ROWS, FEATURES)
    free = weight.abs() > 0.7
    start = torch.where(free, weight, 0)
    objective = LayerObjective(weight, Quadratic(gram_statistics(pruned, dense)))

    def row_errors(candidate: Tensor) -> Tensor:
        return (candidate @ pruned.T - weight @ dense.T).norm(dim=1)

    errors = [
        row_errors(refit_(objective, start.clone(), free, iterations=steps))
        for steps in range(6)
    ]
    assert torch.equal(refit_(objective, start.clone(), free, iterations=0), start)
    for before, after in zip(errors, errors[1:], strict=False):
        assert bool((after < before).all())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dead", [[], [0, 5, 6, 7]])
def test_fill_support_uses_what_the_pattern_allows(tokens, pattern, dead):
    pruned, dense = (each.clone() for each in tokens)
    pruned[:, dead] = dense[:, dead] = 0
    weight = normal(ROWS, FEATURES)
    sparser = torch.where(NofM(1, 8).support(weight.abs()), weight, 0)
    objective = LayerObjective(weight, Quadratic(gram_statistics(pruned, dense)))
    filled = fill_support(objective, sparser, pattern)
    assert has_exactly(filled, pattern)
    kept = sparser != 0
    assert torch.equal(filled[kept], sparser[kept])
    before = true_error(sparser, weight, pruned, dense)
    assert true_error(filled, weight, pruned, dense) < before


def test_fill_support_of_a_full_weight_changes_nothing(tokens):
    weight, pattern = normal(ROWS, FEATURES), NofM(2, 4)
    objective = LayerObjective(weight, Quadratic(gram_statistics(*tokens)))
    full = project(weight, pattern)
    assert torch.equal(fill_support(objective, full, pattern), full)


@pytest.mark.parametrize("n, pruned_of_4", [(1, 3), (2, 2), (3, 1)])
@pytest.mark.parametrize("block_size", [128, 8, 6])
def test_sparsegpt_starts_from_the_toolkits_result(tokens, n, pruned_of_4, block_size):
    """The toolkit averages its Hessian; neither that nor a factor changes anything."""
    pruned, _ = tokens
    module = torch.nn.Linear(FEATURES, ROWS, bias=False)
    module.weight.data = normal(ROWS, FEATURES)
    hessian = sgpt_sparsify.make_empty_hessian(module)
    hessian, _ = sgpt_sparsify.accumulate_hessian(pruned, module, hessian, 0)
    with torch.no_grad():
        _, expected = sgpt_sparsify.sparsify_weight(
            module=module,
            hessians_dict={module: hessian},
            sparsity=pruned_of_4 / 4,
            prune_n=pruned_of_4,
            prune_m=4,
            # a block that cuts a group of four is rounded down to whole groups
            block_size=block_size // 4 * 4,
            dampening_frac=0.01,
            preserve_sparsity_mask=False,
        )
    actual = warm_start(
        "sparsegpt",
        normal(ROWS, FEATURES),
        gram_statistics(pruned).gram,
        NofM(n, 4),
        block_size=block_size,
    )
    assert torch.equal(actual == 0, expected == 0)
    torch.testing.assert_close(actual, expected.data, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n, pruned_of_4", [(1, 3), (2, 2), (3, 1)])
def test_wanda_starts_from_the_toolkits_result(tokens, n, pruned_of_4):
    pruned, _ = tokens
    module = torch.nn.Linear(FEATURES, ROWS, bias=False)
    module.weight.data = normal(ROWS, FEATURES)
    scalars = wanda_sparsify.make_empty_row_scalars(module)
    scalars, _ = wanda_sparsify.accumulate_row_scalars(pruned, module, scalars, 0)
    expected = wanda_sparsify.sparsify_weight(
        module=module,
        row_scalars_dict={module: scalars},
        sparsity=pruned_of_4 / 4,
        prune_n=pruned_of_4,
        prune_m=4,
    )
    gram = gram_statistics(pruned).gram
    actual = warm_start("wanda", normal(ROWS, FEATURES), gram, NofM(n, 4))
    assert torch.equal(actual, expected)
