"""
The operations of a solver for the operators of a stage, and its entries on the device.

A "product" here is one of an m×n weight and an n×n matrix. It takes 2 m n² operations.
"""

from __future__ import annotations

from dataclasses import dataclass

from fista_modifier.cost.shape import StageShape
from fista_modifier.pruning.channels import GroupPlan
from fista_modifier.pruning.corrected import CorrectedProcedure
from fista_modifier.pruning.sparse import SparseProcedure
from fista_modifier.pruning.structured import StructuredProcedure
from fista_modifier.solver import SolverOptions
from fista_modifier.solver.blocks import BLOCK, ENTRIES
from fista_modifier.solver.quadratic import LANCZOS_STEPS
from fista_modifier.structured import (
    FASPScore,
    Fluctuation,
    GreedyElimination,
    LeastSquares,
    LocalSearch,
    Magnitude,
    PenaltyMethod,
    Selector,
)

__all__ = ["Work", "entries_of", "plans_of", "work_of"]

ERRORS, ERRORS_OF_A_TRIAL, REFIT_STEPS = 5, 3, 2
"""
The numbers of products with an n×n matrix for the errors and gradients of an operator,
for those of each trial of λ, and for the steps of a refit. A refit may take 20 steps,
but mostly takes two.
"""
ERRORS_OF_CHANNELS = 3
"""
The products that errors take for an operator that loses channels. They are for the norm
of the output, the error without restoration and the error with it.
"""
REFITS_OF_A_ROUND = 2
"""
The refits in a round of the penalty method. One finds the weights, and one judges the
step.
"""


@dataclass(frozen=True)
class Work:
    """
    The operations of a solver for the operators of a stage.

    :param search: operations that find the support, or the channels that stay
    :param refits: operations that find the weights on them, and the errors
    """

    search: float
    refits: float


def work_of(stage: StageShape, procedure: CorrectedProcedure) -> Work:
    """
    Estimate the operations of the solver for a stage. Iterations end when they have
    converged. Where their number is not known before the run, the greatest is taken.

    :param stage: the stage, with only those of its operators that are pruned
    :param procedure: what is done to a layer
    :return: the operations of its solver
    :raises TypeError: if the solver or the selector is not one of this package
    """
    if isinstance(procedure, StructuredProcedure):
        return _work_on_channels(stage, procedure)
    options = _options(procedure)
    return Work(_search(stage, options), _refits(stage, options))


def entries_of(
    stage: StageShape, procedure: CorrectedProcedure, sums: float, offload: bool
) -> float:
    """
    Estimate what the solver holds on the device for a stage.

    :param stage: the stage, with only those of its operators that are pruned
    :param procedure: what is done to a layer
    :param sums: entries of the stage's sums
    :param offload: whether n×n matrices wait in main memory
    :return: entries of all that the solver holds for the widest operator of the stage,
        beside these sums
    """
    if isinstance(procedure, StructuredProcedure):
        return _entries_of_channels(stage, procedure)
    return _entries(stage, sums, offload)


def _options(procedure: CorrectedProcedure) -> SolverOptions:
    if isinstance(procedure, SparseProcedure):
        return procedure.options
    raise TypeError(f"the cost of {type(procedure).__name__} is not known")


def _product(stage: StageShape) -> float:
    """Return the operations of one product for all operators of a stage."""
    return 2 * stage.weights * stage.columns


def _search(stage: StageShape, options: SolverOptions) -> float:
    products = options.max_iterations * options.patience
    if options.start == "admm":
        products += options.admm_steps
    return products * _product(stage)


def _refits(stage: StageShape, options: SolverOptions) -> float:
    products = ERRORS + ERRORS_OF_A_TRIAL * options.patience
    if options.refit:
        products += REFIT_STEPS * (1 + min(options.patience, 1))
    inverse = stage.columns**3 if options.start == "admm" else 0
    lanczos = LANCZOS_STEPS * 2 * stage.columns**2 if options.patience else 0
    return products * _product(stage) + inverse + lanczos


