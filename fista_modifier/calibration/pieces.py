"""Pieces of calibration sequences, with which a layer can be run by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fista_modifier.calibration.calls import LayerCall, LayerInputs
from fista_modifier.calibration.padding import RealTokens
from fista_modifier.calibration.tensors import same_output

__all__ = ["Piece", "pieces_of"]


@dataclass(frozen=True)
class Piece:
    """
    A piece of one batch: some of its sequences, or some tokens of one of them.

    A piece of a sequence is run as a sequence of its own, whose tokens keep their
    positions, masks and whatever else the layer is given for each of them. It has the
    sequence's first token before its own: many heads attend to that token where they
    have nothing to attend to.

    :param batch: the number of the batch
    :param first: the first of the sequences
    :param last: the sequence after the last; None for all of them
    :param start: the first of the tokens
    :param stop: the token after the last; None for whole sequences
    """

    batch: int
    first: int = 0
    last: int | None = None
    start: int = 0
    stop: int | None = None

    @property
    def is_cut(self) -> bool:
        """Whether the piece has a part of the tokens, and so another context."""
        return self.stop is not None

    def of_call(self, call: LayerCall) -> LayerCall:
        """
        Cut what a layer is called with.

        :param call: the call of the layer for the whole batch
        :return: the call for this piece
        """
        sequences, length = call.hidden_states.shape[:2]
        own = self.of_output(call.hidden_states)

        def cut(value: Tensor) -> Tensor:
            if value.ndim > 1 and value.shape[0] == sequences:
                value = value[self.first : self.last]
            for dim, size in enumerate(value.shape):
                if size == length and (dim or value.ndim == 1):
                    value = self._of_tokens(value, dim)
            return value

        others: tuple[Any, dict[str, Any]] = (call.args[1:], call.kwargs)
        args, kwargs = tree_map_only(Tensor, cut, others)
        return replace(call, args=(own, *args), kwargs=kwargs)

    def of_output(self, output: Tensor) -> Tensor:
        """
        Cut the layer's input or output, or a mask of the batch's tokens.

        :param output: sequences×tokens×…
        :return: the part of this piece
        """
        return self._of_tokens(output[self.first : self.last], 1)

    def _of_tokens(self, value: Tensor, dim: int) -> Tensor:
        if self.stop is None:
            return value
        own = value.narrow(dim, self.start, self.stop - self.start)
        return torch.cat((value.narrow(dim, 0, 1), own), dim) if self.start else own


def pieces_of(
    inputs: LayerInputs,
    outputs: Sequence[Tensor],
    real_tokens: Sequence[RealTokens],
    tokens: int,
) -> list[Piece]:
    """
    Cut all batches into pieces of about as many tokens, so that what is done with them
    one after the other hardly depends on how sequences were batched.

    Sequences without padding are cut where the layer, run with their first piece
    alone, has the output that it has with all of the sequence, and where no later token
    has a gradient from that output: layers that look ahead run whole sequences. Batches
    are taken apart where the layer has the same output for the first of their
    sequences. All is tried once, on the first batch that it is for.

    :param inputs: what the layer is called with
    :param outputs: its output for each batch
    :param real_tokens: for each batch, what is not padding
    :param tokens: tokens of a piece; of sequences that are cut one more, but for the
        first piece
    :return: the pieces of all batches, in order
    """
    works: dict[bool, bool] = {}

    def can_be_cut(piece: Piece) -> bool:
        if piece.is_cut not in works:
            call, output = inputs[piece.batch], outputs[piece.batch]
            works[piece.is_cut] = _runs_alone(piece, call, output)
        return works[piece.is_cut]

    pieces: list[Piece] = []
    for batch, (output, real) in enumerate(zip(outputs, real_tokens, strict=True)):
        if output.ndim != 3:
            pieces.append(Piece(batch))
            continue
        count, length = output.shape[:2]
        together = max(tokens // length, 1)
        apart = [Piece(batch, row, row + together) for row in range(0, count, together)]
        if len(apart) == 1 or not can_be_cut(apart[0]):
            apart = [Piece(batch)]
        parts = list(_parts(length, tokens)) if real.own is None else []
        for piece in apart:
            cut = [replace(piece, start=start, stop=stop) for start, stop in parts]
            pieces += cut if len(cut) > 1 and can_be_cut(cut[0]) else [piece]
    return pieces


def _parts(length: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of parts of equal length."""
    count = math.ceil(length / tokens)
    bounds = [round(number * length / count) for number in range(count + 1)]
    yield from zip(bounds, bounds[1:], strict=False)


def _runs_alone(piece: Piece, call: LayerCall, output: Tensor) -> bool:
    """Say whether the layer has the same output for a piece as within the batch."""
    try:
        with torch.no_grad():
            alone = piece.of_call(call).run()
            same = same_output(alone, piece.of_output(output).to(alone.device))
        return same and not (piece.stop and _looks_ahead(call, piece.stop))
    except (RuntimeError, ValueError, IndexError):  # arguments of other shapes
        return False


def _looks_ahead(call: LayerCall, tokens: int) -> bool:
    """
    Say whether the layer's output for the first tokens depends on later ones, by its
    gradient. In 16 bits, a change of the output would look like rounding.
    """
    call = Piece(0, 0, 1).of_call(call)
    hidden_states = call.hidden_states.detach().requires_grad_()
    with torch.enable_grad():
        output = replace(call, args=(hidden_states, *call.args[1:])).run()[:, :tokens]
        # A norm at the end of the layer has no gradient of a plain sum.
        slope = torch.linspace(-1, 1, output.numel()).cos().view(output.shape)
        (gradient,) = torch.autograd.grad(output, hidden_states, slope.to(output))
    return bool(gradient[:, tokens:].any())
