"""
What pruning a model takes, from its configuration alone: operations and memory.

Counts are of floating point operations in matrix products and factorisations, two for a
multiplication and an addition; what is done elementwise is left out. See docs/cost.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from fista_modifier.calibration.operators import blocks_of, find_operators
from fista_modifier.calibration.replay import LayerCall
from fista_modifier.calibration.stages import find_stages
from fista_modifier.presets import Procedure
from fista_modifier.reconstruction import MEASURED_EVERY
from fista_modifier.solver import SolverOptions
from fista_modifier.solver.blocks import BLOCK, ENTRIES
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
KEPT = 0.5
"""share of the weights that pruning leaves"""
ACTIVATION = 5
"""bytes that a training step keeps for each token and each in and out feature of an
operator, as measured on layers of a small LLaMA: 5.1 in float32, 4.7 in bfloat16"""


@dataclass(frozen=True)
class StageShape:
    """
    :param columns: n
    :param rows: m of each operator
    :param wave: when its turn comes
    :param block: number of the block of the layer that it is in
    :param returned: whether the block returns what its only operator puts out
    :param share: of the tokens that reach it; below 1 for an expert of a mixture
    :param routed: whether they are given a choice of the tokens, as an expert is
    """

    columns: int
    rows: tuple[int, ...]
    wave: int
    block: int
    returned: bool
    share: float = 1.0
    routed: bool = False

    @property
    def weights(self) -> int:
        """entries of all operators"""
        return self.columns * sum(self.rows)

    @property
    def products(self) -> float:
        """operations of a run, for one token of the layer"""
        return 2 * self.weights * self.share

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
    :param stages: of one layer, in the order of execution
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
        products = math.fsum(stage.products for stage in self.stages)
        return products * self.seq_len + self.attention

    @property
    def toolkit_forward(self) -> float:
        """the same in the toolkit's pass, in which all experts see all tokens"""
        return 2 * self.weights * self.seq_len + self.attention

    def routed(self, block: int) -> bool:
        """
        :param block: number of a block
        :return: whether it gives tokens to experts: it then runs from its dense inputs
        """
        return any(stage.routed for stage in self.stages if stage.block == block)

    def drifts(self, stage: StageShape, full: bool) -> bool:
        """
        :param stage: of the layer
        :param full: whether error correction is, or else within a layer
        :return: whether its inputs follow from operators that were pruned before
        """
        if not self.routed(stage.block):
            return full or stage.wave > 0
        return any(
            other.block == stage.block and other.wave < stage.wave
            for other in self.stages
        )


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
    Build the model without weights and watch its largest decoder layer. Each expert of
    a mixture is given its average share of the tokens.

    :param config: of the model
    :param seq_len: tokens of a calibration sequence
    :return: the shape of its layers, which are taken to be alike
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        # linearize_moe would copy the weights, of which there are none
        for name, fused in get_non_linearized_moes(model):
            linear = LinearExperts2D.get_linear_experts_cls(type(fused))
            model.set_submodule(name, linear(getattr(fused, "config", model.config)))
    operators = find_operators(model, ["Linear"], [])
    counter = FlopCounterMode(display=False)
    tokens: dict[torch.nn.Module, int] = {}

    def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        tokens[module] = args[0][..., 0].numel()

    with ExitStack() as stack:
        stack.enter_context(patch_attr(LinearExperts2D, "forward", _evenly_routed))
        call = _call_of_largest_layer(model, operators[0].name, seq_len)
        inside = {id(module) for module in call.layer.modules()}
        own = [operator for operator in operators if id(operator.module) in inside]
        for operator in own:
            stack.enter_context(operator.module.register_forward_pre_hook(count))
        stages = find_stages(own, [call])
        with torch.no_grad(), counter:
            call.run()
    blocks = list(blocks_of(call.layer, own).values())
    shapes = tuple(
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
            share=tokens[stage.operators[0].module] / seq_len,
            routed=stage.routed,
        )
        for stage in stages
    )
    products = seq_len * math.fsum(shape.products for shape in shapes)
    return LayerShape(
        layers=config.get_text_config().num_hidden_layers,
        hidden=call.hidden_states.shape[-1],
        stages=shapes,
        attention=counter.get_total_flops() - products,
        seq_len=seq_len,
        parameters=model.num_parameters(),
    )


def _evenly_routed(
    experts: LinearExperts2D, hidden_states: Tensor, chosen: Tensor, _weights: Tensor
) -> Tensor:
    """What the experts of a mixture compute, if all are chosen equally often."""
    count = math.ceil(chosen.numel() / experts.num_experts)
    positions = torch.arange(count, device=hidden_states.device)
    outputs = torch.zeros_like(hidden_states)
    for index in range(experts.num_experts):
        outputs = outputs.index_add(0, positions, experts[index](hidden_states[:count]))
    return outputs


class _Seen(Exception):
    """Carries a call of a decoder layer out of the model."""


