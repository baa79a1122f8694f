"""Orders of the channels between two operators in which an n:m pattern costs least."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.channels.layers import ProbedLayer, probed_layers
from fista_modifier.channels.orders import (
    Interchangeable,
    check_order,
    interchangeable,
)
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.operators import Operator
from fista_modifier.solver import GramStatistics, NofM, SparsityPattern
from fista_modifier.solver.orders import regrouped

__all__ = ["best_order", "plan_orders"]

ROWS = 1024
"""
The most rows of a weight by which an order is chosen. In a larger weight they are
evenly spaced. Their scores take little memory beside a Gram matrix.
"""


def plan_orders(
    model: PreTrainedModel,
    layers: Sequence[DecoderLayer],
    batches: Iterable[dict[str, Any]],
    patterns: Mapping[str, SparsityPattern],
) -> dict[Operator, list[Interchangeable]]:
    """
    Find the channels that can change places before each operator. All operators that
    have such channels get n:m patterns, as another pattern might not be the same for
    rows in another order.

    :param model: the dense model
    :param layers: layers of the model, with the operators that may be changed
    :param batches: calibration data, of which a few tokens show who reads what
    :param patterns: the pattern of each operator, by the operator's name
    :return: for each operator that reads such channels, these channels
    """
    if not any(pattern.group for pattern in patterns.values()):
        return {}
    plan: dict[Operator, list[Interchangeable]] = {}
    for found, _ in probed_layers(model, layers, batches, _usable).values():
        for channels in found:
            groups = [patterns[one.name].group for one in channels.group.operators]
            group = patterns[channels.consumer.name].group
            if all(groups) and group and channels.fits(group[1]):
                plan.setdefault(channels.consumer, []).append(channels)
    return plan


def _usable(layer: ProbedLayer) -> tuple[list[Interchangeable], str]:
    known = set(layer.targets)
    found = interchangeable(layer.found)
    usable = [one for one in found if one.group.operators <= known]
    return check_order(usable, layer.calls[0]), ""


def best_order(
    channels: Interchangeable, statistics: GramStatistics, pattern: SparsityPattern
) -> Tensor:
    """
    Find the order of channels in which an n:m pattern costs least by Wanda's scores,
    squared. The score |W_ij|² G_jj is what an entry adds to the error if the features
    are uncorrelated.

    :param channels: channels before one operator
    :param statistics: sums over the operator's input
    :param pattern: an n:m pattern
    :return: long, the channel that comes to each place
    """
    assert pattern.group is not None
    device = statistics.execution_device
    weight = channels.consumer.weight
    weight = weight[:: -(-len(weight) // ROWS)].to(device, torch.float32)
    scores = weight.square() * statistics.gram.diagonal().to(device)
    order = torch.arange(channels.group.size)
    for some, columns in zip(channels.sets, channels.columns, strict=True):
        # All columns of a channel change places together.
        stacked = torch.cat([scores[:, one] for one in columns.T.to(device)])
        order[some] = some[regrouped(stacked, NofM(*pattern.group)).cpu()]
    return order
