"""The choice of the rank that prunes a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fista_modifier.calibration.recording import Recording
from fista_modifier.distributed import ALONE, Distribution, Ranks
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.pruning.procedures import PrunedLayer

__all__ = ["Rounds", "WaitingLayer"]


@dataclass(frozen=True)
class WaitingLayer:
    """
    A layer that the pipeline has left, and that is not pruned yet.

    :param layer: the layer
    :param recording: the recording of the layer; None on ranks that do not prune it
    """

    layer: DecoderLayer
    recording: Recording | None


class Rounds:
    """
    The layers that wait to be pruned. With several ranks, either each prunes a layer of
    its own ("layers": layers wait until there is one for each rank, and are pruned in
    one round), or all of them prune the same one ("data").

    :param ranks: the processes of the run
    :param distribution: what they share out
    """

    def __init__(self, ranks: Ranks, distribution: Distribution) -> None:
        shares_layers = distribution == "layers"
        self._by_layers = ranks if shares_layers else ALONE
        self.of_one_layer = ALONE if shares_layers else ranks
        self._waiting: list[WaitingLayer] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def is_full(self) -> bool:
        """True if each rank has a layer to prune."""
        return len(self._waiting) == self._by_layers.size

    def count(self, layers: int) -> int:
        """
        Return how many of so many layers this rank prunes, at most.

        :param layers: number of layers
        :return: the number for this rank
        """
        return -(-layers // self._by_layers.size)

    def add(self, layer: DecoderLayer, recording: Recording) -> None:
        """
        Add a layer to those that wait. Its recording goes to the rank that will prune
        it.

        :param layer: a layer that the pipeline has left
        :param recording: what this rank recorded of it
        """
        owner = len(self._waiting)
        gathered = recording.gathered(self._by_layers, owner)
        mine = owner == self._by_layers.rank
        self._waiting.append(WaitingLayer(layer, gathered if mine else None))

    def prune(
        self, work: Callable[[DecoderLayer, Recording], PrunedLayer]
    ) -> Iterator[tuple[WaitingLayer, PrunedLayer]]:
        """
        Prune the layers that wait. Each rank prunes the layer that it has the data of,
        and all ranks get all results.

        :param work: prunes one layer
        :return: each layer that waited, and what became of it
        """
        waiting, self._waiting = self._waiting, []

        def prune_mine() -> PrunedLayer | None:
            if self._by_layers.rank >= len(waiting):
                return None
            mine = waiting[self._by_layers.rank]
            assert mine.recording is not None  # The owner has it.
            pruned = work(mine.layer, mine.recording)
            return pruned.on_cpu() if self._by_layers.size > 1 else pruned

        of_ranks = self._by_layers.each(prune_mine)
        for one, pruned in zip(waiting, of_ranks, strict=False):
            assert pruned is not None  # There is one for each layer.
            yield one, pruned
