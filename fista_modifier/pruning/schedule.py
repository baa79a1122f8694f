"""
The times at which each layer is pruned and stored, while the toolkit's pipeline runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.calibration.activations import MAIN_MEMORY, ActivationStorage
from fista_modifier.calibration.calls import LayerInputs
from fista_modifier.calibration.contexts import calibration_runs
from fista_modifier.calibration.passes import CalibrationPasses
from fista_modifier.calibration.recording import Hook, Recorded, Recording
from fista_modifier.calibration.stream import PrunedStream
from fista_modifier.distributed import ALONE, Distribution, Ranks
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.operators import Operator
from fista_modifier.pruning.procedures import (
    LayerTask,
    Procedure,
    PrunedLayer,
)
from fista_modifier.pruning.progress import RunProgress
from fista_modifier.pruning.results import OperatorResult, ReconstructionResult
from fista_modifier.pruning.resume import FinishedLayers, Resumption
from fista_modifier.pruning.rounds import Rounds

__all__ = ["Resources", "Schedule"]


@dataclass(frozen=True)
class Resources:
    """
    The resources that a run may use. The result does not depend on them.

    :param offload_hessians: whether Gram matrices stay in main memory
    :param storage: where activations wait between the passes
    :param finished: layers on disk, if the run can be resumed
    :param ranks: the processes of the run
    :param distribution: what they share out
    """

    offload_hessians: bool = False
    storage: ActivationStorage = MAIN_MEMORY
    finished: FinishedLayers | None = None
    ranks: Ranks = ALONE
    distribution: Distribution = "layers"


class Schedule:
    """
    The schedule of a run. Each layer is pruned when the pipeline has run it with all
    calibration data. The result is stored when the pipeline has left the layer, so that
    its passes carry the dense activations. What is on disk already is not pruned again.

    :param model: the model that is being calibrated
    :param layers: layers of the model; lone operators after the decoder layers
    :param chosen: the layers to prune in this run
    :param procedure: what is done to each layer
    :param resources: what the run may use
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[DecoderLayer],
        chosen: Iterable[DecoderLayer],
        procedure: Procedure,
        resources: Resources,
    ) -> None:
        self.results: list[OperatorResult] = []
        self.reconstructions: dict[str, ReconstructionResult] = {}
        self.layers = layers
        self.model = model
        self.procedure = procedure
        self._resources = resources
        self._ranks = resources.ranks
        self._rounds = Rounds(resources.ranks, resources.distribution)
        self._resumption = Resumption(resources.finished, resources.ranks)
        self._passes = CalibrationPasses(
            model, layers, resources.storage, self._resumption.compares_data
        )
        self._followed = _pruned_span(layers) if procedure.chains_layers else []
        self._stream = PrunedStream(resources.storage)
        # A layer is to be pruned until the pipeline has left it.
        self._to_prune = {layer for layer in chosen if layer.operators}
        self._to_prune -= self._resumption.look_for(layers)
        self._finished: set[DecoderLayer] = set()
        # The pipeline may run a layer again before it moves on, so new weights wait.
        self._unstored: list[tuple[Operator, Tensor, Tensor | None]] = []
        self._progress = RunProgress(self._rounds.count(len(self._to_prune)))

    @property
    def unfinished(self) -> list[str]:
        """Names of the layers with operators that are left to other runs."""
        left = (set(self.layers) - self._to_prune) - self._finished
        return [
            layer.name for layer in self.layers if layer in left and layer.operators
        ]

    def hooks(self) -> list[tuple[DecoderLayer, Hook]]:
        """
        Return the hooks of the calibration.

        :return: pairs of a layer and a hook, which is not needed any longer after that
            layer
        """
        hooks = [(self.layers[-1], self._passes.count_batches())]
        for layer in self.layers:
            if layer in self._to_prune:
                wanted = self.procedure.recorded(layer)
            elif layer in self._followed:
                wanted = Recorded()
            else:
                continue
            if self._ranks.size > 1:  # the sums are those of all ranks
                wanted = replace(wanted, sums=())
            offload = self._resources.offload_hessians
            recorded = self._passes.record(layer, wanted, offload)
            hooks += [(layer, hook) for hook in recorded]
        return hooks

    def watching(self) -> AbstractContextManager[None]:
        """
        Return the context of the calibration epoch.

        :return: the context
        """
        return self._passes.watched()

    def leave(self, modules: Iterable[torch.nn.Module]) -> None:
        """
        Prune the layers of a part of the model. This is called when the pipeline has
        run the part with all data.

        :param modules: the modules of the part
        :raises ValueError: if the calibration data are not those of the layers on disk,
            or a layer or all of them were not run
        """
        self.store()
        here = set(modules)
        if self.model in here:
            self._passes.check_any_ran()
        for layer in self.layers:
            if layer.module in here:
                self._leave(layer)

    def _leave(self, layer: DecoderLayer) -> None:
        # Onloaded weights stay until the context ends: one layer at a time.
        with calibration_runs(self.model):
            self._go_on_from(layer)

    def _go_on_from(self, layer: DecoderLayer) -> None:
        self._resumption.check_data(self._passes.digests)
        if layer in self._to_prune:
            self._to_prune.remove(layer)
            self._prune_in_turn(layer)
            return
        recording = self._passes.take(layer)
        on_disk = self._resumption.load(layer)
        if on_disk is not None:
            self._accept(layer, on_disk, recording)
        else:
            self._pass_on(layer, {}, {}, recording)

    def _prune_in_turn(self, layer: DecoderLayer) -> None:
        """
        Let a layer wait for its turn, or leave it dense if no rank can prune it. Prune
        the waiting layers if each rank has one, or no other layer is to come.
        """
        reasons = self._ranks.each(lambda: self._passes.reason_to_skip(layer))
        recording = self._passes.take(layer)
        assert recording is not None
        reason = next(filter(None, reasons), None)
        if reason is not None and all(reasons):
            logger.warning(f"{layer.name} stays dense: {reason}")
            dense = PrunedLayer()
            if self._ranks.rank == 0:
                self._resumption.save(layer, dense)
            self._accept(layer, dense, recording)
        else:
            self._rounds.add(layer, recording)
        if self._rounds and (self._rounds.is_full or not self._to_prune):
            self._prune_round()

    def _prune_round(self) -> None:
        for waiting, pruned in self._rounds.prune(self._pruned):
            self._accept(waiting.layer, pruned, waiting.recording)

    def _pruned(self, layer: DecoderLayer, recording: Recording) -> PrunedLayer:
        """Prune one layer and return the result. The model stays as it is."""
        with self._passes.running(layer), self._progress.layer(layer) as progress:
            pruned = self.procedure.prune(
                LayerTask(
                    layer,
                    recording,
                    self._pruned_inputs(layer, recording),
                    self._rounds.of_one_layer,
                    self._resources.offload_hessians,
                    progress.on_batch,
                    progress.on_operator,
                )
            )
            if pruned.reconstruction:
                progress.on_reconstruction(pruned.reconstruction)
        if self._rounds.of_one_layer.rank == 0:
            self._resumption.save(layer, pruned)
        return pruned

    def _pruned_inputs(
        self, layer: DecoderLayer, recording: Recording
    ) -> LayerInputs | None:
        if layer not in self._followed:
            return None
        return self._stream.inputs_of(recording.inputs, layer.name)

    def _accept(
        self, layer: DecoderLayer, pruned: PrunedLayer, recording: Recording | None
    ) -> None:
        self._finished.add(layer)
        # What is left dense is no part of the layer's task any longer.
        layer.operators = [one for one in layer.operators if one.name in pruned.weights]
        weights = {one: pruned.weights[one.name] for one in layer.operators}
        biases = {
            one: pruned.biases[one.name]
            for one in layer.operators
            if one.name in pruned.biases
        }
        # They wait in main memory, as the pipeline may leave all layers at once.
        self._unstored += [
            (one, weight.cpu(), biases.get(one)) for one, weight in weights.items()
        ]
        self.results += pruned.operators
        if pruned.reconstruction:
            self.reconstructions[layer.name] = pruned.reconstruction
        self._pass_on(layer, weights, biases, recording)

    def _pass_on(
        self,
        layer: DecoderLayer,
        weights: dict[Operator, Tensor],
        biases: dict[Operator, Tensor],
        recording: Recording | None,
    ) -> None:
        """
        Run the pruned layer to get the inputs of the next, if another one follows that
        depends on them.
        """
        if layer in self._followed[:-1] and recording and len(recording.inputs):
            with self._passes.running(layer):
                inputs = self._stream.inputs_of(recording.inputs, layer.name)
                onloaded = {one: new.to(one.weight) for one, new in weights.items()}
                shifted = {one: new.to(one.weight) for one, new in biases.items()}
                self._stream.advance(recording.inputs, inputs, onloaded, shifted)

    def finish(self) -> None:
        """
        Prune and store what is left. This is called when the pipeline has run all of
        the model.

        :raises ValueError: if nothing was pruned, and no layer is left to other runs
        """
        for layer in self.layers:
            # The pipeline may run a layer within a function of its own, and then does
            # not leave it.
            waits = layer in self._resumption.on_disk - self._finished
            if waits or (
                layer in self._to_prune
                and all(self._ranks.all(self._passes.has_run(layer)))
            ):
                self._leave(layer)
        if self._rounds:
            with calibration_runs(self.model):
                self._prune_round()
        self.store()
        if self._to_prune:
            # An example is the vision tower of a model that was given text.
            names = sorted(layer.name for layer in self._to_prune)
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
        # The user may keep the modifier, not the activations.
        self._stream = PrunedStream(self._resources.storage)

    def store(self) -> None:
        """
        Store the layers that the pipeline has left, because it no longer runs them.
        """
        if self._unstored:
            # Ranks share what is offloaded: they write one after the other into what
            # is there, and make smaller tensors together.
            self._ranks.in_turn(lambda: self._store(resized=False))
            self._store(resized=True)
        self._unstored = []

    def _store(self, resized: bool) -> None:
        for operator, weight, bias in self._unstored:
            if operator.is_resized_by(weight) == resized:
                operator.save(weight, bias)


def _pruned_span(layers: Sequence[DecoderLayer]) -> list[DecoderLayer]:
    """
    Return the layers from the first that has operators to the last. Those before have
    the dense model's inputs, and nobody reads the outputs of those behind, which may be
    of another tower.

    :param layers: layers of the model
    :return: the decoder layers between, in order
    """
    in_sequence = [layer for layer in layers if layer.in_sequence]
    pruned = [number for number, layer in enumerate(in_sequence) if layer.operators]
    return in_sequence[pruned[0] : pruned[-1] + 1] if pruned else []
