"""Mixtures of experts: each expert is pruned with the tokens that it is given."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import MIXTURES, tiny_model
from llmcompressor.modeling.moe.linearize import linearize_moe
from loguru import logger
from runs import prune, samples
from torch import Tensor
from torch.nn.functional import silu
from transformers import PreTrainedModel

from fista_modifier.calibration.operators import find_operators
from fista_modifier.solver import NofM


def linearized(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    linearize_moe(model)
    return model


def inputs_of(model: PreTrainedModel, name: str) -> list[Tensor]:
    """What a module is called with in a plain run of the model, call by call."""
    seen: list[Tensor] = []
    module = model.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad(), hook:
        for row in samples():
            model(row[None], use_cache=False)
    return seen


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_pruned_with_the_tokens_routed_to_them(family: str) -> None:
    dense = linearized(family)
    model = tiny_model(family)
    modifier = prune(model, preset="fast")
    of_experts = [result for result in modifier.results if ".experts." in result.name]
    assert len(of_experts) == 2 * 4 * 3
    given: Counter[str] = Counter()
    for result in modifier.results:
        assert NofM(2, 4).holds(model.get_submodule(result.name).weight)
        calls = inputs_of(dense, result.name)
        assert result.tokens == sum(call[..., 0].numel() for call in calls), result.name
        layer, _, operator = result.name.partition(".mlp.experts.")
        given[layer] += result.tokens * operator.endswith("up_proj")
    # two of four experts are given each token
    assert given["model.layers.0"] == given["model.layers.1"] == 2 * samples().numel()


def test_an_experts_error_is_that_of_its_tokens() -> None:
    """The first layer's inputs are the same in any run, so both sides can be had."""
    dense = linearized("mixtral")
    model = tiny_model("mixtral")
    results = {one.name: one for one in prune(model, preset="fast").results}
    expert = "model.layers.0.mlp.experts.2"
    gate, up, down = (f"{expert}.{name}_proj" for name in ("gate", "up", "down"))
    tokens = torch.cat(inputs_of(dense, gate))

    def hidden(of: PreTrainedModel) -> Tensor:
        part = of.get_submodule(expert)
        return silu(part.gate_proj(tokens)) * part.up_proj(tokens)

    with torch.no_grad():
        wanted = dense.get_submodule(down)(torch.cat(inputs_of(dense, down)))
        found = model.get_submodule(down)(hidden(model))
    error = float((found - wanted).norm() / wanted.norm())
    assert results[down].relative_error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("correction", ["none", "intra", "full"])
def test_an_expert_without_tokens_is_pruned_by_magnitude(correction: str) -> None:
    def model_of_five() -> PreTrainedModel:
        model = tiny_model("mixtral", num_local_experts=5)
        gate = model.model.layers[0].mlp.gate.weight.data
        # the two best of these multiples of one score never include the third
        gate[:] = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])[:, None] * gate[0]
        return model

    name = "model.layers.0.mlp.experts.2.down_proj"
    model, dense = model_of_five(), model_of_five()
    linearize_moe(dense)
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(str(message)), level="WARNING")
    try:
        modifier = prune(model, error_correction=correction)
    finally:
        logger.remove(sink)
    result = next(one for one in modifier.results if one.name == name)
    assert result.tokens == 0
    weight = dense.get_submodule(name).weight
    expected = weight * NofM(2, 4).support(weight.abs())
    assert torch.equal(model.get_submodule(name).weight, expected)
    assert any(f"No calibration token reaches {name}" in text for text in messages)


def test_routers_are_pruned_only_if_named() -> None:
    model = linearized("qwen2_moe")
    router = "model.layers.0.mlp.shared_expert_gate"
    assert isinstance(model.get_submodule(router), torch.nn.Linear)

    def names(*targets: str) -> set[str]:
        return {operator.name for operator in find_operators(model, [*targets], [])}

    assert router not in names("Linear")
    assert router in names("Linear", router)
    assert router in names("re:.*gate$")
