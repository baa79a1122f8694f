"""Pieces of calibration sequences, on layers of real families."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import tiny_model
from runs import samples

from fista_modifier.calibration.pieces import Piece, pieces_of
from fista_modifier.calibration.replay import LayerInputs, RealTokens, calibration_runs

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
        # a sequence of its own: the first token, and the part, at the first positions
        states = single[number].hidden_states
        part = torch.cat([states[:, :1], states[:, piece.start : piece.stop]], 1)
        call = Piece(0, stop=9).of_call(single[number])
        with calibration_runs(model):
            expected = call.layer(part, *call.args[1:], **call.kwargs)
        expected = expected if isinstance(expected, torch.Tensor) else expected[0]
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


def test_what_looks_ahead_stays_whole() -> None:
    class Mean(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states + hidden_states.mean(1, keepdim=True)

    inputs = LayerInputs(Mean())
    inputs.append((torch.randn(3, LENGTH, 8),), {})
    outputs = [call.run() for call in inputs]
    pieces = pieces_of(inputs, outputs, everything(inputs), 12)
    assert pieces == [Piece(0, row, row + 1) for row in range(3)]


def test_batches_of_one_short_sequence_are_pieces() -> None:
    _, inputs, outputs = seen("llama")
    pieces = pieces_of(inputs, outputs, everything(inputs), LENGTH)
    assert pieces == [Piece(batch) for batch in range(COUNT)]
