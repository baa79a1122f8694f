"""The operations of alternating minimisation for the MLPs of a layer."""

from __future__ import annotations

import math

from fista_modifier.cost.shape import LayerShape
from fista_modifier.cost.solvers import plans_of
from fista_modifier.pruning.channels import GroupPlan
from fista_modifier.pruning.corrected import CorrectedProcedure
from fista_modifier.pruning.structured import StructuredProcedure
from fista_modifier.solver.blocks import COMPUTED
from fista_modifier.structured import Alternation

__all__ = ["alternation_cost"]


def alternation_cost(
    shape: LayerShape, tokens: float, procedure: CorrectedProcedure
) -> float:
    """
    Predict the operations of the steps for D and for U of a layer's MLPs. The steps for
    U may end before their greatest number, which is taken.

    :param shape: the shape of the model's layers
    :param tokens: number of calibration tokens
    :param procedure: what is done to a layer
    :return: the operations for one layer; 0 if the procedure does not alternate
    """
    if not isinstance(procedure, StructuredProcedure) or procedure.alternation is None:
        return 0.0
    plans = plans_of(procedure)
    total = 0.0
    for _, stage in shape.solved:
        for name, rows in zip(stage.names, stage.rows, strict=True):
            plan = plans[name]
            if plan.group.linear is not None:
                each = _of_token(procedure.alternation, plan, rows)
                solved = _of_solutions(procedure.alternation, plan.keep, rows)
                total += tokens * stage.share * each + solved
    return total


def _of_token(alternation: Alternation, plan: GroupPlan, rows: int) -> float:
    """
    Return the operations for one token of an MLP.

    :param alternation: how often the weights are solved for
    :param plan: the MLP's channels
    :param rows: rows of D
    """
    assert plan.group.linear is not None, "there is a linear producer"
    rounds, steps = alternation.rounds, alternation.iterations
    up = 2 * plan.keep * plan.group.linear.operator.shape[1]
    down = 2 * plan.keep * rows
    errors = 2 + 2 * rounds
    gram = 2 * COMPUTED * plan.keep**2
    # each step applies D (U x) ∘ a and its transpose; so do the residual and its
    # gradient, and the preconditioner is one more product of the size of U
    of_round = (up + gram + down) + up + (steps + 1) * 2 * (up + down)
    passes = 1 + errors + rounds * (steps + 3)
    before = sum(2 * math.prod(one.shape) for one, _ in plan.group.producers)
    return errors * (up + down) + rounds * of_round + passes * before


def _of_solutions(alternation: Alternation, keep: int, rows: int) -> float:
    """Return the operations of the least squares solutions for D."""
    return alternation.rounds * (keep**3 / 3 + 4 * rows * keep**2)
