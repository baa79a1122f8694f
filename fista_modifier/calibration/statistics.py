"""Gram matrices of one stage, from replays of its layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from compressed_tensors.offload import get_execution_device
from torch import Tensor

from fista_modifier.calibration.operators import Operator, replaced_weights
from fista_modifier.calibration.replay import (
    LayerCall,
    LayerInputs,
    inputs_of,
    real_rows,
)
from fista_modifier.calibration.stages import Stage
from fista_modifier.solver.gram import GramStatistics

__all__ = ["stage_statistics"]


def stage_statistics(
    stage: Stage,
    dense_inputs: LayerInputs,
    pruned_inputs: LayerInputs,
    pruned: dict[Operator, Tensor],
    real_tokens: Sequence[Tensor | None],
    on_batch: Callable[[], object] = lambda: None,
) -> GramStatistics:
    """
    Sum the Gram matrices of a stage over all batches, padding left out. Each batch is
    run through the layer, or the block that the stage is in, as far as the stage: with
    dense weights for X, and, where that can make a difference, with what has been
    pruned so far for X*.

    :param stage: operators that share an input
    :param dense_inputs: the layer's or block's inputs in the dense model
    :param pruned_inputs: the same for X*; the same object where they do not differ
    :param pruned: out×in weights, in the model's dtype, of the operators of the layer
        that are pruned already
    :param real_tokens: of each batch, what is not padding
    :param on_batch: called after each batch, for a progress bar
    :return: statistics on the device that executes the stage
    :raises ValueError: if an activation is NaN or infinite, naming the operators
    """
    module = stage.operators[0].module
    names = ", ".join(operator.name for operator in stage.operators)
    features = stage.operators[0].weight.shape[1]
    statistics = GramStatistics.empty(features, get_execution_device(module))
    same_inputs = not pruned and pruned_inputs is dense_inputs
    for dense_call, pruned_call, real in zip(
        dense_inputs, pruned_inputs, real_tokens, strict=True
    ):
        dense = _tokens(stage, dense_call, real)
        if same_inputs:
            statistics.accumulate(dense)
        else:
            with replaced_weights(pruned):
                partly_pruned = _tokens(stage, pruned_call, real)
            if partly_pruned.shape != dense.shape:
                raise ValueError(
                    f"{names}: {dense.shape[0]} tokens reach the operator in the dense "
                    f"layer and {partly_pruned.shape[0]} in the partly pruned one; "
                    "use error_correction: none for a layer that routes its tokens"
                )
            statistics.accumulate(partly_pruned, dense)
        on_batch()
    if not statistics.is_finite():
        raise ValueError(
            f"the input of {names} contains NaN or infinity; load the model in "
            "bfloat16 or float32, or look for broken weights in the layers before it"
        )
    return statistics


def _tokens(stage: Stage, call: LayerCall, real: Tensor | None) -> Tensor:
    """The stage's input in one batch, real tokens × features."""
    seen = inputs_of(stage.operators[0].module, call, stage.calls)
    if not seen:
        features = stage.operators[0].weight.shape[1]
        return torch.empty(0, features, device=call.hidden_states.device)
    return torch.cat([real_rows(value, real) for value in seen])
