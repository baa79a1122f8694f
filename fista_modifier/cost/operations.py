"""
Operations in matrix products and factorisations, two for a multiplication and an
addition; what is done elementwise is left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import astuple, dataclass

from fista_modifier.cost.shape import LayerShape, StageShape
from fista_modifier.pruning.reconstruction import MEASURED_EVERY
from fista_modifier.pruning.sparse import SparseProcedure
from fista_modifier.solver import SolverOptions

__all__ = ["Cost", "layer_cost"]

SYMMETRIC = 10 / 16
"""of a product with its own transpose that is computed: solver/blocks.py"""
ERRORS, ERRORS_OF_A_TRIAL, REFIT_STEPS, LANCZOS = 5, 3, 2, 50
"""products with an n×n matrix; a refit may take 20 steps, and mostly takes two"""
CHECKS = 5
"""runs of a layer with one batch: attention both ways, causality, stages"""


@dataclass(frozen=True)
class Cost:
    """
    Operations for one decoder layer.

    :param recording: the toolkit's pass
    :param replays: of blocks, dense and partly pruned
    :param gram: sums over the tokens of products of activations (and of these with
        weights)
    :param drift: sums of products with the drift
    :param search: ADMM and FISTA, all operators
    :param refits: inverses, refits and errors, all operators
    :param reconstruction: of the layer
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
        """of all phases"""
        return math.fsum(astuple(self))


def layer_cost(
    shape: LayerShape,
    samples: int,
    procedure: SparseProcedure,
) -> Cost:
    """
    :param shape: of the model's layers
    :param samples: calibration sequences
    :param procedure: what is done to a layer
    :return: operations for one layer
    """
    full = procedure.chains_layers
    tokens = samples * shape.seq_len
    drifting = [stage for stage in shape.stages if shape.drifts(stage, full)]
    runs = 0.0
    if procedure.reconstructs:
        runs = 3 * procedure.reconstruction.epochs + 3 / MEASURED_EVERY
    return Cost(
        recording=samples * shape.toolkit_forward + CHECKS * shape.forward,
        replays=samples * (_replays(shape, full) + full * shape.forward),
        gram=tokens
        * math.fsum(
            [stage.share * _gram(stage) for stage in shape.stages]
            + [stage.products for stage in drifting if stage.narrow]
        ),
        drift=tokens * math.fsum(stage.share * _drift(stage) for stage in drifting),
        search=math.fsum(_search(stage, procedure.options) for stage in shape.stages),
        refits=math.fsum(_refits(stage, procedure.options) for stage in shape.stages),
        reconstruction=samples * runs * shape.forward,
    )


def _replays(shape: LayerShape, full: bool) -> float:
    """Dense and partly pruned runs for one sequence: see calibration/replays.py"""
    total = 0.0
    first_block = shape.stages[0].block
    for block in sorted({stage.block for stage in shape.stages}):
        numbers: defaultdict[int, list[int]] = defaultdict(list)
        for number, stage in enumerate(shape.stages):
            if stage.block == block:
                numbers[stage.wave].append(number)
        for here in numbers.values():
            stage = shape.stages[here[0]]
            known = len(here) == 1 and stage.recorded
            only_pruned = known or not shape.drifts(stage, full)
            total += (1 if only_pruned else 2) * _before(shape, max(here), block)
        if block != first_block and not shape.routed(block):
            # the pruned layer once, as far as the block
            total += _before(shape, min(min(here) for here in numbers.values()))
    return total


def _before(shape: LayerShape, stop: int, block: int | None = None) -> float:
    """What runs before a stage, in its block or in the whole layer; attention is in the
    first block, behind its first stage."""
    earlier = [stage for stage in shape.stages[:stop] if block in (None, stage.block)]
    products = shape.seq_len * math.fsum(stage.products for stage in earlier)
    attended = any(stage.block == shape.stages[0].block for stage in earlier)
    return products + (shape.attention if attended else 0)


def _gram(stage: StageShape) -> float:
    """G, for one token that reaches the stage"""
    return 2 * SYMMETRIC * stage.columns**2


def _drift(stage: StageShape) -> float:
    """The same of the drift, in the outputs or the inputs"""
    if stage.narrow:
        return 2 * stage.weights
    return _gram(stage) + 2 * stage.columns**2


def _product(stage: StageShape) -> float:
    """All operators of a stage times an n×n matrix"""
    return 2 * stage.weights * stage.columns


def _search(stage: StageShape, options: SolverOptions) -> float:
    """An estimate: FISTA stops when it has converged"""
    products = options.max_iterations * options.patience
    if options.start == "admm":
        products += options.admm_steps
    return products * _product(stage)


def _refits(stage: StageShape, options: SolverOptions) -> float:
    """An estimate: refits stop when they have converged"""
    products = ERRORS + ERRORS_OF_A_TRIAL * options.patience
    if options.refit:
        products += REFIT_STEPS * (1 + min(options.patience, 1))
    inverse = stage.columns**3 if options.start == "admm" else 0
    lanczos = LANCZOS * 2 * stage.columns**2 if options.patience else 0
    return products * _product(stage) + inverse + lanczos
