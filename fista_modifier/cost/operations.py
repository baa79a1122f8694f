"""
The operations of a run in matrix products and factorisations. A multiplication and an
addition are two operations. What is done elementwise is left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import astuple, dataclass

from fista_modifier.cost.alternation import alternation_cost
from fista_modifier.cost.shape import LayerShape, StageShape
from fista_modifier.cost.solvers import work_of
from fista_modifier.pruning.corrected import CorrectedProcedure, ErrorCorrection
from fista_modifier.pruning.kept_weights import WATCHED_SHARE
from fista_modifier.pruning.reconstruction import MEASURED_EVERY, STEP_TOKENS
from fista_modifier.solver.blocks import COMPUTED

__all__ = ["Cost", "layer_cost"]

CHECKS = 5
"""
The approximate number of runs of a layer with one batch that check it. They compare it
with the model itself, compare attention kernels, and show the stages.
"""


@dataclass(frozen=True)
class Cost:
    """
    Operations for one decoder layer.

    :param recording: the toolkit's pass
    :param replays: replays of blocks, dense and partly pruned
    :param gram: sums over the tokens of products of activations (and of these with
        weights)
    :param drift: sums of products with the drift
    :param search: the search for the support by ADMM and FISTA, or the choice of
        channels, for all operators
    :param refits: inverses, refits, errors and alternating minimisation, for all
        operators
    :param reconstruction: the reconstruction of the layer
    """

    recording: float
    replays: float
    gram: float
    drift: float
    search: float
    refits: float
    reconstruction: float

    @property
    def total(self) -> float:
        """The operations of all phases together."""
        return math.fsum(astuple(self))


def layer_cost(
    shape: LayerShape,
    samples: int,
    procedure: CorrectedProcedure,
) -> Cost:
    """
    Predict the operations for one decoder layer.

    :param shape: the shape of the model's layers
    :param samples: number of calibration sequences
    :param procedure: what is done to a layer
    :return: the operations for one layer, by phase
    """
    correction = procedure.error_correction
    tokens = samples * shape.seq_len
    solved = [stage for _, stage in shape.solved]
    drifting = [stage for stage in solved if shape.drifts(stage, correction)]
    works = [work_of(stage, procedure) for stage in solved]
    runs = 0.0
    if procedure.reconstructs:
        step = 3 + WATCHED_SHARE  # watched pieces are also run as training found them
        if shape.seq_len > STEP_TOKENS:
            step += 1  # the dense layer runs for the targets of parts
        runs = step * procedure.reconstruction.epochs + 3 / MEASURED_EVERY
    carried = 0.0
    if procedure.chains_layers:  # nobody needs the outputs of the last layer
        carried = shape.forward * (1 - 1 / len(shape.names))
    replayed = samples * (_replays(shape, correction) + carried)
    if procedure.sums_in_pass and len(solved) == 1 and solved[0].share == 1:
        replayed = 0.0
    return Cost(
        recording=samples * shape.toolkit_forward + CHECKS * shape.forward,
        replays=replayed,
        gram=tokens
        * math.fsum(
            [stage.share * _gram(stage) for stage in solved]
            + [stage.products for stage in drifting if stage.narrow]
        ),
        drift=tokens * math.fsum(stage.share * _drift(stage) for stage in drifting),
        search=math.fsum(work.search for work in works),
        refits=math.fsum(work.refits for work in works)
        + alternation_cost(shape, tokens, procedure),
        reconstruction=samples * runs * shape.forward,
    )


def _replays(shape: LayerShape, correction: ErrorCorrection) -> float:
    """
    Return the operations of dense and partly pruned replays for one sequence: see
    calibration/replays.py.
    """
    total = 0.0
    first_block = shape.stages[0].block
    blocks: defaultdict[int, defaultdict[int, list[int]]] = defaultdict(
        lambda: defaultdict(list)
    )
    solved = dict(shape.solved)
    for number, stage in solved.items():
        blocks[stage.block][stage.wave].append(number)
    for block, waves in sorted(blocks.items()):
        drifts = False
        for here in waves.values():
            stage = solved[here[0]]
            known = len(here) == 1 and stage.recorded
            drifts |= shape.drifts(stage, correction)
            only_pruned = known or not shape.drifts(stage, correction)
            total += (1 if only_pruned else 2) * _before(shape, max(here), block)
        if drifts and block != first_block and not shape.routed(block):
            # the pruned layer runs once, as far as the block
            inside = [stage.block for stage in shape.stages]
            total += _before(shape, inside.index(block))
    return total


def _before(shape: LayerShape, stop: int, block: int | None = None) -> float:
    """
    Return the operations of what runs before a stage for one sequence, in a block or,
    without one, in the whole layer. Attention is in the first block, behind its first
    stage.

    :param stop: number of the stage
    """
    earlier = [stage for stage in shape.stages[:stop] if block in (None, stage.block)]
    products = shape.seq_len * math.fsum(stage.products for stage in earlier)
    attended = any(stage.block == shape.stages[0].block for stage in earlier)
    return products + (shape.attention if attended else 0)


def _gram(stage: StageShape) -> float:
    """Return the operations of adding one token that reaches the stage to G."""
    return 2 * COMPUTED * stage.columns**2


def _drift(stage: StageShape) -> float:
    """
    Return the operations of adding one token that reaches the stage to the sums of the
    drift, which are kept in the outputs or the inputs.
    """
    if stage.narrow:
        return 2 * stage.weights
    return _gram(stage) + 2 * stage.columns**2
