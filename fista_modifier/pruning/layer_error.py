"""The error of a pruned layer: of its output, and of its operators'."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fista_modifier.calibration.calls import LayerCall, LayerInputs
from fista_modifier.calibration.padding import RealTokens, real_rows
from fista_modifier.calibration.pieces import Piece, pieces_of
from fista_modifier.calibration.recording import Recording
from fista_modifier.models.operators import Operator, replaced_weights

__all__ = ["LayerError"]

SMALLEST = 1e-12
"""
The least norm by which an error is divided. It matters where an output is zero.
"""
LEAST_SHARE = 1e-6
"""
The least share of a feature in the output, beside the mean share of all. It matters for
features that are always zero.
"""


class LayerError:
    """
    The error of a pruned layer, relative to each token and each feature of the dense
    layer's output: see :func:`fista_modifier.pruning.reconstruction.reconstruct`.

    :param recording: the recording of the dense layer, with its outputs
    :param inputs: what the pruned layer is called with
    :param operators: the pruned operators, which have their dense weights now
    :param biases: biases of operators that have got another bias
    """

    def __init__(
        self,
        recording: Recording,
        inputs: LayerInputs,
        operators: Iterable[Operator],
        biases: Mapping[Operator, Tensor],
    ) -> None:
        self.layer = inputs.layer
        self.biases = biases
        self._recording = recording
        self._inputs = inputs
        # A piece is run several times, and its inputs come from off the device.
        self._dense_call = lru_cache(maxsize=1)(partial(_call, recording.inputs))
        self._own_call = self._dense_call
        if inputs is not recording.inputs:
            self._own_call = lru_cache(maxsize=1)(partial(_call, inputs))
        self._dense = {operator: operator.weight for operator in operators}
        self._dense_biases = {one: one.module.bias.data for one in biases}
        self._last: tuple[Piece, Tensor] | None = None
        device = get_execution_device(inputs.layer)
        self._scales = _feature_scales(recording, device)

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._inputs)

    def pieces(self, tokens: int) -> list[Piece]:
        """
        Return pieces of the batches, while the operators have their dense weights.

        :param tokens: tokens of a piece
        :return: the pieces of all batches, in order
        """
        recording = self._recording
        return pieces_of(
            recording.inputs, recording.outputs, recording.real_tokens, tokens
        )

    def of_piece(self, piece: Piece, target: Tensor) -> Tensor:
        """
        Run the layer on a piece of a batch, with the weights and biases that it has
        now.

        :param piece: the piece
        :param target: the dense layer's output for it
        :return: ‖o* − o‖² / ‖o‖² of each real token, in float32
        """
        output = self._own_call(piece).run()
        return self._of_output(output, piece, target)

    def target_of(self, piece: Piece) -> Tensor:
        """
        Return the dense layer's output for a piece. For a part of a sequence it is run,
        as if there were nothing else of the sequence. The last target is kept.

        :param piece: the piece
        :return: the output, sequences×tokens×features
        """
        if not piece.is_cut:
            return piece.of_output(self._recording.outputs[piece.batch])
        if self._last is None or self._last[0] != piece:
            with torch.no_grad(), replaced_weights(self._dense, self._dense_biases):
                self._last = piece, self._dense_call(piece).run()
        return self._last[1]

    def of_tokens(self, batch: int) -> Tensor:
        """
        Run the layer on a batch, with the weights and biases that it has now.

        :param batch: the number of the batch
        :return: ‖o* − o‖² / ‖o‖² of each real token, in float32
        """
        piece = Piece(batch)
        return self.of_piece(piece, self.target_of(piece))

    def root_mean(self, batches: Iterable[int]) -> float:
        """
        Return the error of the layer, with the weights and biases that it has now.

        :param batches: the numbers of the batches to measure
        :return: the root mean square over their real tokens
        """
        return _root_mean(map(self.of_tokens, batches))

    @property
    def features(self) -> int:
        """The number of features of the layer's output."""
        return len(self._scales)

    def with_operators(
        self, weights: Mapping[Operator, Tensor], batches: Iterable[int]
    ) -> tuple[float, dict[str, float]]:
        """
        Return the error of the layer, and the relative error of each operator.

        :param weights: out×in weight of each operator
        :param batches: the numbers of the batches to measure
        :return: the root mean square over the layer's real tokens; and
            ‖W* X* − W X‖_F / ‖W X‖_F by the operators' names, without operators that
            not all tokens reach exactly once
        """
        of_layer: list[Tensor] = []
        squared: defaultdict[str, float] = defaultdict(float)
        power: defaultdict[str, float] = defaultdict(float)
        for batch in batches:
            real = self._recording.real_tokens[batch]
            dense, _ = _outputs(weights, self._recording.inputs[batch], real)
            with replaced_weights(weights, self.biases):
                pruned, output = _outputs(weights, self._inputs[batch], real)
            target = self._recording.outputs[batch]
            of_layer.append(self._of_output(output, Piece(batch), target))
            for operator, output in dense.items():
                other = pruned.get(operator)
                if other is not None and len(other) == len(output):
                    squared[operator.name] += float((other - output).square().sum())
                    if operator.module.bias is not None:
                        output = output - operator.module.bias
                    power[operator.name] += float(output.square().sum())
        return _root_mean(of_layer), {
            name: math.sqrt(error / power[name]) if power[name] else 0.0
            for name, error in squared.items()
        }

    def _of_output(self, output: Tensor, piece: Piece, target: Tensor) -> Tensor:
        real = self._recording.real_tokens[piece.batch].own
        real = None if real is None else piece.of_output(real)
        return _token_errors(output, target, real, self._scales)


