"""Pieces of calibration sequences, on layers of real families."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from families import tiny_model
from runs import samples
from torch.utils._pytree import tree_map_only

from fista_modifier.calibration.calls import LayerInputs
from fista_modifier.calibration.contexts import calibration_runs
from fista_modifier.calibration.padding import RealTokens
from fista_modifier.calibration.pieces import Piece, pieces_of

COUNT, LENGTH = 4, 24


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def seen(
    family: str, batch_size: int = 1, **fields: Any
) -> tuple[Any, LayerInputs, list[torch.Tensor]]:
    """The second layer of a model, what it is called with and what it returns."""
    model = tiny_model(family, **fields)
    layer = model.get_decoder().layers[1]
    inputs = LayerInputs(layer)
    with calibration_runs(model):
        with layer.register_forward_pre_hook(inputs.remember, with_kwargs=True):
            for batch in samples(COUNT, LENGTH).split(batch_size):
                model(input_ids=batch, attention_mask=torch.ones_like(batch))
        outputs = [call.run() for call in inputs]
    return model, inputs, outputs


def hidden(tokens: list[int], value: torch.Tensor) -> torch.Tensor:
    """A mask in which nobody sees some tokens, and other tensors as they are."""
    if value.shape[-2:] != (LENGTH, LENGTH):
        return value
    mask = value.clone()
    mask[..., tokens] = torch.finfo(mask.dtype).min
    return mask


def everything(inputs: LayerInputs) -> list[RealTokens]:
    return [RealTokens()] * len(inputs)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma3", "opt"])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_sequences_are_cut_into_parts_whatever_their_batches_are(
    family: str, batch_size: int
) -> None:
    model, inputs, outputs = seen(family, batch_size)
    with calibration_runs(model):
        pieces = pieces_of(inputs, outputs, everything(inputs), 10)
        found = [piece.of_call(inputs[piece.batch]).run() for piece in pieces]
    _, single, whole = seen(family)
    places = [(piece.batch * batch_size + piece.first) for piece in pieces]
    assert places == [number for number in range(COUNT) for _ in range(3)]
    assert [(piece.start, piece.stop) for piece in pieces[:3]] == [
        (0, 8),
        (8, 16),
        (16, 24),
    ]
    for number, piece, output in zip(places, pieces, found, strict=True):
        assert output.shape[:2] == (1, 9 if piece.start else 8)
        if not piece.start:
            assert torch.allclose(output, whole[number][:, :8], atol=1e-5)
            continue
        # as if nobody saw any other token but the first one and those of the part
        own = [0, *range(piece.start, piece.stop)]
        call = single[number]
        others = [token for token in range(LENGTH) if token not in own]
        args, kwargs = tree_map_only(
            torch.Tensor, partial(hidden, others), (call.args, call.kwargs)
        )
        with calibration_runs(model):
            expected = replace(call, args=args, kwargs=kwargs).run()[:, own]
        assert torch.allclose(output, expected, atol=1e-5)


def test_short_sequences_stay_together() -> None:
    model, inputs, outputs = seen("llama", 4)
    with calibration_runs(model):
        pieces = pieces_of(inputs, outputs, everything(inputs), 2 * LENGTH + 1)
        assert pieces == [Piece(0, 0, 2), Piece(0, 2, 4)]
        together = [piece.of_call(inputs[0]).run() for piece in pieces]
    assert torch.allclose(torch.cat(together), outputs[0], atol=1e-5)


def test_padded_sequences_stay_whole() -> None:
    model, inputs, outputs = seen("llama", 2)
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :3] = False
    with calibration_runs(model):
        pieces = pieces_of(inputs, outputs, [RealTokens(real), RealTokens()], 12)
    assert [(piece.batch, piece.is_cut) for piece in pieces] == [
        *[(0, False)] * 2,
        *[(1, True)] * 4,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [1.0, 1e-3])
def test_what_looks_ahead_stays_whole(dtype: torch.dtype, share: float) -> None:
    class Mean(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states + share * hidden_states.mean(1, keepdim=True)

    inputs = LayerInputs(Mean())
    inputs.append((torch.randn(3, LENGTH, 8, dtype=dtype),), {})
    outputs = [call.run() for call in inputs]
    pieces = pieces_of(inputs, outputs, everything(inputs), 12)
    assert pieces == [Piece(0, row, row + 1) for row in range(3)]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_causal_attention_is_told_from_another_by_16_bits(bidirectional: bool) -> None:
    class Attention(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            heads = hidden_states.unsqueeze(1)
            seen = torch.nn.functional.scaled_dot_product_attention(
                heads, heads, heads, is_causal=not bidirectional
            )
            # a norm at the end, as in post-norm models
            mixed = hidden_states + 1e-2 * seen.squeeze(1)
            return torch.nn.functional.layer_norm(mixed, (8,))

    inputs = LayerInputs(Attention())
    inputs.append((torch.randn(1, LENGTH, 8, dtype=torch.bfloat16),), {})
    outputs = [call.run() for call in inputs]
    pieces = pieces_of(inputs, outputs, everything(inputs), 12)
    assert [piece.is_cut for piece in pieces] == [not bidirectional] * len(pieces)


def test_what_a_layer_is_given_for_each_token_is_that_of_the_piece() -> None:
    class Sum(torch.nn.Module):
        def forward(
            self, hidden_states: torch.Tensor, embeddings: torch.Tensor
        ) -> torch.Tensor:
            return hidden_states + embeddings

    states, embeddings = torch.randn(2, 1, LENGTH, 8)
    inputs = LayerInputs(Sum())
    inputs.append((states,), {"embeddings": embeddings})
    outputs = [call.run() for call in inputs]
    _, later = pieces_of(inputs, outputs, everything(inputs), 12)
    own = [0, *range(12, 24)]
    assert torch.equal(later.of_call(inputs[0]).run(), outputs[0][:, own])


def test_batches_of_one_short_sequence_are_pieces() -> None:
    _, inputs, outputs = seen("llama")
    pieces = pieces_of(inputs, outputs, everything(inputs), LENGTH)
    assert pieces == [Piece(batch) for batch in range(COUNT)]
