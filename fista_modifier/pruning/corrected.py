"""The base of this package's procedures: X*, and the training of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fista_modifier.calibration.recording import Recorded
from fista_modifier.calibration.replays import Replays, replays_of
from fista_modifier.calibration.stages import Stage, agreed, find_stages
from fista_modifier.calibration.statistics import wave_statistics
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.operators import UNCHANGED, Operator
from fista_modifier.pruning.procedures import LayerTask
from fista_modifier.pruning.reconstruction import Reconstruction
from fista_modifier.solver import GramStatistics

__all__ = ["CorrectedProcedure", "ErrorCorrection"]

ErrorCorrection = Literal["none", "intra", "full"]


@dataclass(frozen=True, kw_only=True)
class CorrectedProcedure:
    """
    The base of the procedures of this package, which go through a layer wave by wave.

    :param reconstruction: the training of a layer, once its operators are pruned
    :param error_correction: what X* is: the operator's input in the dense model
        ("none"), in the layer as far as it is pruned ("intra"), or in the model pruned
        so far ("full")
    """

    reconstruction: Reconstruction = Reconstruction()
    error_correction: ErrorCorrection = "intra"

    @property
    def reconstructs(self) -> bool:
        """True if layers are trained at all."""
        return self.reconstruction.epochs > 0

    @property
    def corrects_errors(self) -> bool:
        """True if X* follows what was pruned before; otherwise X* = X."""
        return self.error_correction != "none"

    @property
    def chains_layers(self) -> bool:
        """True if a layer depends on how those before it were pruned."""
        return self.error_correction == "full"

    @property
    def sums_in_pass(self) -> bool:
        """
        True if the toolkit's pass itself sums over the inputs of a layer's operator,
        where that is the only one whose inputs are asked for.
        """
        return False

    def recorded(self, layer: DecoderLayer) -> Recorded:
        """
        Return what has to be recorded of a layer for its task.

        :param layer: a layer with operators that are to be pruned
        :return: whether its outputs and those of its blocks are recorded
        """
        return Recorded(outputs=self.trains(layer), block_outputs=self.corrects_errors)

    def trains(self, layer: DecoderLayer) -> bool:
        """
        Say whether what is left of a layer is trained. A lone operator has no layer
        around it, and its refit is all there is.

        :param layer: any layer
        :return: whether it is trained
        """
        return self.reconstructs and layer.in_sequence and bool(layer.operators)

    def sums(
        self,
        task: LayerTask,
        operators: Sequence[Operator],
        weights: Mapping[Operator, Tensor],
        biases: Mapping[Operator, Tensor] = UNCHANGED,
    ) -> Iterator[tuple[list[Stage], list[GramStatistics], Replays]]:
        """
        Yield the stages of each wave, with the sums over their inputs and the runs that
        showed them. Nothing in a layer is as large as the sums, so the caller may empty
        the list to free them early.

        :param task: the task of the layer
        :param operators: the operators whose inputs are asked for
        :param weights: weights, out×in, of what is pruned already; the caller adds to
            them between the steps
        :param biases: biases of the operators that have got another bias, likewise
        :raises ValueError: if an activation is NaN or infinite
        """
        recording, ranks = task.recording, task.ranks
        stages = agreed(find_stages(operators, recording.inputs), operators, ranks)
        if not self.corrects_errors:
            weights = biases = UNCHANGED
        for wave, replays in replays_of(
            stages, recording, task.pruned_inputs, weights, biases
        ):
            statistics = None if replays.differ else recording.sums.take(wave)
            if statistics is None:
                statistics = wave_statistics(
                    wave,
                    replays,
                    recording.real_tokens,
                    task.on_batch,
                    ranks,
                    task.offload,
                )
            yield wave, statistics, replays
