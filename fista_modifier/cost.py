"""
What pruning a model takes, from its configuration alone: operations and memory.

Counts are of floating point operations in matrix products and factorisations, two for a
multiplication and an addition; what is done elementwise is left out. See docs/cost.md.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from fista_modifier.calibration.operators import blocks_of, find_operators
from fista_modifier.calibration.replay import LayerCall
from fista_modifier.calibration.stages import find_stages
from fista_modifier.reconstruction import MEASURED_EVERY, Reconstruction
from fista_modifier.solver import SolverOptions
from fista_modifier.solver.blocks import BLOCK
from fista_modifier.solver.drift import narrows

__all__ = [
    "DEVICES",
    "Cost",
    "Device",
    "LayerShape",
    "StageShape",
    "layer_cost",
    "shape_of",
]

SYMMETRIC = 10 / 16
"""of a product with its own transpose that is computed: solver/blocks.py"""
ERRORS, ERRORS_OF_A_TRIAL, REFIT_STEPS, LANCZOS = 6, 3, 2, 50
"""products with an n×n matrix; a refit may take 20 steps, and mostly takes two"""
CHECKS = 5
"""runs of a layer with one batch: attention both ways, causality, stages"""
FLOAT32 = 4


@dataclass(frozen=True)
class StageShape:
    """
    :param columns: n
    :param rows: m of each operator
    :param wave: when its turn comes
    :param block: number of the block of the layer that it is in
    :param returned: whether the block returns what its only operator puts out
    """

    columns: int
    rows: tuple[int, ...]
    wave: int
    block: int
    returned: bool

    @property
    def weights(self) -> int:
        """entries of all operators"""
        return self.columns * sum(self.rows)

    @property
    def narrow(self) -> bool:
        """whether its drift is summed in the outputs of its only operator"""
        return len(self.rows) == 1 and narrows(self.rows[0], self.columns)

    @property
    def recorded(self) -> bool:
        """whether its dense outputs are, so that the dense layer is not replayed"""
        return self.narrow and self.returned


@dataclass(frozen=True)
class LayerShape:
    """
    :param layers: how many the model has
    :param hidden: features of the hidden state
    :param stages: of one layer
    :param attention: operations of attention itself, for one sequence
    :param seq_len: tokens of a sequence
    :param parameters: of the whole model
    """

    layers: int
    hidden: int
    stages: tuple[StageShape, ...]
    attention: float
    seq_len: int
    parameters: int

    @property
    def weights(self) -> int:
        """entries of all operators of a layer"""
        return sum(stage.weights for stage in self.stages)

    @property
    def forward(self) -> float:
        """operations of a run of the layer over one sequence"""
        return 2 * self.weights * self.seq_len + self.attention


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


@dataclass(frozen=True)
class Device:
    """
    :param memory: bytes
    :param half: operations a second in bfloat16, for runs of a layer
    :param single: the same in float32 (TF32 is not used), for sums and the solver
    """

    memory: float
    half: float
    single: float


# published peaks (A100 and H100 SXM, dense), of which half is taken as reached
DEVICES = {
    "a100-40gb": Device(40e9, 0.5 * 312e12, 0.5 * 19.5e12),
    "a100-80gb": Device(80e9, 0.5 * 312e12, 0.5 * 19.5e12),
    "h100-80gb": Device(80e9, 0.5 * 989e12, 0.5 * 67e12),
}


def shape_of(config: PretrainedConfig, seq_len: int) -> LayerShape:
    """
    Build the model without weights and watch its first decoder layer.

    :param config: of the model
    :param seq_len: tokens of a calibration sequence
    :return: the shape of its layers, which are taken to be alike
    :raises ValueError: for a mixture of experts, whose operators the toolkit makes
    """
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    if any(getattr(config.get_text_config(), name, None) for name in experts):
        raise ValueError(
            f"{config.model_type} is a mixture of experts, whose operators the toolkit "
            "makes; plan knows dense models only"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    operators = find_operators(model, ["Linear"], [])
    call = _first_call(model, operators[0].name, seq_len)
    inside = {id(module) for module in call.layer.modules()}
    own = [operator for operator in operators if id(operator.module) in inside]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call.run()
    blocks = blocks_of(call.layer, own).values()
    stages = tuple(
        StageShape(
            columns=stage.operators[0].weight.shape[1],
            rows=tuple(operator.weight.shape[0] for operator in stage.operators),
            wave=stage.wave,
            block=next(
                number
                for number, inside in enumerate(blocks)
                if stage.operators[0] in inside
            ),
            returned=stage.returned,
        )
        for stage in find_stages(own, [call])
    )
    products = 2 * seq_len * sum(stage.weights for stage in stages)
    return LayerShape(
        layers=config.get_text_config().num_hidden_layers,
        hidden=call.hidden_states.shape[-1],
        stages=stages,
        attention=counter.get_total_flops() - products,
        seq_len=seq_len,
        parameters=model.num_parameters(),
    )


class _Seen(Exception):
    """Carries a call of the first decoder layer out of the model."""


def _first_call(model: torch.nn.Module, operator: str, seq_len: int) -> LayerCall:
    """The decoder layer that an operator is in: the first child of a list around it."""
    name = ""
    for part in operator.split("."):
        name = f"{name}.{part}".lstrip(".")
        if part.isdigit():
            break
    layer = model.get_submodule(name)

    def stop(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Seen(LayerCall(module, args, kwargs))

    tokens = torch.ones(1, seq_len, dtype=torch.long, device="meta")
    # a ready mask: what the model makes of a plain one looks at values
    mask = torch.zeros(1, 1, seq_len, seq_len, device="meta")
    with layer.register_forward_pre_hook(stop, with_kwargs=True), torch.no_grad():
        try:
            model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=tokens,
                use_cache=False,
            )
        except _Seen as seen:
            call: LayerCall = seen.args[0]
            return call
    raise ValueError(f"{name} is not called in a run of the model")


def layer_cost(
    shape: LayerShape,
    samples: int,
    options: SolverOptions,
    reconstruction: Reconstruction,
) -> Cost:
    """
    :param shape: of the model's layers
    :param samples: calibration sequences
    :param options: of the solver
    :param reconstruction: of a layer
    :return: operations for one layer, with intra-layer error correction
    """
    runs = (
        reconstruction.epochs * 3 + 3 / MEASURED_EVERY if reconstruction.epochs else 0
    )
    return Cost(
        recording=(samples + CHECKS) * shape.forward,
        replays=samples * _replays(shape),
        gram=samples * shape.seq_len * sum(map(_gram, shape.stages)),
        solver=sum(_solver(stage, options) for stage in shape.stages),
        reconstruction=samples * runs * shape.forward,
    )


def _replays(shape: LayerShape) -> float:
    """Dense and partly pruned runs for one sequence: see layer.py"""
    total = 0.0
    first_block = min(stage.block for stage in shape.stages)
    for block in sorted({stage.block for stage in shape.stages}):
        inside = [stage for stage in shape.stages if stage.block == block]
        waves = sorted({stage.wave for stage in inside})
        for wave in waves:
            here = [stage for stage in inside if stage.wave == wave]
            only_pruned = wave == 0 or (len(here) == 1 and here[0].recorded)
            total += (1 if only_pruned else 2) * _before(shape, block, wave)
        if block != first_block:  # the pruned layer once, as far as the block
            total += _before(shape, block, waves[0], of_layer=True)
    return total


def _before(
    shape: LayerShape, block: int, wave: int, *, of_layer: bool = False
) -> float:
    """What runs before a wave, in its block or in the whole layer; attention is in the
    first block, behind its first wave."""
    earlier = [
        stage
        for stage in shape.stages
        if stage.wave < wave and (of_layer or stage.block == block)
    ]
    products = 2 * shape.seq_len * sum(stage.weights for stage in earlier)
    first_block = min(stage.block for stage in shape.stages)
    attended = any(stage.block == first_block for stage in earlier)
    return products + (shape.attention if attended else 0)


def _gram(stage: StageShape) -> float:
    """For one token: G, and the drift where there is one"""
    own = 2 * SYMMETRIC * stage.columns**2
    if stage.wave == 0:
        return own
    if stage.narrow:
        return own + 4 * stage.weights
    return 2 * own + 2 * stage.columns**2


def _solver(stage: StageShape, options: SolverOptions) -> float:
    """An estimate: refits and FISTA stop when they have converged"""
    products = ERRORS
    inverses = 0.0
    if options.start == "admm":
        products += options.admm_steps
        inverses = options.admm_steps / 2
    if options.refit:
        products += REFIT_STEPS * (1 + min(options.patience, 1))
    products += (options.max_iterations + ERRORS_OF_A_TRIAL) * options.patience
    lanczos = LANCZOS * 2 * stage.columns**2 if options.patience else 0
    product = 2 * stage.weights * stage.columns
    return products * product + inverses * stage.columns**3 + lanczos


def peak_device_memory(
    shape: LayerShape, weight_bytes: int = 2, *, offload_hessians: bool = False
) -> float:
    """
    :param shape: of the model's layers
    :param weight_bytes: of a stored weight
    :param offload_hessians: the modifier's field
    :return: bytes on the device: one layer and its pruned copy, and the most that a
        stage needs, while tokens are summed or while it is solved
    """
    layer = 2 * weight_bytes * shape.weights

    def stage_bytes(stage: StageShape) -> float:
        squares = 5 * stage.columns**2
        if offload_hessians:  # a block, and a product with it
            squares = 2 * stage.columns * min(stage.columns, BLOCK)
        return FLOAT32 * (squares + 8 * stage.weights)

    return layer + max(map(stage_bytes, shape.stages))


def peak_host_memory(
    shape: LayerShape, samples: int, activation_bytes: int = 2, weight_bytes: int = 2
) -> float:
    """
    :param shape: of the model's layers
    :param samples: calibration sequences
    :param activation_bytes: of a recorded activation
    :param weight_bytes: of a stored weight
    :return: bytes in main memory: the model, and the hidden states that are recorded
    """
    blocks = len({stage.block for stage in shape.stages})
    # the pipeline's, in, out; of the blocks that are not done yet what they return and
    # are called with, and the pruned inputs of the one at work
    states = 3 + 2 * blocks - 1
    tokens = samples * shape.seq_len
    return (
        weight_bytes * shape.parameters
        + states * tokens * shape.hidden * activation_bytes
    )


def seconds(cost: Cost, shape: LayerShape, device: Device, devices: int = 1) -> float:
    """
    :param cost: of a layer
    :param shape: of the model's layers
    :param device: that prunes
    :param devices: how many, each with layers of its own
    :return: predicted time of all layers, products only
    """
    runs = cost.recording + cost.replays + cost.reconstruction
    own = runs / device.half + (cost.gram + cost.solver) / device.single
    return own * -(-shape.layers // devices)
