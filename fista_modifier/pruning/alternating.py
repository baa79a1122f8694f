"""Alternating minimisation, over the tokens, of an MLP whose channels are chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from loguru import logger
from torch import Tensor

from fista_modifier.calibration.replays import Replays
from fista_modifier.channels.mlps import MLPTokens
from fista_modifier.models.operators import Operator
from fista_modifier.pruning.channels import GroupPlan
from fista_modifier.pruning.procedures import LayerTask
from fista_modifier.structured import (
    Alternation,
    PrunedChannels,
    mlp_error,
    rounded_change,
)

__all__ = ["Alternated", "alternated"]


@dataclass(frozen=True)
class Alternated:
    """
    What alternating minimisation found for an MLP.

    :param pruned: channels that stay, and the consumer's weight on them
    :param producer: the linear producer
    :param weight: new weight of the linear producer, out×in, of the old shape
    :param bias: new bias of the linear producer; None if it has no bias
    """

    pruned: PrunedChannels
    producer: Operator
    weight: Tensor
    bias: Tensor | None


def alternated(
    task: LayerTask,
    plan: GroupPlan,
    pruned: PrunedChannels,
    replays: Replays,
    calls: int,
    alternation: Alternation,
) -> Alternated | None:
    """
    Train the weights of the consumer (D) and of the linear producer (U) in turn. The
    start is the least squares solution for D. U is that of the dense model, and has its
    bias as a last column.

    :param task: the task of the layer
    :param plan: the plan of a group that has a linear producer
    :param pruned: the group's channels that stay, and the consumer's weight on them
    :param replays: the runs that show the consumer's inputs
    :param calls: how often the consumer is called in one run of the layer
    :param alternation: the steps: how many rounds, and with which damping
    :return: the weights, alike on all ranks; None if the tokens are not those of one
        MLP, or if the error in the operators' dtype did not fall
    """
    assert plan.group.linear is not None, "there is a linear producer"
    producer, consumer = plan.group.linear.operator, plan.consumer.operator
    columns = plan.consumer.indices[pruned.kept.cpu(), 0]
    tokens = MLPTokens(
        plan.group,
        pruned.kept.cpu()[columns.argsort()],
        replays,
        calls,
        task.recording.real_tokens,
        task.recording.storage,
        task.on_batch,
    )
    faults = [fault for fault in task.ranks.all(tokens.fault()) if fault]
    if faults:
        logger.warning(f"{faults[0]}: its weights are those of least squares")
        return None
    total = task.ranks.sum
    start = _rows(producer, tokens.rows)
    found = alternation(tokens, start, pruned.weight, pruned.bias, total)
    up = found.up.to(producer.weight.dtype)
    down = found.down.to(consumer.weight.dtype)
    bias = rounded_change(found.bias, consumer.module.bias)
    error = mlp_error(tokens, up.float(), down.float(), bias, total)
    if not error < found.errors[0]:
        return None
    better = replace(pruned, weight=down, bias=bias, error=error)
    return Alternated(better, producer, *_with_rows(producer, tokens.rows, up))


def _rows(operator: Operator, rows: Tensor) -> Tensor:
    """
    Return some rows of an operator's weight, with their biases as a last column if it
    has a bias.
    """
    weight, bias = operator.weight, operator.module.bias
    rows = rows.to(weight.device)
    if bias is None:
        return weight[rows]
    return torch.cat([weight[rows], bias.data[rows, None].to(weight)], 1)


def _with_rows(
    operator: Operator, rows: Tensor, values: Tensor
) -> tuple[Tensor, Tensor | None]:
    """
    Return the operator's weight and bias (None without one) with new values in some
    rows, which are laid out as :func:`_rows` returns them.
    """
    weight, bias = operator.weight.clone(), operator.module.bias
    rows = rows.to(weight.device)
    weight[rows] = values[:, : weight.shape[1]].to(weight)
    if bias is None:
        return weight, None
    changed = bias.data.clone()
    changed[rows] = values[:, -1].to(changed)
    return weight, changed
