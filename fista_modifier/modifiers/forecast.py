"""The forecast of what a recipe will do to a model, made before the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fista_modifier.cost import LayerShape, shape_of
from fista_modifier.models.classes import weightless_model
from fista_modifier.models.coverage import share_of_weights
from fista_modifier.models.experts import linearize, linearize_weightless
from fista_modifier.models.layers import check_one_tower
from fista_modifier.models.limits import check_length
from fista_modifier.models.resizing import apply_changes
from fista_modifier.modifiers.base import LayerwiseModifier
from fista_modifier.modifiers.fista import FISTAPruningModifier
from fista_modifier.modifiers.steps import check_quantisers
from fista_modifier.modifiers.structured import StructuredModifier
from fista_modifier.pruning.channels import ChannelPlan
from fista_modifier.pruning.corrected import CorrectedProcedure

__all__ = ["Forecast", "PlannedPattern", "forecasts"]

PROBES, PROBE_LENGTH = 8, 32
"""
The number of random sequences that show which channels can leave, and the most tokens
in each of them.
"""


@dataclass(frozen=True)
class PlannedPattern:
    """
    The operators that are to have one pattern.

    :param name: the pattern's name
    :param by_data: whether the data decide on the sparsity of each operator, and the
        pattern has their mean
    :param operators: number of operators
    :param weights: entries of the weights of all these operators
    :param zeros: number of these entries that will be zero
    """

    name: str
    by_data: bool
    operators: int = 0
    weights: int = 0
    zeros: int = 0


@dataclass(frozen=True)
class Forecast:
    """
    The forecast of what one modifier of a recipe will do.

    :param modifier: a modifier of this package
    :param procedure: what it does to a layer
    :param shape: the shape of the layers that it changes
    :param patterns: patterns of the operators that get zeros, the most common first
    :param share_of_layers: share of the matrices in the decoder layers that these
        operators hold
    :param plan: the plan of the channels that leave; None if none leave
    """

    modifier: LayerwiseModifier
    procedure: CorrectedProcedure
    shape: LayerShape
    patterns: Sequence[PlannedPattern] = ()
    share_of_layers: float = 0.0
    plan: ChannelPlan | None = None

    @property
    def sparsity(self) -> float:
        """Share of zeros in the weights of all operators that get some."""
        weights = sum(pattern.weights for pattern in self.patterns)
        return sum(pattern.zeros for pattern in self.patterns) / max(weights, 1)

    @property
    def kept(self) -> float:
        """Share of the layers' weights that is left."""
        if self.plan is not None:
            return 1 - self.plan.removed
        return 1 - self.sparsity * self.share_of_layers


def forecasts(
    modifiers: Sequence[Modifier],
    config: PretrainedConfig,
    seq_len: int,
    load: Callable[[], PreTrainedModel],
) -> Iterator[Forecast]:
    """
    Foresee what a recipe will do, modifier by modifier. A modifier that follows one
    that takes channels out is foreseen for the smaller model.

    :param modifiers: the modifiers of the recipe, in its order
    :param config: the model's configuration
    :param seq_len: tokens of a calibration sequence
    :param load: loads the model; it is called if channels are to leave, since only runs
        of the layers show which can
    :return: a forecast for each modifier of this package
    :raises ValueError: if the run would be refused, or none of the modifiers is one of
        this package
    """
    ours = [one for one in modifiers if isinstance(one, LayerwiseModifier)]
    if not ours:
        names = ", ".join(type(one).__name__ for one in modifiers)
        raise ValueError(
            f"the recipe has {names}, and what they take cannot be predicted: a "
            "prediction needs FISTAPruningModifier, FASPPruningModifier or "
            "SPAPPruningModifier"
        )
    dense = config
    check_length(_weightless(dense), seq_len)
    check_quantisers(_weightless(dense), modifiers)
    for modifier in ours:
        modifier.check_steps(modifiers)
        if isinstance(modifier, StructuredModifier):
            forecast = _of_channels(modifier, modifiers, load(), config, seq_len)
            assert forecast.plan is not None  # of the channels
            config = copy.deepcopy(config)
            apply_changes(config, forecast.plan.changes)
            yield forecast
        elif isinstance(modifier, FISTAPruningModifier):
            if config is not dense:  # a recipe is initialised for the dense model
                _of_patterns(modifier, dense, seq_len)
            yield _of_patterns(modifier, config, seq_len)


def _weightless(config: PretrainedConfig) -> PreTrainedModel:
    model = weightless_model(config).eval()
    linearize_weightless(model)
    return model


def _of_patterns(
    modifier: FISTAPruningModifier, config: PretrainedConfig, seq_len: int
) -> Forecast:
    model = _weightless(config)
    layers, _ = modifier.find_layers(model)
    procedure, by_data = modifier.foreseen(model, layers)
    if procedure.chains_layers:
        check_one_tower(model, layers)
    found: dict[tuple[str, bool], PlannedPattern] = {}
    names = []
    for layer in modifier.chosen_layers(layers):
        for operator in layer.operators:
            names.append(operator.name)
            pattern = procedure.patterns[operator.name]
            key = str(pattern), operator.name in by_data
            so_far = found.get(key, PlannedPattern(*key))
            weights = operator.weight.numel()
            found[key] = replace(
                so_far,
                operators=so_far.operators + 1,
                weights=so_far.weights + weights,
                zeros=so_far.zeros + round(pattern.sparsity * weights),
            )
    return Forecast(
        modifier,
        procedure,
        shape_of(config, seq_len).pruning(names),
        sorted(found.values(), key=lambda one: -one.operators),
        share_of_weights(layers, names),
    )


def _of_channels(
    modifier: StructuredModifier,
    recipe: Sequence[Modifier],
    model: PreTrainedModel,
    config: PretrainedConfig,
    seq_len: int,
) -> Forecast:
    linearize(model.eval())
    layers, _ = modifier.find_layers(model)
    procedure = modifier.foreseen(model, layers, _batches(model, seq_len))
    for other in recipe:
        if isinstance(other, QuantizationMixin):
            other.initialize_quantization(model)
    modifier.check_quantisable()
    chosen = {layer.name for layer in modifier.chosen_layers(layers)}
    consumers = [
        plan.consumer.operator.name
        for layer, plans in procedure.plan.groups.items()
        for plan in plans
        if layer in chosen
    ]
    shape = shape_of(config, seq_len).pruning(consumers)
    return Forecast(modifier, procedure, shape, plan=procedure.plan)


def _batches(model: PreTrainedModel, seq_len: int) -> list[dict[str, Tensor]]:
    """
    Return batches of random tokens. They will do, because the text does not decide
    which channels can leave.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    shape = 1, min(seq_len, PROBE_LENGTH)
    batches = []
    for _ in range(PROBES):
        tokens = torch.randint(vocabulary, shape, generator=generator)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = tokens
        batches.append(batch)
    return batches
