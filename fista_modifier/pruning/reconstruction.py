"""The training of all kept weights of a decoder layer whose operators are pruned."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from fista_modifier.calibration.calls import LayerInputs
from fista_modifier.calibration.pieces import Piece
from fista_modifier.calibration.recording import Recording
from fista_modifier.models.operators import (
    UNCHANGED,
    Operator,
    replaced_weights,
    trainable,
)
from fista_modifier.pruning.kept_weights import KeptWeights, Watch
from fista_modifier.pruning.layer_error import LayerError
from fista_modifier.pruning.procedures import LayerTask
from fista_modifier.pruning.results import ReconstructionResult
from fista_modifier.solver.precision import matmul_precision

__all__ = [
    "MEASURED_EVERY",
    "STEP_TOKENS",
    "Reconstruction",
    "reconstruct",
    "reconstruct_on_first_rank",
]

MEASURED_EVERY = 16
STEP_TOKENS = 512
"""The tokens of a step of Adam, where sequences can be cut."""
MOST_RATES = 7
"""The rates that are tried for a layer, each half of the one before."""


@dataclass(frozen=True)
class Reconstruction:
    """
    How the kept weights of a layer are trained.

    :param epochs: passes over the calibration tokens; may be a fraction. 0 means no
        training
    :param rate: the highest learning rate to try, as a share of an operator's mean kept
        |W_ij|
    """

    epochs: float = 1.0
    rate: float = 0.01


def reconstruct_on_first_rank(
    pruned: dict[Operator, Tensor],
    task: LayerTask,
    options: Reconstruction,
    biases: Mapping[Operator, Tensor] = UNCHANGED,
) -> tuple[dict[Operator, Tensor], ReconstructionResult]:
    """
    Train the kept weights of a layer on the batches of all ranks. Rank 0 does this
    alone, because each step follows the one before.

    :param pruned: out×in weight of each operator, in the dtype of the module
    :param task: the task of the layer, whose recording has the dense layer's outputs
    :param options: how long and how fast to train
    :param biases: biases of operators that have got another bias; they stay as they are
    :return: the new weights, on all ranks, and what became of the layer
    """
    whole, inputs = _collected(task)

    def train() -> tuple[list[Tensor], ReconstructionResult] | None:
        if task.ranks.rank:
            return None
        weights, outcome = reconstruct(
            whole, inputs, pruned, options, task.on_batch, biases
        )
        return [weights[operator].cpu() for operator in pruned], outcome

    trained = task.ranks.each(train)[0]
    assert trained is not None  # Rank 0 has it.
    weights, outcome = trained
    return {
        operator: weight.to(pruned[operator])
        for operator, weight in zip(pruned, weights, strict=True)
    }, outcome


def _collected(task: LayerTask) -> tuple[Recording, LayerInputs]:
    """
    Return the recordings of all ranks and the inputs of the pruned layer, on rank 0.
    Other ranks get their own.
    """
    whole = task.recording.gathered(task.ranks, 0)
    if task.pruned_inputs is None:
        return whole, whole.inputs
    return whole, task.pruned_inputs.gathered(task.ranks, 0)


def reconstruct(
    recording: Recording,
    inputs: LayerInputs,
    pruned: dict[Operator, Tensor],
    options: Reconstruction,
    on_batch: Callable[[], object] = lambda: None,
    biases: Mapping[Operator, Tensor] = UNCHANGED,
) -> tuple[dict[Operator, Tensor], ReconstructionResult]:
    """
    Train the kept weights of all operators of a layer towards the dense layer's output:

        min Σ_t ‖o*_t − o_t‖² / ‖o_t‖²   over the non-zero entries of the layer's W*,

    t running over the tokens, and ‖x‖² = Σ_d x_d² / s_d, where s_d is the share of
    feature d in the sum of squares of a token's output, as a mean over the tokens. The
    solver of one operator cannot know which part of its error another operator can make
    up for, and which part is small beside the residual stream. Errors are relative to
    each token's output and to each feature's size, because a few tokens and a few
    features with massive activations make up almost all of a plain sum of squares.
    Zeros stay exactly zero, and biases and norms as they are.

    Adam has a short warm-up and a cosine decay. It takes one step for each 512 tokens
    of a sequence, or for several short sequences of a batch together, in an order that
    their number fixes. A part of a sequence is a sequence of its own, and its target is
    the dense layer's output for that part alone: see
    :func:`~fista_modifier.calibration.pieces.pieces_of`. How high a rate a layer bears
    differs fourfold between models. So the errors in the first half, each before its
    step, are compared with those at the start. Where eight together have risen by more
    than 2 % (root mean square), the training starts anew at half the rate.

    Weights and moments are float32 whatever the model's dtype. The factors of products
    in the steps are rounded to bfloat16 (on a GPU to TensorFloat-32) where that is
    faster. This adds noise of 0.2 % to the gradient of a step. If the layer's error
    does not fall (it is measured on every sixteenth batch), the weights are returned as
    they came. The training takes 16 bytes for each kept weight (itself, Adam's two
    moments and its place), a copy of the layer's operators in their own dtype, the
    largest operator's gradient and the activations of one piece.

    :param recording: the recording of the dense layer, with its outputs
    :param inputs: what the pruned layer is called with
    :param pruned: out×in weight of each operator, in the dtype of the module
    :param options: how long and how fast to train
    :param on_batch: called after each step, for a progress bar
    :param biases: biases of operators that have got another bias; they stay as they are
    :return: the new weights, in the same dtypes, and what became of the layer
    """
    started = time.perf_counter()
    layer = LayerError(recording, inputs, pruned, biases)
    measured = range(len(layer))[::MEASURED_EVERY]
    pieces = layer.pieces(STEP_TOKENS)
    steps = math.ceil(options.epochs * len(pieces))
    current = {
        operator: weight.clone(memory_format=torch.contiguous_format)
        for operator, weight in pruned.items()
    }
    with replaced_weights(current, biases), trainable(layer.layer, current):
        start_error = layer.root_mean(measured)
        rate = _train(layer, pieces, current, pruned, options.rate, steps, on_batch)
    error, operator_errors = layer.with_operators(current, measured)
    if not error < start_error:
        current, steps = pruned, 0
        error, operator_errors = layer.with_operators(current, measured)
    result = ReconstructionResult(
        start_error=start_error,
        error=error,
        operator_errors=operator_errors,
        steps=steps,
        rate=rate,
        seconds=time.perf_counter() - started,
    )
    return current, result


def _train(
    layer: LayerError,
    pieces: Sequence[Piece],
    current: dict[Operator, Tensor],
    pruned: Mapping[Operator, Tensor],
    rate: float,
    steps: int,
    on_batch: Callable[[], object],
) -> float:
    """
    Train weights at the highest rate that the layer bears.

    :param layer: the error of the layer, which has the current weights
    :param pieces: what a step is taken for
    :param current: the weights, updated in place
    :param pruned: the weights that they are at the start
    :param rate: the highest rate to try
    :param steps: number of steps
    :param on_batch: called after each step
    :return: the rate of the last training that was tried
    """

    def start_error_of(piece: Piece) -> Tensor:
        target = layer.target_of(piece)
        with replaced_weights(pruned, layer.biases), matmul_precision("bf16"):
            return layer.of_piece(piece, target).sum()

    def descend(piece: Piece) -> Tensor:
        target = layer.target_of(piece)
        with torch.enable_grad(), matmul_precision("bf16"):
            loss = layer.of_piece(piece, target).sum()
            # In float16, gradients of a smaller multiple would underflow.
            torch.autograd.backward(loss * layer.features)
        on_batch()
        return loss.detach()

    for tried in [rate * 0.5**halvings for halvings in range(MOST_RATES)]:
        order = _shuffled(pieces)
        watch = Watch(start_error_of, steps)
        # not bound to a name, so that only one training is in memory at a time
        if KeptWeights(current, tried, steps).train(
            descend, islice(order, steps), watch
        ):
            break
        for operator, weight in pruned.items():
            current[operator].copy_(weight)
    return tried


def _shuffled(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Yield the pieces of one epoch after the other, each in an order of its own."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for index in torch.randperm(len(pieces), generator=generator).tolist():
            yield pieces[index]