def _call_of_largest_layer(
    model: torch.nn.Module, operator: str, seq_len: int
) -> LayerCall:
    """Decoder layers are the children of the first list around an operator."""
    parts = operator.split(".")
    number = next(index for index, part in enumerate(parts) if part.isdigit())
    layers = model.get_submodule(".".join(parts[:number]))
    layer = max(
        layers.children(),
        key=lambda one: sum(weight.numel() for weight in one.parameters()),
    )

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
    raise ValueError(f"{'.'.join(parts[:number])} are not run by the model")


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


def peak_device_memory(
    shape: LayerShape,
    procedure: Procedure,
    weight_bytes: int = 2,
    *,
    offload_hessians: bool = False,
) -> float:
    """
    :param shape: of the model's layers
    :param procedure: what is done to a layer
    :param weight_bytes: of a stored weight
    :param offload_hessians: the modifier's field
    :return: bytes on the device: one layer and its pruned copy, and the most that a
        stage needs while it is solved, beside the sums of the others of its wave, or
        the reconstruction of the layer with batches of one sequence
    """
    layer = 2 * weight_bytes * shape.weights

    def sums(stage: StageShape) -> float:
        square = 0 if offload_hessians else stage.columns**2
        if not shape.drifts(stage, procedure.chains_layers):
            return square
        return square + (stage.weights if stage.narrow else 2 * square)

    def solver(stage: StageShape) -> float:
        entries = max(stage.rows) * stage.columns
        block = min(entries, ENTRIES)
        # W, its target, the best weight and a candidate, the supports of both; what an
        # iteration has at work
        searching = 4.5 * entries + 5 * block
        if offload_hessians:  # a block of G, and a product with it
            return searching + 2 * stage.columns * min(stage.columns, BLOCK)
        square = stage.columns**2
        # W, its target, what ADMM iterates, and either a step or finding a support
        starting = square + 4 * entries + max(2 * block, 0.75 * entries)
        if len(stage.rows) > 1:  # the inverse waits for the next operator
            searching += square
        scaled = sums(stage)
        scaling = scaled + stage.narrow * entries
        return scaled + max(scaling, 2 * square, starting, searching)

    def wave(number: int) -> float:
        stages = [stage for stage in shape.stages if stage.wave == number]
        first = max(solver(stage) - sums(stage) for stage in stages)
        return first + math.fsum(map(sums, stages))

    waves = {stage.wave for stage in shape.stages}
    most = FLOAT32 * max(map(wave, waves))
    if procedure.reconstructs:
        most = max(most, reconstruction_memory(shape, weight_bytes))
    return layer + most


def reconstruction_memory(shape: LayerShape, weight_bytes: int = 2) -> float:
    """
    :param shape: of the model's layers
    :param weight_bytes: of a stored weight
    :return: bytes on the device for the reconstruction of a layer, half of which is
        kept: its weights in their own dtype, the kept ones in float32, Adam's two
        moments of these and where they are, the largest gradient, whole and what of it
        is for kept weights, with their places in 64 bits and their new values, and the
        activations of a sequence
    """
    trained = (weight_bytes + 4 * FLOAT32 * KEPT) * shape.weights
    largest = max(max(stage.rows) * stage.columns for stage in shape.stages)
    features = math.fsum(
        stage.share * (len(stage.rows) * stage.columns + sum(stage.rows))
        for stage in shape.stages
    )
    gradient = (weight_bytes + (weight_bytes + 3 * FLOAT32) * KEPT) * largest
    return trained + gradient + ACTIVATION * features * shape.seq_len


def recorded_memory(
    shape: LayerShape, samples: int, procedure: Procedure, activation_bytes: int = 2
) -> float:
    """
    :param shape: of the model's layers
    :param samples: calibration sequences
    :param procedure: what is done to a layer
    :param activation_bytes: of a recorded activation
    :return: bytes of the hidden states that wait in main memory, or on disk
    """
    blocks = len({stage.block for stage in shape.stages})
    # the pipeline's, in, out; of the blocks that are not done yet what they return and
    # are called with, and the pruned inputs of the one at work
    states = 3 + 2 * blocks - 1 + procedure.chains_layers
    return states * samples * shape.seq_len * shape.hidden * activation_bytes


def peak_host_memory(
    shape: LayerShape, samples: int, procedure: Procedure, weight_bytes: int = 2
) -> float:
    """
    :param shape: of the model's layers
    :param samples: calibration sequences
    :param procedure: what is done to a layer
    :param weight_bytes: of a stored weight or activation
    :return: bytes in main memory: the model, and the hidden states that are recorded
    """
    recorded = recorded_memory(shape, samples, procedure, weight_bytes)
    return weight_bytes * shape.parameters + recorded


def seconds(
    cost: Cost,
    shape: LayerShape,
    procedure: Procedure,
    device: Device,
    devices: int = 1,
) -> float:
    """
    :param cost: of a layer
    :param shape: of the model's layers
    :param procedure: what is done to a layer
    :param device: that prunes
    :param devices: how many: each has layers of its own or, where layers depend on one
        another, data of its own in all but the reconstruction
    :return: predicted time of all layers, products only
    """
    shared = (cost.recording + cost.replays) / device.half
    shared += (cost.gram + cost.solver) / device.single
    training = cost.reconstruction / device.half
    if procedure.chains_layers:
        return shape.layers * (shared / devices + training)
    return -(-shape.layers // devices) * (shared + training)
