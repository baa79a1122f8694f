"""Channels change places, so that n:m costs less, and the model stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from logs import logged
from runs import prune, samples, weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fista_modifier import FISTAPruningModifier
from fista_modifier.channels.groups import ChannelGroup, Members
from fista_modifier.channels.orders import Interchangeable
from fista_modifier.checkpoint.verification import verify
from fista_modifier.models.operators import Operator
from fista_modifier.pruning import orders
from fista_modifier.pruning.orders import best_order
from fista_modifier.solver import GramStatistics, NofM
from fista_modifier.solver.orders import regrouped

LAYER = "model.layers.0"
WIDE = {"intermediate_size": 96}


def uneven(family: str = "llama") -> PreTrainedModel:
    """Some channels are much larger than others, as in trained models."""
    model = tiny_model(family, **WIDE)
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        sizes = torch.rand(96, generator=generator) ** 3
        layer.mlp.up_proj.weight.data *= sizes[:, None]
    return model


@pytest.fixture(scope="module")
def models() -> dict[bool, tuple[PreTrainedModel, FISTAPruningModifier]]:
    """Without the order, and with it; each operator is pruned by itself."""
    found = {}
    for permuted in (False, True):
        model = uneven()
        modifier = prune(
            model, preset="fast", error_correction="none", permute_channels=permuted
        )
        found[permuted] = model, modifier
    return found


def order_of(one: Tensor, other: Tensor) -> Tensor:
    """The row of one matrix at each place of the other, which has the same rows"""
    equal = (one[None] == other[:, None]).all(-1)
    assert bool((equal.sum(0) == 1).all() and (equal.sum(1) == 1).all())
    return equal.long().argmax(1)


def weight(model: PreTrainedModel, name: str) -> Tensor:
    return model.get_submodule(f"{LAYER}.{name}").weight.data


def test_rows_of_all_producers_change_places_together(models: Any) -> None:
    (plain, _), (permuted, _) = models[False], models[True]
    orders = {
        name: order_of(weight(plain, name), weight(permuted, name))
        for name in ("mlp.gate_proj", "mlp.up_proj", "self_attn.v_proj")
    }
    assert torch.equal(orders["mlp.gate_proj"], orders["mlp.up_proj"])
    values = orders["self_attn.v_proj"]
    assert torch.equal(values // 8, torch.arange(16) // 8)  # within heads of eight
    for order in orders.values():
        assert not torch.equal(order, torch.arange(len(order)))
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        assert torch.equal(weight(plain, name), weight(permuted, name))


@pytest.mark.parametrize("name", ["mlp.down_proj", "self_attn.o_proj"])
def test_the_error_is_that_of_the_columns_in_their_order(
    models: Any, name: str
) -> None:
    (plain, before), (permuted, after) = models[False], models[True]
    dense = uneven()
    inputs = []
    dense.get_submodule(f"{LAYER}.{name}").register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        for row in samples():
            dense(row[None], use_cache=False)
    x, w = torch.cat(inputs), weight(dense, name)
    if name == "mlp.down_proj":
        order = order_of(*(weight(one, "mlp.up_proj") for one in (plain, permuted)))
    else:
        rows = order_of(*(weight(one, "self_attn.v_proj") for one in (plain, permuted)))
        # of four query heads, two share a head of the values
        order = torch.cat(
            [rows[8 * (head // 2) :][:8] % 8 + 8 * head for head in range(4)]
        )
    pruned = weight(permuted, name)
    assert NofM(2, 4).holds(pruned)
    error = float((x[:, order] @ pruned.T - x @ w.T).norm() / (x @ w.T).norm())
    errors = [
        next(one for one in run.results if one.name == f"{LAYER}.{name}")
        for run in (before, after)
    ]
    assert errors[1].relative_error == pytest.approx(error, rel=1e-4)
    if name == "mlp.down_proj":
        assert errors[1].relative_error < 0.97 * errors[0].relative_error


@pytest.mark.parametrize("family", ["opt", "gpt2", "phi3", "mixtral"])
@pytest.mark.parametrize("preset", ["default", "best"])
def test_the_model_is_no_other_than_without(
    family: str, preset: str, tmp_path: Path
) -> None:
    dense, errors = tiny_model(family), []
    with torch.no_grad():
        expected = dense(samples()).logits
    for permuted in (False, True):
        model = tiny_model(family)
        modifier = prune(model, preset=preset, permute_channels=permuted)
        for result in modifier.results:
            operator = Operator(result.name, model.get_submodule(result.name))
            assert NofM(2, 4).holds(operator.weight)
        with torch.no_grad():
            found = model(samples()).logits
        errors.append(float((found - expected).norm() / expected.norm()))
    # rows or biases in a wrong place would make it about 1
    assert errors[1] < 1.3 * errors[0]
    model.save_pretrained(tmp_path)
    assert verify(tmp_path).passed
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)(samples()).logits
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-5)


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    pairs = zip(weights(one).values(), weights(other).values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    "fields",
    [
        {"mask_structure": "0:0", "sparsity": 0.5},
        {"patterns": {"re:.*(up|v)_proj": 0.5}},
        {"ignore": ["re:.*(up|v)_proj", "lm_head"]},
    ],
    ids=["unstructured", "producers unstructured", "producers dense"],
)
def test_without_n_of_m_all_around_nothing_changes_places(
    fields: dict[str, Any],
) -> None:
    plain, permuted = uneven(), uneven()
    with logged() as said:
        prune(plain, preset="fast", **fields)
        assert not [one for one in said if "permute_channels" in one]
        prune(permuted, preset="fast", permute_channels=True, **fields)
    assert same(plain, permuted)
    assert [one for one in said if "permute_channels: true has no effect" in one]


def test_zeros_of_before_change_places_too() -> None:
    model = uneven()
    prune(model, mask_structure="0:0", sparsity=0.3, preset="fast")
    prune(model, preset="fast", permute_channels=True, preserve_sparsity_mask=True)
    for layer in model.model.layers:
        assert NofM(2, 4).holds(layer.mlp.down_proj.weight)


def test_one_shot_warm_starts_are_refused() -> None:
    with pytest.raises(ValueError, match="permute_channels: a warm start of 'wanda'"):
        FISTAPruningModifier(
            mask_structure="2:4", permute_channels=True, warm_start="wanda"
        )


def test_a_layer_that_the_data_do_not_reach_is_no_obstacle() -> None:
    """The vision tower of Gemma 3, which is given text."""
    model = tiny_model("gemma3_vision")
    modifier = prune(model, preset="fast", permute_channels=True)
    assert not any("vision_tower" in result.name for result in modifier.results)
    assert modifier.unfinished == []


def test_finished_layers_are_taken_up_in_their_order(tmp_path: Path) -> None:
    def pruned(**fields: Any) -> PreTrainedModel:
        model = uneven()
        prune(model, preset="fast", permute_channels=True, **fields)
        return model

    whole = pruned()
    pruned(layers="0", resume_dir=str(tmp_path / "layers"))
    assert same(pruned(resume_dir=str(tmp_path / "layers")), whole)


def test_some_of_many_rows_show_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third row is what counts, by Wanda's squared scores; others are larger."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48, bias=False)
    layer.weight.data *= torch.rand(64) ** 3
    layer.weight.data[::3] *= 0.1
    features = torch.randn(256, 64) * torch.rand(64)
    statistics = GramStatistics.empty(64)
    statistics.accumulate(features)
    members = Members(Operator("down", layer), torch.arange(64)[:, None])
    group = ChannelGroup("channels", (), (members,))
    channels = Interchangeable(group, torch.arange(64)[None])
    scores = layer.weight.data.square() * features.square().sum(0)
    expected = regrouped(scores[::3], NofM(2, 4))
    assert not torch.equal(best_order(channels, statistics, NofM(2, 4)), expected)
    monkeypatch.setattr(orders, "ROWS", 16)
    assert torch.equal(best_order(channels, statistics, NofM(2, 4)), expected)
