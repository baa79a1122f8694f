"""
Operations in matrix products and factorisations, two for a multiplication and an
addition; what is done elementwise is left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import astuple, dataclass

from fista_modifier.cost.shape import LayerShape, StageShape
from fista_modifier.presets import Procedure
from fista_modifier.reconstruction import MEASURED_EVERY
from fista_modifier.solver import SolverOptions

__all__ = ["Cost", "layer_cost"]

SYMMETRIC = 10 / 16
"""of a product with its own transpose that is computed: solver/blocks.py"""
ERRORS, ERRORS_OF_A_TRIAL, REFIT_STEPS, LANCZOS = 6, 3, 2, 50
"""products with an n×n matrix; a refit may take 20 steps, and mostly takes two"""
CHECKS = 5
"""runs of a layer with one batch: attention both ways, causality, stages"""


@dataclass(frozen=True)
class Cost:
    """
    Operations for one decoder layer.

    :param recording: the toolkit's pass
    :param replays: of blocks, dense and partly pruned
    :param gram: sums over the tokens
    :param solver: all operators
    :param reconstruction: of the layer
    """

    recording: float
    replays: float
    gram: float
    solver: float
    reconstruction: float

    @property
    def total(self) -> float:
        """of all phases"""
        return math.fsum(astuple(self))


def layer_cost(
    shape: LayerShape,
    samples: int,
    procedure: Procedure,
) -> Cost:
    """
    :param shape: of the model's layers
    :param samples: calibration sequences
    :param procedure: what is done to a layer
    :return: operations for one layer
    """
    full = procedure.chains_layers
    runs = 0.0
    if procedure.reconstructs:
        runs = 3 * procedure.reconstruction.epochs + 3 / MEASURED_EVERY
    return Cost(
        recording=samples * shape.toolkit_forward + CHECKS * shape.forward,
        replays=samples * (_replays(shape, full) + full * shape.forward),
        gram=samples
        * shape.seq_len
        * math.fsum(_gram(shape, stage, full) for stage in shape.stages),
        solver=sum(_solver(stage, procedure.solver) for stage in shape.stages),
        reconstruction=samples * runs * shape.forward,
    )


def _replays(shape: LayerShape, full: bool) -> float:
    """Dense and partly pruned runs for one sequence: see layer.py"""
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


def _gram(shape: LayerShape, stage: StageShape, full: bool) -> float:
    """For one token of the layer: G, and the drift where there is one"""
    own = 2 * SYMMETRIC * stage.columns**2
    drift = 4.0 * stage.weights if stage.narrow else own + 2 * stage.columns**2
    return stage.share * (own + drift if shape.drifts(stage, full) else own)


def _solver(stage: StageShape, options: SolverOptions) -> float:
    """An estimate: refits and FISTA stop when they have converged"""
    products = ERRORS
    inverses = 0.0
    if options.start == "admm":
        products += options.admm_steps
        inverses = 1.0
    if options.refit:
        products += REFIT_STEPS * (1 + min(options.patience, 1))
    products += (options.max_iterations + ERRORS_OF_A_TRIAL) * options.patience
    lanczos = LANCZOS * 2 * stage.columns**2 if options.patience else 0
    product = 2 * stage.weights * stage.columns
    return products * product + inverses * stage.columns**3 + lanczos
