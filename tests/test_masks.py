"""Zeros of a pruned model through further training."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from runs import prune, samples, weights
from transformers import PreTrainedModel

from fista_modifier import apply_masks_, masks_of


@pytest.fixture(params=["llama", "gpt2"])
def pruned(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = tiny_model(request.param)
    prune(model, preset="fast")
    return model


def step(model: PreTrainedModel) -> None:
    """One of fine-tuning, which gives all entries a gradient."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=samples(), labels=samples()).loss.backward()
    optimizer.step()


def test_zeros_that_training_fills_are_zeros_again(pruned: PreTrainedModel) -> None:
    before, masks = weights(pruned), masks_of(pruned)
    step(pruned)
    name = next(iter(masks))
    assert bool(
        (
            (before[f"{name}.weight"] == 0) & (weights(pruned)[f"{name}.weight"] != 0)
        ).any()
    )
    apply_masks_(pruned, masks)
    after = weights(pruned)
    for name in masks:
        weight = f"{name}.weight"
        assert torch.equal(after[weight] == 0, before[weight] == 0)
        assert not torch.equal(after[weight], before[weight])


def test_masks_are_of_what_was_pruned_and_of_nothing_else() -> None:
    model = tiny_model("llama")
    modifier = prune(model, preset="fast", targets=["re:.*q_proj"])
    assert masks_of(model).keys() == {result.name for result in modifier.results}


def test_an_output_embedding_has_a_mask_if_it_was_pruned() -> None:
    model = tiny_model("llama")
    prune(model, preset="fast", targets=["Linear", "lm_head"])
    assert masks_of(model)["lm_head"].float().mean() == 0.5


def test_operators_with_few_zeros_keep_them() -> None:
    model = tiny_model("llama")
    prune(
        model,
        preset="fast",
        mask_structure="0:0",
        sparsity=0.02,
        targets=["re:.*q_proj"],
    )
    modifier = prune(model, preset="fast", targets=["re:.*k_proj"])
    masks = masks_of(model)
    few = next(name for name in masks if name.endswith("q_proj"))
    assert 0 < float((~masks[few]).float().mean()) < 0.03
    assert masks.keys() > {result.name for result in modifier.results}


def test_a_dense_model_has_no_masks() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no sparse operator"):
        masks_of(tiny_model("llama"))


def test_masks_of_another_model_are_refused(pruned: PreTrainedModel) -> None:
    masks = masks_of(pruned)
    with pytest.raises(ValueError, match="merge its adapters first"):
        apply_masks_(tiny_model("opt"), masks)
