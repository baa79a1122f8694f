"""What the procedures of this package share: X*, and the training of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fista_modifier.calibration.replays import Replays, replays_of
from fista_modifier.calibration.stages import Stage, agreed, find_stages
from fista_modifier.calibration.statistics import wave_statistics
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.operators import UNCHANGED, Operator
from fista_modifier.pruning.procedures import LayerTask, Recorded
from fista_modifier.pruning.reconstruction import Reconstruction
from fista_modifier.solver import GramStatistics

__all__ = ["CorrectedProcedure", "ErrorCorrection"]

ErrorCorrection = Literal["none", "intra", "full"]


@dataclass(frozen=True, kw_only=True)
class CorrectedProcedure:
    """
    Goes through a layer wave by wave.

    :param reconstruction: of a layer, once its operators are pruned
    :param error_correction: what X* is: the operator's input in the dense model
        ("none"), in the layer as far as it is pruned ("intra"), or in the model pruned
        so far ("full")
    """

    reconstruction: Reconstruction = Reconstruction()
    error_correction: ErrorCorrection = "intra"

    @property
    def reconstructs(self) -> bool:
        """whether layers are trained at all"""
        return self.reconstruction.epochs > 0

    @property
    def corrects_errors(self) -> bool:
        """whether X* follows what was pruned before (otherwise X* = X)"""
        return self.error_correction != "none"

    @property
    def chains_layers(self) -> bool:
        """whether a layer depends on how those before it were pruned"""
        return self.error_correction == "full"

    def recorded(self, layer: DecoderLayer) -> Recorded:
        """
        :param layer: with operators that are to be pruned
        :return: what its task has to have
        """
        return Recorded(outputs=self.trains(layer), block_outputs=self.corrects_errors)

    def trains(self, layer: DecoderLayer) -> bool:
        """
        A lone operator has no layer around it, and its refit is all there is.

        :param layer: any
        :return: whether what is left of it is trained
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
        The stages of each wave, with the sums over their inputs and the runs that
        showed them. Nothing in a layer is as large as the sums: whoever takes them may
        empty the list.

        :param task: of the layer
        :param operators: whose inputs are asked for
        :param weights: out×in, of what is pruned already; added to between the steps
        :param biases: likewise, of operators that have got another bias
        :raises ValueError: if an activation is NaN or infinite
        """
        recording, ranks = task.recording, task.ranks
        stages = agreed(find_stages(operators, recording.inputs), operators, ranks)
        if not self.corrects_errors:
            weights = biases = UNCHANGED
        for wave, replays in replays_of(
            stages, recording, task.pruned_inputs, weights, biases
        ):
            yield (
                wave,
                wave_statistics(
                    wave,
                    replays,
                    recording.real_tokens,
                    task.on_batch,
                    ranks,
                    task.offload,
                ),
                replays,
            )
