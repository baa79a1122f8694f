"""The shape of a model's decoder layers, from its configuration alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from loguru import logger
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, PreTrainedModel

from fista_modifier.calibration.replay import LayerCall
from fista_modifier.calibration.stages import find_stages
from fista_modifier.models.classes import weightless_model
from fista_modifier.models.experts import linearize_weightless
from fista_modifier.models.layers import (
    DecoderLayer,
    group_by_layer,
    layer_targets,
)
from fista_modifier.models.operators import Operator, blocks_of
from fista_modifier.models.targets import find_operators
from fista_modifier.pruning.corrected import ErrorCorrection
from fista_modifier.solver.drift import narrows

__all__ = ["LayerShape", "StageShape", "shape_of"]

WATCHED = 4096
"""tokens of the longest sequence that a layer is watched with"""


@dataclass(frozen=True)
class StageShape:
    """
    :param columns: n
    :param rows: m of each operator
    :param wave: when its turn comes
    :param block: number of the block of the layer that it is in
    :param returned: whether the block returns the output of its only operator
    :param share: of the tokens that reach it; below 1 for an expert of a mixture
    :param routed: whether they are given a choice of the tokens, as an expert is
    :param names: of the operators, inside the layer
    """

    columns: int
    rows: tuple[int, ...]
    wave: int
    block: int
    returned: bool
    share: float = 1.0
    routed: bool = False
    names: tuple[str, ...] = ()

    def only(self, names: Collection[str]) -> StageShape | None:
        """
        :param names: of operators, inside the layer
        :return: the stage without all others; None if nothing is left
        """
        chosen = [
            (name, rows)
            for name, rows in zip(self.names, self.rows, strict=True)
            if name in names
        ]
        if not chosen:
            return None
        return replace(
            self,
            names=tuple(name for name, _ in chosen),
            rows=tuple(rows for _, rows in chosen),
        )

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
    :param names: of the layers
    :param hidden: features of the hidden state
    :param stages: of one layer, in the order of execution
    :param attention: operations of attention itself, for one sequence
    :param seq_len: tokens of a sequence
    :param parameters: of the whole model
    :param estimate: why the layer could not be watched, so that stages and attention
        are a coarser estimate, from its operators alone; None if it was watched
    :param pruned: operators whose inputs are asked for, by their names inside the
        layer; None if it is all of them
    """

    names: tuple[str, ...]
    hidden: int
    stages: tuple[StageShape, ...]
    attention: float
    seq_len: int
    parameters: int
    estimate: str | None = None
    pruned: frozenset[str] | None = None

    def pruning(self, operators: Collection[str]) -> LayerShape:
        """
        :param operators: that are pruned, by their names in the model
        :return: the shape of the layers that have some of them; what is pruned in one
            of the layers is taken to be pruned in all
        """
        inside = {
            layer: {
                name.removeprefix(f"{layer}.")
                for name in operators
                if name.startswith(f"{layer}.")
            }
            for layer in self.names
        }
        names = tuple(layer for layer, found in inside.items() if found)
        return replace(self, names=names, pruned=frozenset().union(*inside.values()))

    @property
    def layers(self) -> int:
        """how many there are"""
        return len(self.names)

    @property
    def solved(self) -> list[tuple[int, StageShape]]:
        """what is pruned of each stage, and the number of the stage"""
        if self.pruned is None:
            return list(enumerate(self.stages))
        return [
            (number, chosen)
            for number, stage in enumerate(self.stages)
            if (chosen := stage.only(self.pruned))
        ]

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

    def drifts(self, stage: StageShape, correction: ErrorCorrection) -> bool:
        """
        :param stage: of the layer
        :param correction: whose errors operators make up for
        :return: whether its inputs follow from operators that were pruned before
        """
        if correction == "none":
            return False
        routed = self.routed(stage.block)
        if correction == "full" and not routed:
            return True
        return any(
            other.wave < stage.wave and (other.block == stage.block or not routed)
            for _, other in self.solved
        )


