"""The shape of a model's decoder layers, from its configuration alone."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from fista_modifier.calibration.layers import DecoderLayer, group_by_layer
from fista_modifier.calibration.operators import blocks_of, find_operators
from fista_modifier.calibration.replay import LayerCall
from fista_modifier.calibration.stages import find_stages
from fista_modifier.experts import linearize_weightless
from fista_modifier.solver.drift import narrows

__all__ = ["LayerShape", "StageShape", "shape_of"]


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
    linearize_weightless(model)
    operators = find_operators(model, ["Linear"], [])
    grouped = group_by_layer(model, operators, infer_sequential_targets(model))
    layers = [layer for layer in grouped if layer.in_sequence and layer.operators]
    largest = max(layers, key=_parameters)
    alike = [layer for layer in layers if type(layer.module) is type(largest.module)]
    counter = FlopCounterMode(display=False)
    tokens: dict[torch.nn.Module, int] = {}

    def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        tokens[module] = args[0][..., 0].numel()

    with ExitStack() as stack:
        stack.enter_context(patch_attr(LinearExperts2D, "forward", _evenly_routed))
        call = _call_of(largest, model, seq_len)
        own = largest.operators
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
        layers=len(alike),  # and not those of a vision tower
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


def _parameters(layer: DecoderLayer) -> int:
    return sum(weight.numel() for weight in layer.module.parameters())


def _call_of(layer: DecoderLayer, model: torch.nn.Module, seq_len: int) -> LayerCall:
    """What the model calls the layer with."""

    def stop(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Seen(LayerCall(module, args, kwargs))

    tokens = torch.ones(1, seq_len, dtype=torch.long, device="meta")
    # a ready mask: what the model makes of a plain one looks at values
    mask = torch.zeros(1, 1, seq_len, seq_len, device="meta")
    watched = layer.module.register_forward_pre_hook(stop, with_kwargs=True)
    with watched, torch.no_grad():
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
    raise ValueError(f"{layer.name} is not run by the model")
