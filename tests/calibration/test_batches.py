"""What is padding, by the user's data and not by a family's own masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from llmcompressor.core import active_session
from logs import logged
from model_kinds import KINDS
from runs import calibration, prune, samples, weights
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BartModel, MptConfig, MptForCausalLM

from fista_modifier.calibration.batches import CalibrationBatches
from fista_modifier.models.layers import mask_name

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture
def batches() -> Iterator[CalibrationBatches]:
    """One batch, which runs now."""
    state = active_session().state
    before, state.current_batch_idx = state.current_batch_idx, 0
    found = CalibrationBatches()
    found.add({"input_ids": torch.ones(2, 5), "attention_mask": MASK})
    yield found
    state.current_batch_idx = before


@pytest.mark.parametrize("shape", [(2, 5, 8), (3, 2, 5, 8), (10, 8)])
def test_a_text_layer_has_the_padding_of_the_batch(
    batches: CalibrationBatches, shape: tuple[int, ...]
) -> None:
    real = batches.real_tokens("attention_mask", torch.zeros(shape))
    assert real is not None
    assert torch.equal(real, MASK.bool())
    assert batches.tokens == 8


@pytest.mark.parametrize("shape", [(2, 9, 8), (18, 8), (2, 8)])
def test_a_mask_of_another_shape_is_not_used_and_that_is_said(
    batches: CalibrationBatches, shape: tuple[int, ...]
) -> None:
    with logged() as messages:
        assert batches.real_tokens("attention_mask", torch.zeros(shape)) is None
        assert batches.real_tokens("attention_mask", torch.zeros(shape)) is None
    (message,) = messages
    assert "its padding counts like tokens" in message


def test_a_vision_layer_has_no_padding(batches: CalibrationBatches) -> None:
    assert batches.real_tokens(None, torch.zeros(2, 5, 8)) is None


def test_masks_go_with_what_embeds_tokens() -> None:
    model = tiny_model("gemma3_vision")
    text = model.model.language_model.layers[0]
    vision = model.model.vision_tower.encoder.layers[0]
    assert mask_name(model, text) == "attention_mask"
    assert mask_name(model, vision) is None


def tiny_mpt(folder: object) -> MptForCausalLM:
    """Its mask is True where a token is hidden, and its layers are given ALiBi's."""
    torch.manual_seed(0)
    config = MptConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=2, max_seq_len=64)
    model = MptForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return MptForCausalLM.from_pretrained(folder)


def output_error(dense: Tensor, pruned: Tensor) -> float:
    return float((pruned - dense).norm() / dense.norm())


def test_mpt_is_pruned_with_all_of_its_tokens(tmp_path_factory) -> None:
    """Against the error that plain runs of the two models show for an operator."""
    folder = tmp_path_factory.mktemp("mpt")
    dense, model = tiny_mpt(folder), MptForCausalLM.from_pretrained(folder)
    tokens = samples()
    modifier = prune(
        model,
        reconstruction_epochs=0,
        oneshot_arguments={"dataset": calibration(tokens)},
    )
    assert {result.tokens for result in modifier.results} == {tokens.numel()}
    first = modifier.results[0]
    inputs: list[Tensor] = []
    dense.get_submodule(first.name).register_forward_pre_hook(
        lambda _module, args: inputs.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        for sequence in tokens:
            dense(input_ids=sequence[None])
        x = torch.cat(inputs)
        outputs = x @ dense.get_submodule(first.name).weight.T
        sparse = x @ model.get_submodule(first.name).weight.T
    assert first.relative_error == pytest.approx(
        output_error(outputs, sparse), rel=1e-3
    )


def test_keys_and_values_of_the_encoder_have_its_padding(tmp_path: Path) -> None:
    """As long as the decoder's tokens, of which other ones are padding."""
    encoder = torch.ones(3, 8, dtype=torch.long)
    decoder = encoder.clone()
    encoder[:, 5:], decoder[:, 6:] = 0, 0

    def pruned(filled_with: int) -> tuple[dict[str, int], dict[str, Tensor]]:
        tokens = samples(3, 8)
        batch = {
            "input_ids": torch.where(encoder > 0, tokens, filled_with),
            "attention_mask": encoder,
            "decoder_input_ids": tokens.flip(-1),
            "decoder_attention_mask": decoder,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            BartModel(KINDS["bart"].config()).save_pretrained(tmp_path)
        model = BartModel.from_pretrained(tmp_path)
        data: DataLoader[Any] = DataLoader(
            [batch],  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=lambda one: one,
        )
        modifier = prune(
            model, oneshot_arguments={"dataset": data, "pipeline": "basic"}
        )
        return {one.name: one.tokens for one in modifier.results}, weights(model)

    counts, one = pruned(filled_with=7)
    assert counts["decoder.layers.0.self_attn.k_proj"] == 18
    assert counts["decoder.layers.0.encoder_attn.q_proj"] == 18
    assert counts["decoder.layers.0.encoder_attn.k_proj"] == 15
    _, other = pruned(filled_with=9)
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, msg=name)
