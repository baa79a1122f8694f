"""Channels that change places, in models whose outputs have to stay the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import enable_quantization
from llmcompressor.modifiers.quantization import QuantizationModifier
from runs import samples
from test_finding import EACH, HEADS, KEYS, MLP, SIZE, model_of, search
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.calibration.calls import LayerInputs
from fista_modifier.calibration.contexts import calibration_runs
from fista_modifier.channels.orders import (
    Interchangeable,
    check_order,
    interchangeable,
    reordered,
)

FAMILIES = ["llama", "gemma2", "opt", "gpt2", "phi3", "qwen2", "mixtral", "gpt_neox"]
MIXTURES = {"mixtral": 4}


def channels_of(family: str) -> tuple[PreTrainedModel, LayerInputs, list]:
    model = model_of(family)
    _, calls, groups = search(model)
    found = interchangeable(groups)
    with calibration_runs(model):
        assert check_order(found, calls[0]) == found
    return model, calls, found


def shuffled(channels: Interchangeable) -> Tensor:
    """An order in which each channel stays among those that it can change with"""
    order = torch.arange(channels.group.size)
    for some in channels.sets:
        order[some] = some[torch.randperm(len(some))]
    return order


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(samples(), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_channels_in_another_order_computes_the_same(family: str) -> None:
    torch.manual_seed(0)
    model, _, found = channels_of(family)
    before = logits(model)
    changed = set()
    for channels in found:
        order = shuffled(channels)
        assert not torch.equal(order, torch.arange(len(order)))
        weights, biases = reordered(channels, order)
        for operator, weight in weights.items():
            operator.save(weight, biases.get(operator))
            changed.add(operator)
    assert changed
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_channels_of_an_mlp_and_those_within_a_head(family: str) -> None:
    _, _, found = channels_of(family)
    mlps = [one for one in found if one.group.kind == "channels"]
    assert [one.sets.shape for one in mlps] == [(1, MLP)] * MIXTURES.get(family, 1)
    [values] = [one for one in found if one.group.kind == "values"]
    separate = family in ("opt", "gpt2", "gpt_neox")
    heads, each = (HEADS, 1) if separate else (KEYS, EACH)
    assert values.columns.shape == (heads, SIZE, each)
    for size in (4, 8):
        assert values.fits(size)
    assert not values.fits(16)
    for head, columns in enumerate(values.columns):
        expected = torch.arange(each * SIZE).view(each, SIZE).T + head * each * SIZE
        assert torch.equal(columns, expected)


def test_dimensions_of_two_heads_cannot_change_places() -> None:
    model, calls, found = channels_of("llama")
    [values] = [one for one in found if one.group.kind == "values"]
    together = replace(values, sets=values.sets.reshape(1, -1))
    with calibration_runs(model):
        assert check_order([together], calls[0]) == []


def test_without_heads_values_stay_where_they_are() -> None:
    _, _, groups = search(model_of("llama"))
    groups.groups = [one for one in groups.groups if one.kind != "heads"]
    assert [one.group.kind for one in interchangeable(groups)] == ["channels"]


def test_a_quantisation_to_come_hides_nothing() -> None:
    """The toolkit enables it after a modifier's pass; its scales are not known then."""
    model = model_of("llama")
    QuantizationModifier(
        targets=["Linear"], scheme="W8A8", ignore=["re:.*lm_head"]
    ).initialize_quantization(model)
    for name, parameter in model.named_parameters():
        if name.endswith("weight_scale"):
            parameter.data.fill_(float("nan"))
    model.apply(enable_quantization)
    _, calls, groups = search(model)
    found = interchangeable(groups)
    assert sorted(one.group.kind for one in found) == ["channels", "values"]
    with calibration_runs(model):
        assert check_order(found, calls[0]) == found
    assert all(
        module.quantization_enabled
        for module in model.modules()
        if hasattr(module, "quantization_scheme")
    )