def shape_of(config: PretrainedConfig, seq_len: int) -> LayerShape:
    """
    Build the model without weights and watch its largest decoder layer. Each expert of
    a mixture is given its average share of the tokens. A layer that cannot be watched,
    since what it does depends on values, is estimated from its operators alone.

    :param config: of the model
    :param seq_len: tokens of a calibration sequence
    :return: the shape of its layers, which are taken to be alike
    :raises ValueError: if transformers has no class for the configuration, or there is
        nothing to prune in the model
    """
    if seq_len > WATCHED:  # masks are real, and attention is of second degree
        half, whole = shape_of(config, WATCHED // 2), shape_of(config, WATCHED)
        square = 2 * (whole.attention - 2 * half.attention) / WATCHED**2
        linear = whole.attention / WATCHED - square * WATCHED
        attention = linear * seq_len + square * seq_len**2
        return replace(whole, seq_len=seq_len, attention=attention)
    model = weightless_model(config, attn_implementation="eager").eval()
    linearize_weightless(model)
    parameters = model.num_parameters()
    layers = _decoder_layers(model)
    largest = max(layers, key=_parameters)
    shape = _estimated(largest, model, seq_len)
    try:
        call = _call_of(layers, model, seq_len)
        largest = next(layer for layer in layers if layer.module is call.layer)
        shape = _watched(largest, call, _estimated(largest, model, seq_len))
    except Exception as error:  # whatever a model's own code makes of missing values
        logger.opt(exception=error).debug("where watching the layer ended")
        why = str(error).partition("\n")[0]
        shape = replace(shape, estimate=f"{type(error).__name__}: {why}")
    alike = layers
    if not config.is_encoder_decoder:  # but for a vision tower
        alike = [layer for layer in layers if _in_one_stack(layer, largest)]
    names = tuple(layer.name for layer in alike)
    return replace(shape, names=names, parameters=parameters)


def _decoder_layers(model: PreTrainedModel) -> list[DecoderLayer]:
    """The decoder layers with operators"""
    operators = find_operators(model, ["Linear"], [])
    targets = layer_targets(model, operators)
    layers = group_by_layer(model, operators, targets)
    return [layer for layer in layers if layer.in_sequence and layer.operators]


def _in_one_stack(layer: DecoderLayer, other: DecoderLayer) -> bool:
    """Whether they are of one class or, in a hybrid of several, in one list."""
    if type(layer.module) is type(other.module):
        return True
    return layer.name.rpartition(".")[0] == other.name.rpartition(".")[0]


def _watched(layer: DecoderLayer, call: LayerCall, estimate: LayerShape) -> LayerShape:
    """The shape of a layer as a run shows it, in the place of an estimate of it."""
    counter = FlopCounterMode(display=False)
    tokens: dict[torch.nn.Module, int] = {}

    def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        tokens[module] = args[0][..., 0].numel()

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # the pointer is 0, as for a tensor on the meta device
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.enter_context(patch_attr(LinearExperts2D, "forward", _evenly_routed))
        for operator in layer.operators:
            stack.enter_context(operator.module.register_forward_pre_hook(count))
        with torch.no_grad(), counter:
            call.run()
        # Mamba's dt_proj is not called: its weight is used in another way
        called = [one for one in layer.operators if one.module in tokens]
        stages = find_stages(called, [call])
    blocks = list(blocks_of(call.layer, layer.operators).values())
    start = len(layer.name) + 1
    shapes = tuple(
        StageShape(
            columns=stage.operators[0].weight.shape[1],
            rows=tuple(operator.weight.shape[0] for operator in stage.operators),
            wave=stage.wave,
            block=_block(blocks, stage.operators[0]),
            returned=stage.returned,
            share=tokens[stage.operators[0].module] / estimate.seq_len,
            routed=stage.routed,
            names=tuple(one.name[start:] for one in stage.operators),
        )
        for stage in stages
    )
    products = estimate.seq_len * math.fsum(shape.products for shape in shapes)
    return replace(
        estimate,
        hidden=call.hidden_states.shape[-1],
        stages=shapes,
        # an operator in groups takes fewer operations than its size suggests
        attention=max(0.0, counter.get_total_flops() - products),
    )


def _estimated(layer: DecoderLayer, model: PreTrainedModel, seq_len: int) -> LayerShape:
    """
    The shape of a layer from operators and configuration alone: each operator is a
    stage, experts are given their share of the tokens, and every layer has attention.
    """
    hidden = int(model.get_input_embeddings().weight.shape[-1])
    blocks = list(blocks_of(layer.module, layer.operators).values())
    shares = _shares(model)
    stages = []
    for wave, operator in enumerate(layer.operators):
        rows, columns = operator.weight.shape
        share = shares.get(operator.module, 1.0)
        stages.append(
            StageShape(
                columns=columns,
                rows=(rows,),
                wave=wave,
                block=_block(blocks, operator),
                returned=False,
                share=share,
                routed=share < 1,
                names=(operator.name[len(layer.name) + 1 :],),
            )
        )
    return LayerShape(
        names=(layer.name,),
        hidden=hidden,
        stages=tuple(stages),
        attention=4.0 * seq_len**2 * hidden,
        seq_len=seq_len,
        parameters=model.num_parameters(),
    )


def _block(blocks: list[list[Operator]], operator: Operator) -> int:
    return next(number for number, inside in enumerate(blocks) if operator in inside)


def _shares(model: PreTrainedModel) -> dict[torch.nn.Module, float]:
    """The share of the tokens for each expert's operators; all of them, if the
    configuration does not say how many experts a token has"""
    config = model.config.get_text_config()
    return {
        operator: min(1.0, chosen / experts.num_experts)
        for experts in model.modules()
        if isinstance(experts, LinearExperts2D)
        for chosen in [getattr(config, "num_experts_per_tok", experts.num_experts)]
        for operator in experts.modules()
    }


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


class _FirstCall(Exception):
    """Carries a call of a decoder layer out of the model."""


def _parameters(layer: DecoderLayer) -> int:
    return _entries(layer.module)


def _entries(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _call_of(
    layers: Sequence[DecoderLayer], model: PreTrainedModel, seq_len: int
) -> LayerCall:
    """What the model calls the largest layer with, of those that text reaches."""

    def stop(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise _FirstCall(LayerCall(module, args, kwargs))

    # weights without values, on what appears to be the CPU; all that does not depend
    # on them, such as masks, has its values
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
    tokens = torch.ones(1, seq_len, dtype=torch.long)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    remaining = list(layers)
    while remaining:
        largest = max(remaining, key=_parameters)
        watched = largest.module.register_forward_pre_hook(stop, with_kwargs=True)
        with (
            watched,
            patch_attr(LinearExperts2D, "forward", _evenly_routed),
            torch.no_grad(),
        ):
            try:
                model(**inputs, use_cache=False)
            except _FirstCall as seen:
                call: LayerCall = seen.args[0]
                return call
        remaining = [one for one in remaining if not _in_one_stack(one, largest)]
    raise ValueError("text reaches no layer of the model")
