"""The recordings and checks of the toolkit's own passes over the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.calibration.activations import ActivationStorage
from fista_modifier.calibration.attention import FusedAttention
from fista_modifier.calibration.batches import CalibrationBatches
from fista_modifier.calibration.recording import Hook, Recorded, Recording
from fista_modifier.calibration.reference import ReferenceRun
from fista_modifier.models.layers import DecoderLayer

__all__ = ["CalibrationPasses"]


class CalibrationPasses:
    """
    The toolkit's passes over the layers, and the recordings of what each layer is
    called with.

    :param model: the model being calibrated
    :param layers: layers of the model, lone operators after the decoder layers
    :param storage: where activations wait
    :param compared: whether the batches are to be compared with those of other runs or
        ranks
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[DecoderLayer],
        storage: ActivationStorage,
        compared: bool = False,
    ) -> None:
        self._model = model
        self._layers = layers
        self._storage = storage
        self._recordings: dict[DecoderLayer, Recording] = {}
        self._attention = FusedAttention(model)
        self._batches = CalibrationBatches(compared)
        self._reference = ReferenceRun(model, layers)

    @property
    def digests(self) -> list[str]:
        """The digest of each batch so far, in order, if they are to be compared."""
        return self._batches.digests

    def count_batches(self) -> Hook:
        """
        Return a hook that counts the batches. It must stay until the last layer has
        run.
        """
        return self._model, self._batches.on_model_call, "forward_pre"

    def record(
        self, layer: DecoderLayer, wanted: Recorded, offload: bool
    ) -> Iterator[Hook]:
        """
        Start the recording of a layer.

        :param layer: the layer to record
        :param wanted: what is recorded beside what the layer is called with
        :param offload: whether to keep the n×n matrices of sums in main memory
        :return: the hooks that must stay until the pipeline leaves the layer
        """
        self._recordings[layer] = Recording(
            layer.module,
            layer.operators,
            wanted,
            self._storage,
            padding=partial(self._batches.real, layer.mask_name),
            others_sum=lambda: any(one.sums for one in self._recordings.values()),
            offload=offload,
        )
        return self._recordings[layer].hooks()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """
        Watch the calibration epoch. The batches are recorded when they are loaded, the
        first one also runs through the model itself, and layers get fused attention
        where it agrees with eager attention.
        """
        masks = {layer.module: layer.mask_name for layer in self._layers}

        def padding(layer: torch.nn.Module, hidden_states: Tensor) -> Tensor | None:
            return self._batches.real_tokens(masks[layer], hidden_states)

        def run_plainly(batch: dict[str, Any]) -> None:
            with self._attention.suspended():
                self._reference.run(batch)

        in_sequence = [layer.module for layer in self._layers if layer.in_sequence]
        with (
            self._batches.watched(run_plainly),
            self._attention.in_passes(in_sequence, padding),
        ):
            yield

    def running(self, layer: DecoderLayer) -> AbstractContextManager[None]:
        """Return a context in which the layer runs as in the toolkit's passes."""
        return self._attention.used(layer.module)

    def has_run(self, layer: DecoderLayer) -> bool:
        """Say whether the layer was recorded in a batch."""
        recording = self._recordings.get(layer)
        return recording is not None and len(recording.inputs) > 0

    def check_any_ran(self) -> None:
        """
        Refuse a pipeline that ran no layer that was to be recorded.

        :raises ValueError: if the pipeline ran the model on no data
        """
        if self._recordings and not any(map(self.has_run, self._recordings)):
            raise ValueError(
                "FISTAPruningModifier needs calibration, and the pipeline ran the "
                "model on no data: leave oneshot's pipeline at 'independent'; "
                "'datafree' is for modifiers that need none"
            )

    def take(self, layer: DecoderLayer) -> Recording | None:
        """
        Return what was recorded of a layer, and keep it no longer.

        :param layer: a layer that the pipeline has left
        :return: its recording; None if there is none
        """
        return self._recordings.pop(layer, None)

    def reason_to_skip(self, layer: DecoderLayer) -> str | None:
        """
        Say why a layer cannot be pruned. Warn if it can, but was given few tokens.

        :param layer: a layer that the pipeline has left
        :return: the reason; None if it can be pruned
        :raises RuntimeError: if the layer runs otherwise than in the model itself
        """
        recording = self._recordings[layer]
        if not len(recording.inputs):
            return "the calibration data do not reach it"
        if self._calls_of(layer, recording) > 1:
            return "the model runs it several times for each batch"
        if layer.in_sequence:
            with self.running(layer):
                self._reference.check(
                    layer, recording.inputs[0], recording.real_tokens[0].own
                )
        self._warn_of_few_tokens(layer, recording)
        return None

    def _calls_of(self, layer: DecoderLayer, recording: Recording) -> int:
        calls = self._reference.calls(layer)
        if calls is None:  # the pipeline runs the model itself
            calls = len(recording.inputs) // max(len(self._batches), 1)
        return calls

    def _warn_of_few_tokens(self, layer: DecoderLayer, recording: Recording) -> None:
        given = self._batches.tokens
        reads_text = layer.in_sequence and layer.mask_name == "attention_mask"
        if reads_text and recording.tokens < given / 2:
            logger.warning(
                f"{layer.name} is given {recording.tokens} of the {given} tokens of "
                "the calibration data: what is pruned in it rests on few data"
            )