def _call(inputs: LayerInputs, piece: Piece) -> LayerCall:
    return inputs.fetch(piece.batch, piece.of_call)


def _feature_scales(recording: Recording, device: torch.device) -> Tensor:
    """
    Return 1 / √s_d of each feature d on a device, in float32. s_d is its share in the
    sum of squares of a real token's output, as a mean over the tokens of all batches.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for output, real in zip(recording.outputs, recording.real_tokens, strict=True):
        squares = real_rows(output.to(device), real.own).float().square()
        of_tokens = squares / squares.sum(-1, keepdim=True).clamp_min(SMALLEST)
        total = total + of_tokens.sum(0, dtype=torch.float64)
    shares = total / total.sum().clamp_min(SMALLEST)
    return shares.clamp_min(LEAST_SHARE / len(shares)).rsqrt().float()


def _token_errors(
    output: Tensor, target: Tensor, real: Tensor | None, scales: Tensor
) -> Tensor:
    """Return ‖o* − o‖² / ‖o‖² of each real token of a batch, with scaled features."""
    scales = scales.to(output.device)
    target = target.to(output.device).float() * scales
    norms = target.square().sum(-1).clamp_min(SMALLEST)
    errors = (output.float() * scales - target).square().sum(-1) / norms
    if real is None:
        return errors.flatten()
    # Some layers have their tokens in one row, and some several outputs for each token.
    real = real.to(errors.device)
    where = real if errors.shape[-2:] == real.shape else real.flatten()
    return errors[..., where].flatten()


def _root_mean(squares: Iterable[Tensor]) -> float:
    return float(torch.cat(list(squares)).mean(dtype=torch.float64).sqrt())


def _outputs(
    operators: Iterable[Operator], call: LayerCall, real: RealTokens
) -> tuple[dict[Operator, Tensor], Tensor]:
    """
    Run a layer and return the outputs of each operator that all tokens reach exactly
    once (real tokens × out features, float32), and the output of the layer.
    """
    outputs: defaultdict[Operator, list[Tensor]] = defaultdict(list)
    partly: set[Operator] = set()

    def record(operator: Operator) -> RemovableHandle:
        def hook(_module: torch.nn.Module, args: Any, output: Tensor) -> None:
            tokens = args[0].shape[:-1].numel()
            if tokens != call.tokens and not call.is_context(args[0]):
                partly.add(operator)  # It is an expert.
            outputs[operator].append(real.rows(output, call, args[0]).float())

        return operator.module.register_forward_hook(hook)

    with ExitStack() as hooks:
        for operator in operators:
            hooks.enter_context(record(operator))
        output = call.run()
    whole = {
        operator: seen[0]
        for operator, seen in outputs.items()
        if len(seen) == 1 and operator not in partly
    }
    return whole, output
