"""Finished layers on disk, so that an interrupted run loses none of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, permutations
from pathlib import Path

from loguru import logger
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fista_modifier.distributed import Ranks
from fista_modifier.files import whole
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.pruning.procedures import PrunedLayer
from fista_modifier.pruning.results import OperatorResult, ReconstructionResult
from fista_modifier.pruning.runs import (
    RUN_FILE,
    Fingerprint,
    begin_run,
    check_run,
)

__all__ = ["FinishedLayers", "Resumption"]

BIAS = ":bias"
"""
The ending of a bias's name in a layer's file, after the operator's name. A weight has
the operator's name alone.
"""


@dataclass(frozen=True)
class _Results:
    """The results that a layer's file holds beside its weights."""

    operators: Sequence[OperatorResult]
    reconstruction: ReconstructionResult | None


class Resumption:
    """
    A run that goes on from layers on disk, or that a later run can go on from. Without
    a folder, several ranks still compare their data here.

    :param disk: finished layers, if the run can be resumed
    :param ranks: the processes of the run
    :ivar on_disk: the layers that were found there
    :ivar compares_data: whether the calibration data are to be compared
    """

    def __init__(self, disk: FinishedLayers | None, ranks: Ranks) -> None:
        self._disk = disk
        self._ranks = ranks
        self.on_disk: set[DecoderLayer] = set()
        self.compares_data = disk is not None or ranks.size > 1
        self._compared = False

    def look_for(self, layers: Sequence[DecoderLayer]) -> set[DecoderLayer]:
        """
        Find the layers that are on disk.

        :param layers: layers of the model
        :return: those that are on disk, the same on all ranks
        """
        if self._disk is None:
            return set()
        names = [layer.name for layer in layers if layer in self._disk]
        names = self._ranks.all(names)[0]  # Files may appear while the ranks look.
        self.on_disk = {layer for layer in layers if layer.name in names}
        if self.on_disk:
            logger.info(
                f"Resuming: {len(self.on_disk)} layers are in {self._disk.folder}"
            )
        return self.on_disk

    def check_data(self, batches: Sequence[str]) -> None:
        """
        Check the calibration data. This is called when the first layer has run. Further
        calls do no harm.

        :param batches: digest of each batch of this rank
        :raises ValueError: if the calibration data are not those of the layers on disk,
            or all data of one rank are among those of another
        """
        if self._compared or not self.compares_data:
            return
        self._compared = True
        of_ranks = self._ranks.all(list(batches))
        for one, other in permutations(range(len(of_ranks)), 2):
            if set(of_ranks[one]) <= set(of_ranks[other]):
                raise ValueError(
                    f"all calibration data of rank {one} are among those of rank "
                    f"{other}: let each load a part of its own, as with "
                    "llmcompressor.datasets.get_rank_partition"
                )
        if self._disk is not None:
            self._disk.check_calibration(list(chain(*of_ranks)))

    def load(self, layer: DecoderLayer) -> PrunedLayer | None:
        """
        Read what became of a layer in the run before.

        :param layer: a layer that the pipeline has left
        :return: what became of it; None if it is not on disk
        """
        if self._disk is None or layer not in self.on_disk:
            return None
        return self._disk.load(layer)

    def save(self, layer: DecoderLayer, pruned: PrunedLayer) -> None:
        """
        Write what became of a layer to disk, if the run can be resumed.

        :param layer: a layer that was pruned
        :param pruned: what became of it
        """
        if self._disk is not None:
            self._disk.save(layer, pruned)


class FinishedLayers:
    """
    A folder with one safetensors file for each finished layer, and ``run.json``, which
    says what run they belong to. Every file is there as a whole or not at all.
    Processes that prune other layers of the same run may share the folder.

    :param folder: the folder, which is created if it is missing
    :param run: fingerprint of this run
    :raises ValueError: if the folder belongs to another run, naming what differs
    """

    def __init__(self, folder: Path, run: Fingerprint) -> None:
        self.folder = folder
        self._run = run
        folder.mkdir(parents=True, exist_ok=True)
        check_run(folder, run, "layers")

    def check_calibration(self, batches: Sequence[str]) -> None:
        """
        Complete this run's fingerprint with the calibration data, before its first
        layer is pruned.

        :param batches: digest of each batch of calibration data, in order
        :raises ValueError: if the folder belongs to another run
        """
        digest = hashlib.sha256("".join(batches).encode()).hexdigest()
        self._run["calibration data"] = {
            "batches": len(batches),
            "contents and order": digest[:16],
        }
        with _written(self.folder / RUN_FILE):
            begin_run(self.folder, self._run, "layers")

    def __contains__(self, layer: DecoderLayer) -> bool:
        return self._file(layer).exists()

    def save(self, layer: DecoderLayer, pruned: PrunedLayer) -> None:
        """
        Write a finished layer to its file.

        :param layer: the layer that was finished
        :param pruned: what became of it
        :raises OSError: naming the file, if it cannot be written (a full disk); all
            files that were there stay
        """
        on_cpu = pruned.on_cpu()
        biases = {f"{name}{BIAS}": bias for name, bias in on_cpu.biases.items()}
        tensors = {
            name: tensor.contiguous()
            for name, tensor in {**on_cpu.weights, **biases}.items()
        }
        results = _Results(pruned.operators, pruned.reconstruction)
        metadata = {"results": json.dumps(asdict(results))}
        file = self._file(layer)
        with _written(file), whole(file) as unfinished:
            save_file(tensors, unfinished, metadata)

    def load(self, layer: DecoderLayer) -> PrunedLayer:
        """
        Read a finished layer from its file.

        :param layer: a finished layer
        :return: what became of it, bit for bit, on the CPU
        :raises ValueError: if its file is damaged
        """
        file = self._file(layer)
        try:
            with safe_open(file, "pt") as opened:
                results = TypeAdapter(_Results).validate_json(
                    opened.metadata()["results"]
                )
                # a file's tensors are not aligned as torch's own are, and kernels may
                # then add in another order
                tensors = {
                    name: opened.get_tensor(name).clone() for name in opened.keys()
                }
            biases = {
                name.removesuffix(BIAS): tensors.pop(name)
                for name in list(tensors)
                if name.endswith(BIAS)
            }
            return PrunedLayer(
                tensors, results.operators, results.reconstruction, biases
            )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}): delete it to prune {layer.name} anew"
            ) from error

    def _file(self, layer: DecoderLayer) -> Path:
        return self.folder / f"{layer.name}.safetensors"


@contextmanager
def _written(file: Path) -> Iterator[None]:
    """Name a file that cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {file}: {error}; the layers finished before are kept"
        ) from error
