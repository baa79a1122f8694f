"""Which layer is pruned when and by whom, while the toolkit's pipeline goes by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, permutations
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.calibration.activations import MAIN_MEMORY, ActivationStorage
from fista_modifier.calibration.attention import FusedAttention
from fista_modifier.calibration.batches import CalibrationBatches
from fista_modifier.calibration.recording import Hook, Recording
from fista_modifier.calibration.reference import ReferenceRun
from fista_modifier.calibration.replay import calibration_runs
from fista_modifier.calibration.stream import PrunedStream
from fista_modifier.distributed import ALONE, Distribution, Ranks
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.operators import Operator
from fista_modifier.pruning.layer import PrunedLayer, prune_layer
from fista_modifier.pruning.procedures import Procedure
from fista_modifier.pruning.progress import RunProgress
from fista_modifier.pruning.results import OperatorResult, ReconstructionResult
from fista_modifier.pruning.resume import CallDigest, FinishedLayers
from fista_modifier.solver import SparsityPattern

__all__ = ["Method", "Schedule"]


@dataclass(frozen=True)
class Method:
    """
    What is done and how.

    :param patterns: sparsity asked for, of each operator by its name
    :param procedure: for each layer
    :param offload_hessians: whether Gram matrices stay in main memory
    :param storage: where activations wait between the passes
    """

    patterns: Mapping[str, SparsityPattern]
    procedure: Procedure
    offload_hessians: bool = False
    storage: ActivationStorage = MAIN_MEMORY


class Schedule:
    """
    Prunes each layer when the pipeline has run it with all calibration data, and stores
    the result when it has left it, so that its passes carry the dense activations.

    What is on disk already is not pruned again. With several ranks, either each prunes
    a layer of its own ("layers": they wait until there is one for each), or all of them
    the same one ("data").

    :param model: being calibrated
    :param layers: of the model; lone operators after the decoder layers
    :param chosen: those of them to prune in this run
    :param method: how
    :param finished: layers on disk, if the run can be resumed
    :param ranks: the processes of the run
    :param distribution: what they share out
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[DecoderLayer],
        chosen: Iterable[DecoderLayer],
        method: Method,
        finished: FinishedLayers | None = None,
        ranks: Ranks = ALONE,
        distribution: Distribution = "layers",
    ) -> None:
        self.results: list[OperatorResult] = []
        self.reconstructions: dict[str, ReconstructionResult] = {}
        self._model = model
        self.layers = layers
        self._method = method
        self._disk = finished
        self._ranks = ranks
        self._by_layers, self._by_data = (
            (ranks, ALONE) if distribution == "layers" else (ALONE, ranks)
        )
        self._open = {layer for layer in chosen if layer.operators}
        self._repeated: set[DecoderLayer] = set()
        self._on_disk: set[DecoderLayer] = set()
        self._data: CallDigest | None = None
        self._stream = (
            PrunedStream(method.storage) if method.procedure.chains_layers else None
        )
        self._attention = FusedAttention(model)
        self._batches = CalibrationBatches()
        self._reference = ReferenceRun(model, layers)
        self._progress = RunProgress(0)
        # layers that wait until each rank has one
        self._due: list[DecoderLayer] = []
        # pruned weights of layers that the pipeline has not left yet
        self._pending: dict[Operator, Tensor] = {}

    @property
    def unfinished(self) -> list[str]:
        """names of the layers with operators that are left to other runs"""
        pruned = {result.name for result in self.results}
        return [
            layer.name
            for layer in self.layers
            if layer not in self._open
            and any(operator.name not in pruned for operator in layer.operators)
        ]

    def hooks(self) -> Iterator[tuple[DecoderLayer, Hook]]:
        """
        To be asked when the calibration starts.

        :return: what is to be hooked, and the layer after which it is not needed
        """
        if self._disk is not None:
            self._look_on_disk(self._disk)
        if self._disk is not None or self._ranks.size > 1:
            self._data = CallDigest()
            embedding = self._model.get_input_embeddings()
            yield self.layers[0], (embedding, self._data.add, "forward_pre")
        self._progress = RunProgress(-(-len(self._open) // self._by_layers.size))
        yield (
            self.layers[-1],
            (self._model, self._batches.on_model_call, "forward_pre"),
        )
        for layer in self.layers:
            if layer in self._open or self._stream:
                layer.recording = Recording(
                    layer.module,
                    layer.operators,
                    self._method.storage,
                    padding=partial(self._batches.real, layer.mask_name),
                    with_outputs=layer in self._open and self._reconstructs(layer),
                    with_block_outputs=layer in self._open and self._corrects_errors,
                )
                for hook in layer.recording.hooks():
                    yield layer, hook

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The context of the calibration epoch."""
        masks = {layer.module: layer.mask_name for layer in self.layers}

        def padding(layer: torch.nn.Module, hidden_states: Tensor) -> Tensor | None:
            return self._batches.real_tokens(masks[layer], hidden_states)

        def run_plainly(batch: dict[str, Any]) -> None:
            with self._attention.suspended():
                self._reference.run(batch)

        in_sequence = [layer.module for layer in self.layers if layer.in_sequence]
        with (
            self._batches.watched(run_plainly),
            self._attention.in_passes(in_sequence, padding),
        ):
            yield

    def _look_on_disk(self, disk: FinishedLayers) -> None:
        found = [layer.name for layer in self.layers if layer in disk]
        found = self._ranks.all(found)[0]  # files may appear while the ranks look
        self._on_disk = {layer for layer in self.layers if layer.name in found}
        self._open -= self._on_disk
        if self._on_disk:
            logger.info(f"Resuming: {len(self._on_disk)} layers are in {disk.folder}")

    def leave(self, modules: Iterable[torch.nn.Module]) -> None:
        """
        To be called when the pipeline has run a part of the model with all data.

        :param modules: the part
        :raises ValueError: if the calibration data are not those of the layers on disk,
            or a layer or all of them were not run
        """
        self.store()
        here = set(modules)
        if self._model in here:
            self._check_was_run()
        with calibration_runs(self._model):
            for layer in self.layers:
                if layer.module in here:
                    self._leave(layer)

    def _check_was_run(self) -> None:
        recordings = [layer.recording for layer in self.layers if layer.recording]
        if recordings and not any(len(recording.inputs) for recording in recordings):
            raise ValueError(
                "FISTAPruningModifier needs calibration, and the pipeline ran the "
                "model on no data: leave oneshot's pipeline at 'independent'; "
                "'datafree' is for modifiers that need none"
            )

    def _leave(self, layer: DecoderLayer) -> None:
        if self._data is not None:
            self._check_data(self._ranks.all(self._data.batches))
            self._data = None
        if layer in self._on_disk and self._disk is not None:
            self._accept(layer, self._disk.load(layer))
        elif layer in self._open:
            self._open.remove(layer)
            owner = len(self._due)
            assert layer.recording is not None
            self._ranks.each(partial(self._check, layer, layer.recording))
            layer.recording = layer.recording.gathered(self._by_layers, owner)
            if owner != self._by_layers.rank:
                layer.recording = None
            self._due.append(layer)
            if len(self._due) == self._by_layers.size or not self._open:
                self._prune_due()
        else:
            self._pass_on(layer, {})

    def _check(self, layer: DecoderLayer, recording: Recording) -> None:
        """
        :raises RuntimeError: if the layer runs otherwise than in the model itself
        """
        if not len(recording.inputs):
            return
        calls = self._reference.calls(layer)
        if calls is None:  # a pipeline that runs the model itself
            calls = len(recording.inputs) // max(len(self._batches), 1)
        if calls > 1:
            self._repeated.add(layer)
            return
        if layer.in_sequence:
            with self._attention.used(layer.module):
                self._reference.check(
                    layer, recording.inputs[0], recording.real_tokens[0].own
                )
        given = self._batches.tokens
        reads_text = layer.in_sequence and layer.mask_name == "attention_mask"
        if reads_text and recording.tokens < given / 2:
            logger.warning(
                f"{layer.name} is given {recording.tokens} of the {given} tokens of "
                "the calibration data: what is pruned in it rests on few data"
            )

    def _check_data(self, of_ranks: list[list[str]]) -> None:
        """:param of_ranks: a digest of each batch of each rank"""
        for one, other in permutations(range(len(of_ranks)), 2):
            if set(of_ranks[one]) <= set(of_ranks[other]):
                raise ValueError(
                    f"all calibration data of rank {one} are among those of rank "
                    f"{other}: let each load a part of its own, as with "
                    "llmcompressor.datasets.get_rank_partition"
                )
        if self._disk is not None:
            self._disk.check_calibration(list(chain(*of_ranks)))

    def _prune_due(self) -> None:
        """Each rank prunes the layer that it has the data of, and all get the rest."""
        due, self._due = self._due, []

        def prune_mine() -> PrunedLayer | None:
            if self._by_layers.rank >= len(due):
                return None
            layer = due[self._by_layers.rank]
            pruned = self._prune(layer)
            if self._disk is not None and self._by_data.rank == 0:
                self._disk.save(layer, pruned)
            return pruned.on_cpu() if self._by_layers.size > 1 else pruned

        for layer, pruned in zip(due, self._by_layers.each(prune_mine), strict=False):
            assert pruned is not None  # there is one for each layer
            self._accept(layer, pruned)

    def _prune(self, layer: DecoderLayer) -> PrunedLayer:
        """Prune one layer; the model stays as it is."""
        assert layer.recording is not None
        reason = ""
        if layer in self._repeated:
            reason = "the model runs it several times for each batch"
        elif not len(layer.recording.inputs):
            reason = "the calibration data do not reach it"
        if reason:
            logger.warning(f"{layer.name} stays dense: {reason}")
            return PrunedLayer({}, [])
        with self._attention.used(layer.module):
            return self._pruned(layer, layer.recording)

    def _pruned(self, layer: DecoderLayer, recording: Recording) -> PrunedLayer:
        inputs = recording.inputs
        stream = self._stream if layer.in_sequence else None
        procedure = self._method.procedure
        with self._progress.layer(layer) as progress:
            pruned = prune_layer(
                layer.operators,
                recording,
                stream.inputs_of(inputs, layer.name) if stream else inputs,
                self._method.patterns,
                procedure.solver,
                correct_errors=self._corrects_errors,
                reconstruction=(
                    procedure.reconstruction if self._reconstructs(layer) else None
                ),
                on_batch=progress.on_batch,
                on_operator=progress.on_operator,
                ranks=self._by_data,
                offload=self._method.offload_hessians,
            )
            if pruned.reconstruction:
                progress.on_reconstruction(pruned.reconstruction)
        return pruned

    def _accept(self, layer: DecoderLayer, pruned: PrunedLayer) -> None:
        # what is left dense is no part of the layer's task any longer
        layer.operators = [one for one in layer.operators if one.name in pruned.weights]
        weights = {one: pruned.weights[one.name] for one in layer.operators}
        self._pending |= weights
        self.results += pruned.operators
        if pruned.reconstruction:
            self.reconstructions[layer.name] = pruned.reconstruction
        self._pass_on(layer, weights)

    def _pass_on(self, layer: DecoderLayer, weights: dict[Operator, Tensor]) -> None:
        """Run the pruned layer for the sake of the next, where that depends on it."""
        if self._stream and layer.in_sequence and layer.recording:
            inputs = layer.recording.inputs
            with self._attention.used(layer.module):
                pruned_inputs = self._stream.inputs_of(inputs, layer.name)
                onloaded = {one: new.to(one.weight) for one, new in weights.items()}
                self._stream.advance(inputs, pruned_inputs, onloaded)
        layer.recording = None

    def finish(self) -> None:
        """To be called when the pipeline has run all of the model."""
        with calibration_runs(self._model):
            for layer in self.layers:
                # what the pipeline runs within a function of its own is no part of it
                if layer in self._open and all(self._ranks.all(_has_run(layer))):
                    self._leave(layer)
            if self._due:
                self._prune_due()
        self.store()
        if self._open:  # such as the vision tower of a model that was given text
            names = sorted(layer.name for layer in self._open)
            logger.warning(
                f"The calibration data do not reach {len(names)} layers, which stay "
                f"dense, among them {names[0]}: put them on the ignore list, or "
                "calibrate with data that do"
            )
        if not self.results and not self.unfinished:
            raise ValueError(
                "nothing was pruned: in this pipeline the calibration data reach none "
                "of the operators that can be pruned (see the warnings above). With "
                "pipeline='basic' oneshot runs the model as a whole"
            )
        self._stream = None  # the user may keep the modifier, not the activations

    def store(self) -> None:
        """Store the layers that the pipeline has left: it no longer runs them."""
        if self._pending:
            self._ranks.in_turn(self._store)  # ranks share what is offloaded
        self._pending = {}

    def _store(self) -> None:
        for operator, weight in self._pending.items():
            operator.save(weight)

    def _reconstructs(self, layer: DecoderLayer) -> bool:
        """A lone operator has no layer around it, and its refit is all there is."""
        wanted = self._method.procedure.reconstructs
        return wanted and layer.in_sequence and bool(layer.operators)

    @property
    def _corrects_errors(self) -> bool:
        return self._method.procedure.error_correction != "none"


def _has_run(layer: DecoderLayer) -> bool:
    return layer.recording is not None and len(layer.recording.inputs) > 0
