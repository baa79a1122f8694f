"""Gram matrices of the stages of a wave, from replays of their layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from loguru import logger
from torch import Tensor

from fista_modifier.calibration.calls import LayerCall
from fista_modifier.calibration.observed import real_inputs_of
from fista_modifier.calibration.padding import RealTokens, real_rows
from fista_modifier.calibration.replays import Replays
from fista_modifier.calibration.stages import Stage
from fista_modifier.calibration.sums import check_finite, empty_statistics
from fista_modifier.distributed import ALONE, Ranks
from fista_modifier.models.operators import replaced_weights
from fista_modifier.solver.gram import GramStatistics

__all__ = ["wave_statistics"]


def wave_statistics(
    wave: Sequence[Stage],
    replays: Replays,
    real_tokens: Sequence[RealTokens],
    on_batch: Callable[[], object] = lambda: None,
    ranks: Ranks = ALONE,
    offload: bool = False,
) -> list[GramStatistics]:
    """
    Sum the Gram matrices of stages over all batches, padding left out.

    Each batch is run through the layer, or the block that the stages are in, as far as
    the stages. For X* it runs with what has been pruned so far. For X it runs with
    dense weights, where that can make a difference and the outputs do not tell as much.
    If other tokens reach an operator in the partly pruned layer, as behind a router, X*
    is X for all of these stages, and a warning says so.

    :param wave: stages none of which disturbs the input of another
    :param replays: the runs that show X and X*
    :param real_tokens: for each batch, what is not padding
    :param on_batch: called after each batch, for a progress bar
    :param ranks: the ranks that hold the other batches
    :param offload: whether to keep n×n matrices in main memory
    :return: statistics of each stage, on the device that executes it
    :raises ValueError: if an activation is NaN or infinite; the message names the
        operators
    """
    accumulate = partial(
        _accumulated, wave, real_tokens=real_tokens, on_batch=on_batch, offload=offload
    )
    problem: str | None = None
    try:
        gathered = accumulate(replays)
    except _OtherTokens as error:
        problem = str(error)
    problems = [found for found in ranks.all(problem) if found]
    if problems:
        logger.warning(f"{problems[0]}: X* = X for it and what is pruned beside it")
        gathered = accumulate(replays.of_dense())
    for stage, statistics in zip(wave, gathered, strict=True):
        _sum(statistics, ranks)
        check_finite(stage, statistics)
    return gathered


class _OtherTokens(Exception):
    """
    The exception for operators that are given other tokens in the partly pruned layer.
    """


def _accumulated(
    wave: Sequence[Stage],
    replays: Replays,
    *,
    real_tokens: Sequence[RealTokens],
    on_batch: Callable[[], object],
    offload: bool,
) -> list[GramStatistics]:
    """Return the statistics of each stage over this rank's batches."""
    gathered = [
        empty_statistics(stage.operators, offload, drifts=replays.differ)
        for stage in wave
    ]
    for batch, real in enumerate(real_tokens):
        with replaced_weights(replays.weights, replays.biases):
            partly_pruned = _tokens(wave, replays.pruned[batch], real)
        if not replays.differ:
            for statistics, tokens in zip(gathered, partly_pruned, strict=True):
                statistics.accumulate(tokens)
        elif replays.outputs is not None:
            found = real_rows(replays.outputs[batch], real.own)
            outputs = _without_bias(wave[0], found)
            _check_same_tokens(wave[0], partly_pruned[0], outputs)
            gathered[0].accumulate(partly_pruned[0], outputs=outputs)
        else:
            dense = _tokens(wave, replays.dense[batch], real)
            for stage, statistics, tokens, before in zip(
                wave, gathered, partly_pruned, dense, strict=True
            ):
                _check_same_tokens(stage, tokens, before)
                statistics.accumulate(tokens, before)
        on_batch()
    return gathered


def _sum(statistics: GramStatistics, ranks: Ranks) -> None:
    """Replace each rank's sums by those over the tokens of all ranks."""
    found = ranks.all((statistics.tokens, statistics.drift is not None))
    tokens = sum(count for count, _ in found)
    if tokens:  # a rank without tokens has fewer sums
        statistics.fill(any(drifts for _, drifts in found))
    for matrix in statistics.sums():
        ranks.sum(matrix)
    statistics.tokens = tokens


def _tokens(wave: Sequence[Stage], call: LayerCall, real: RealTokens) -> list[Tensor]:
    """Return the input of each stage in one batch, real tokens × features."""
    calls = {stage.operators[0].module: stage.calls for stage in wave}
    seen = real_inputs_of(calls, call, real)
    return [
        torch.cat(values)
        if (values := seen[stage.operators[0].module])
        else call.hidden_states.new_empty(0, stage.operators[0].shape[1])
        for stage in wave
    ]


def _without_bias(stage: Stage, outputs: Tensor) -> Tensor:
    bias = stage.operators[0].module.bias
    if bias is None:
        return outputs
    return outputs.to(bias.device).float() - bias.float()


def _check_same_tokens(stage: Stage, pruned: Tensor, dense: Tensor) -> None:
    if len(pruned) != len(dense):
        raise _OtherTokens(
            f"{stage.names}: {dense.shape[0]} tokens reach the operator in the dense "
            f"layer and {pruned.shape[0]} in the partly pruned one"
        )