def _work_on_channels(stage: StageShape, procedure: StructuredProcedure) -> Work:
    plans = plans_of(procedure)
    restores = isinstance(procedure.restorer, LeastSquares)
    search = refits = 0.0
    for name, rows in zip(stage.names, stage.rows, strict=True):
        plan = plans[name]
        search += _choice(procedure.selector, plan, rows, stage.columns)
        refits += ERRORS_OF_CHANNELS * 2 * rows * stage.columns**2
        if restores:  # finds the target, and factorises on the columns that stay
            kept = plan.keep * plan.consumer.indices.shape[1]
            refits += 2 * rows * stage.columns**2 + _solve(rows, kept)
    return Work(search, refits)


def _choice(selector: Selector, plan: GroupPlan, rows: int, columns: int) -> float:
    """
    Return the operations that choose the channels of one consumer. Scores are computed
    elementwise, so they add nothing here.

    :raises TypeError: if the selector is not one of this package
    """
    size = plan.consumer.indices.shape[1]
    # a pivot changes the table of n×n and m×n by a product of rank r
    pivot = 2 * size * columns * (columns + rows)
    table = columns**3 + 2 * columns**2 * (columns + rows)
    match selector:
        case PenaltyMethod():
            refit = _solve(rows, columns) + 2 * rows * columns**2
            return REFITS_OF_A_ROUND * selector.max_rounds * refit
        case GreedyElimination():
            return table + (plan.group.size - plan.keep) * pivot
        case LocalSearch():
            removed = (plan.group.size - plan.keep) * size
            trial = 2 * rows * size * removed
            swap = selector.candidates * trial + 2 * pivot
            start = _choice(selector.start, plan, rows, columns)
            return start + table + selector.max_swaps * swap
        case FASPScore() | Fluctuation() | Magnitude():
            return 0.0
    raise TypeError(f"the cost of {type(selector).__name__} is not known")


def _solve(rows: int, columns: int) -> float:
    """
    Return the operations of a least squares solution: the Cholesky factor of an n×n
    matrix, and two triangular solutions for each row.
    """
    return columns**3 / 3 + 2 * rows * columns**2


def plans_of(procedure: StructuredProcedure) -> dict[str, GroupPlan]:
    """
    Return the plans of groups.

    :param procedure: what is done to a layer
    :return: the plans, by the names of the consumers inside their layer
    """
    return {
        plan.consumer.operator.name.removeprefix(f"{layer}."): plan
        for layer, plans in procedure.plan.groups.items()
        for plan in plans
    }


def _entries(stage: StageShape, sums: float, offload: bool) -> float:
    weight = max(stage.rows) * stage.columns
    block = min(weight, ENTRIES)
    # The search holds W, its target, the best weight and a candidate with their
    # supports, and what an iteration, an error or a cast takes.
    searching = 4.5 * weight + max(5 * block, 2 * weight)
    if offload:  # only a block of G is on the device
        return searching + stage.columns * min(stage.columns, BLOCK)
    square = stage.columns**2
    # ADMM holds W, its target, what it iterates, and what a step or a support takes.
    starting = square + 4 * weight + max(2 * block, 0.75 * weight)
    if len(stage.rows) > 1:  # the inverse waits for the next operator
        searching += square
    scaling = sums + stage.narrow * weight
    return max(scaling, 2 * square, starting, searching)


def _entries_of_channels(stage: StageShape, procedure: StructuredProcedure) -> float:
    """
    Return the entries on the device while the channels of a stage's operators are
    chosen. Sums that wait in main memory come to the device as whole matrices.
    """
    weight = max(stage.rows) * stage.columns
    square = stage.columns**2
    match procedure.selector:
        case PenaltyMethod():  # G in the order of channels, scaled, and its factor
            matrices = 3 * square
        case GreedyElimination() | LocalSearch():  # the table, its change, an inverse
            matrices = 3 * square + 2 * weight
        case FASPScore() | Fluctuation() | Magnitude():
            # G on the columns that stay, and its factor
            matrices = 2 * square
        case _:
            unknown = type(procedure.selector).__name__
            raise TypeError(f"the memory of {unknown} is not known")
    # There are also W, its target, a candidate, its difference from W, and the product
    # of the difference with G.
    return matrices + 5 * weight
