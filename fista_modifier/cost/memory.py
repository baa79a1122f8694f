"""The memory that a run takes, on the device and in main memory."""

from __future__ import annotations

import math

from fista_modifier.cost.shape import LayerShape, StageShape
from fista_modifier.cost.solvers import entries_of
from fista_modifier.pruning.corrected import CorrectedProcedure, ErrorCorrection
from fista_modifier.pruning.reconstruction import STEP_TOKENS

__all__ = [
    "KEPT",
    "peak_device_memory",
    "peak_host_memory",
    "reconstruction_memory",
    "recorded_memory",
]

FLOAT32 = 4
KEPT = 0.5
"""
The share of the weights that pruning leaves. It is assumed where nothing else is known.
"""
ROOM = 0.8
"""
The share of a device's memory that a recovery by default may be predicted to take. The
rest is for activations and logits, which are not predicted.
"""
ACTIVATION = 5
"""
The bytes that a training step keeps for each token and each in and out feature of an
operator. On layers of a small LLaMA they were measured as 5.1 in float32 and 4.7 in
bfloat16.
"""


def peak_device_memory(
    shape: LayerShape,
    procedure: CorrectedProcedure,
    weight_bytes: int = 2,
    *,
    offload_hessians: bool = False,
    kept: float = KEPT,
) -> float:
    """
    Predict the peak of memory on the device. It is one layer and its pruned copy, and
    the larger of two: the most that a stage needs while it is solved, beside the sums
    of the other stages of its wave, or what the reconstruction of the layer needs with
    batches of one sequence.

    :param shape: the shape of the model's layers
    :param procedure: what is done to a layer
    :param weight_bytes: bytes of a stored weight
    :param offload_hessians: the modifier's field
    :param kept: share of the weights that pruning leaves
    :return: bytes
    """
    correction = procedure.error_correction
    solved = [stage for _, stage in shape.solved]
    entries = []
    for wave in {stage.wave for stage in solved}:
        stages = [stage for stage in solved if stage.wave == wave]
        sums = [_sums(shape, stage, correction, offload_hessians) for stage in stages]
        solver = max(
            entries_of(stage, procedure, own, offload_hessians)
            for stage, own in zip(stages, sums, strict=True)
        )
        entries.append(math.fsum(sums) + solver)
    most = FLOAT32 * max(entries, default=0.0)
    if procedure.reconstructs:
        most = max(most, reconstruction_memory(shape, weight_bytes, kept))
    return 2 * weight_bytes * shape.weights + most


def _sums(
    shape: LayerShape, stage: StageShape, correction: ErrorCorrection, offload: bool
) -> float:
    """Return the entries on the device of a stage's G and sums of the drift."""
    square = 0 if offload else stage.columns**2
    if not shape.drifts(stage, correction):
        return square
    return square + (stage.weights if stage.narrow else 2 * square)


def reconstruction_memory(
    shape: LayerShape, weight_bytes: int = 2, kept: float = KEPT
) -> float:
    """
    Predict the memory on the device for the reconstruction of a layer. It holds the
    weights in their own dtype, the kept ones in float32, Adam's two moments of these
    and their places; the largest gradient, once whole and once for the kept weights,
    with their places in 64 bits and their new values; and the activations of a
    piece of a sequence.

    :param shape: the shape of the model's layers
    :param weight_bytes: bytes of a stored weight
    :param kept: share of the weights that pruning leaves
    :return: bytes
    """
    trained = (weight_bytes + 4 * FLOAT32 * kept) * shape.weights
    largest = max(max(stage.rows) * stage.columns for stage in shape.stages)
    features = math.fsum(
        stage.share * (len(stage.rows) * stage.columns + sum(stage.rows))
        for stage in shape.stages
    )
    gradient = (weight_bytes + (weight_bytes + 3 * FLOAT32) * kept) * largest
    return trained + gradient + ACTIVATION * features * min(shape.seq_len, STEP_TOKENS)


def recorded_memory(
    shape: LayerShape,
    samples: int,
    procedure: CorrectedProcedure,
    activation_bytes: int = 2,
) -> float:
    """
    Predict the size of the hidden states and masks that wait in main memory, or on
    disk.

    :param shape: the shape of the model's layers
    :param samples: number of calibration sequences
    :param procedure: what is done to a layer
    :param activation_bytes: bytes of a recorded activation
    :return: bytes
    """
    blocks = len({stage.block for stage in shape.stages})
    # There are the pipeline's states, the layer's inputs and outputs, what the blocks
    # that are not done yet return and are called with, and the pruned inputs of the
    # block at work.
    states = 3 + 2 * blocks - 1 + procedure.chains_layers
    masks = 2  # the pipeline's and the layer's, full ones as for eager attention
    features = states * shape.hidden + masks * shape.seq_len
    return samples * shape.seq_len * features * activation_bytes


def peak_host_memory(
    shape: LayerShape,
    samples: int,
    procedure: CorrectedProcedure,
    weight_bytes: int = 2,
) -> float:
    """
    Predict the peak of main memory, which holds the model and what is recorded.

    :param shape: the shape of the model's layers
    :param samples: number of calibration sequences
    :param procedure: what is done to a layer
    :param weight_bytes: bytes of a stored weight or activation
    :return: bytes
    """
    recorded = recorded_memory(shape, samples, procedure, weight_bytes)
    return weight_bytes * shape.parameters + recorded


def finished_memory(shape: LayerShape, weight_bytes: int = 2) -> float:
    """
    Return the most that the files of finished layers take on disk.

    :param shape: the shape of the model's layers
    :param weight_bytes: bytes of a stored weight
    :return: bytes
    """
    return weight_bytes * shape.weights * len(shape.names)


def recovery_memory(shape: LayerShape, weight_bytes: int = 2) -> float:
    """
    Predict the memory on the device for a recovery, without the activations and logits
    of a batch.

    :param shape: the shape of the model's layers; the operators of all are trained
    :param weight_bytes: bytes of one of the model's weights
    :return: bytes
    """
    trained = shape.weights * len(shape.names)
    return training_memory(trained, shape.parameters, weight_bytes)


def state_files(trained: int) -> int:
    """
    Return the size of the states of a training on disk. A state has the trained weights
    and Adam's two moments in float32, and is written before the one before it goes.

    :param trained: how many weights are trained
    :return: bytes
    """
    return 2 * 3 * FLOAT32 * trained


def training_memory(trained: float, parameters: float, weight_bytes: int) -> float:
    """
    Predict the memory on the device for training a model towards itself as it was,
    without the activations and logits of a batch. It holds trained weights, gradients
    and Adam's two moments in float32, a mask, the other weights in float32, and the
    teacher. Products are in 16 bits, and the backward pass needs copies of the weights,
    too (without gradient checkpointing); a float32 model on a GPU has none.

    :param trained: how many weights are trained
    :param parameters: how many there are
    :param weight_bytes: bytes of one of the model's weights
    :return: bytes
    """
    mask, copy = 1, 2
    return (
        (4 * FLOAT32 + mask + copy) * trained
        + FLOAT32 * (parameters - trained)
        + weight_bytes * parameters
    )
