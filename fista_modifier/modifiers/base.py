"""The fields and the lifecycle of all modifiers that prune layer by layer."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from pydantic import Field, PrivateAttr
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fista_modifier.calibration.activations import ActivationStorage
from fista_modifier.checkpoint.on_save import describe_on_save
from fista_modifier.data.records import recorded_name
from fista_modifier.distributed import Distribution, current_ranks
from fista_modifier.models.coverage import share_of_weights, warn_of_other_weights
from fista_modifier.models.generation import make_generation_config_storable
from fista_modifier.models.layers import (
    DecoderLayer,
    check_one_tower,
    chosen_layers,
    group_by_layer,
    layer_targets,
)
from fista_modifier.models.limits import check_nothing_shared, check_vocabulary
from fista_modifier.models.mending import (
    forget_decompression,
    forget_quantisation,
    tie_again,
)
from fista_modifier.models.operators import Operator
from fista_modifier.models.targets import find_operators
from fista_modifier.models.tracing import traced_with_masks, traces_forgotten
from fista_modifier.modifiers.steps import (
    applied_recipe,
    check_changed_once,
    check_own_folder,
    check_quantisers,
    modifiers_before,
    modifiers_of_recipe,
    settings_of,
)
from fista_modifier.pruning.procedures import Procedure
from fista_modifier.pruning.reconstruction import Reconstruction
from fista_modifier.pruning.results import (
    OperatorResult,
    PruningReport,
    ReconstructionResult,
    mean_error,
)
from fista_modifier.pruning.resume import FinishedLayers
from fista_modifier.pruning.runs import fingerprint
from fista_modifier.pruning.schedule import Resources, Schedule
from fista_modifier.solver import SolverOptions

__all__ = [
    "LayerwiseModifier",
    "overridden",
    "undone_if_refused",
]

Options = TypeVar("Options", SolverOptions, Reconstruction)


class LayerwiseModifier(Modifier):  # type: ignore[misc]
    """
    A modifier that gives each decoder layer to a procedure, once the toolkit's pipeline
    has run it.

    Lifecycle:

    - on_initialize
        - find the operators, and let ``procedure`` refuse what cannot be pruned
    - on_calibration_start
        - hook the decoder layers
    - hooked pass of a layer
        - remember what the layer is called with
    - on_sequential_epoch_end
        - run the procedure on each layer that the pipeline has left
    - on_calibration_end
        - store the last layer, remove hooks

    Whatever ``propagate_error`` says, the toolkit's pipeline carries the dense model's
    activations from layer to layer, because a pruned layer is stored only once the
    pipeline has left it. Because of this the modifier needs a calibration epoch of its
    own, which the toolkit's default pipeline "independent" gives to every modifier.
    """

    requires_calibration_data: bool = True

    targets: str | list[str] = Field(
        default=["Linear"],
        description=(
            'class names, module names or "re:" patterns. Modules that contain linear '
            "operators stand for all of them; the output embedding is pruned only if a "
            "target names it"
        ),
    )
    ignore: list[str] = Field(
        default_factory=list, description="what to leave dense, in the same notation"
    )
    offload_hessians: bool = Field(
        default=False,
        description=(
            "keep Gram matrices in main memory, as llm-compressor's modifiers do, for "
            "operators so wide that the device has no room for them. Products take "
            "them to the device block by block, and the CPU does the factorisations"
        ),
    )
    activations_dir: str | None = Field(
        default=None,
        description=(
            "folder on a disk in which recorded activations wait instead of in main "
            "memory; the files have no names, so the folder looks empty"
        ),
    )
    resume_dir: str | None = Field(
        default=None,
        description=(
            "folder in which every finished layer is kept; a run that was interrupted "
            "goes on from there and gives the same weights, bit for bit"
        ),
    )
    layers: str | None = Field(
        default=None,
        description=(
            'numbers of the decoder layers to prune, such as "0-9" or "0-3,30". '
            "Processes with the same resume_dir can prune different layers of one "
            "model. One more run without layers puts the model together"
        ),
    )
    distribute: Distribution | None = Field(
        default=None,
        description=(
            'what the ranks of a torch.distributed run share: "layers" (each prunes '
            'layers of its own with all data) or "data" (each runs its own batches, '
            "sums are added up over the ranks, and each rank solves some operators). "
            'The default is "layers", or "data" if layers depend on one another'
        ),
    )

    _schedule: Schedule | None = PrivateAttr(default=None)
    _handles: dict[DecoderLayer, set[RemovableHandle]] = PrivateAttr(
        default_factory=dict
    )
    _contexts: ExitStack = PrivateAttr(default_factory=ExitStack)
    _epoch: ExitStack = PrivateAttr(default_factory=ExitStack)
    _seconds: float = PrivateAttr(default=0.0)
    _has_ended: bool = PrivateAttr(default=False)

    @abstractmethod
    def procedure(self, state: State, layers: Sequence[DecoderLayer]) -> Procedure:
        """
        Return the procedure, which is what is done to each layer.

        :param state: state of the toolkit's session, with the model and the data
        :param layers: layers of the model, with the operators that targets and ignore
            leave; an operator that stays dense is taken away
        :return: the procedure
        :raises ValueError: if an operator cannot be pruned as the recipe asks
        """

    @property
    def results(self) -> list[OperatorResult]:
        """The result of each operator, in the order of pruning."""
        return list(self._schedule.results) if self._schedule else []

    @property
    def reconstructions(self) -> dict[str, ReconstructionResult]:
        """The result of each reconstructed layer, by its name."""
        return dict(self._schedule.reconstructions) if self._schedule else {}

    @property
    def share_of_weights(self) -> float:
        """Share of the decoder layers' matrices that the pruned operators hold."""
        if self._schedule is None:
            return 0.0
        names = [result.name for result in self.results]
        return share_of_weights(self._schedule.layers, names)

    @property
    def unfinished(self) -> list[str]:
        """Names of the layers that are left to other runs: see ``layers``."""
        return self._schedule.unfinished if self._schedule else []

    @property
    def new_columns(self) -> Mapping[str, int]:
        """
        The number of columns that operators will have afterwards, by their names. Those
        that keep theirs are not among them.
        """
        return {}

    def find_operators(self, model: PreTrainedModel) -> list[Operator]:
        """
        Find the operators that targets and ignore leave.

        :param model: the model that is to be pruned, maybe on the meta device
        :return: the operators
        :raises ValueError: if targets match nothing
        """
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        return find_operators(model, targets, self.ignore)

    def find_layers(
        self, model: PreTrainedModel, given: str | list[str] | None = None
    ) -> tuple[list[DecoderLayer], list[str]]:
        """
        Find the layers of a model and the operators in them.

        :param model: the model that is to be pruned, maybe on the meta device
        :param given: the sequential targets that the user gave to ``oneshot()``, or
            None
        :return: the layers of the model, with the operators that targets and ignore
            leave; and the toolkit's sequential targets
        :raises ValueError: if targets match nothing, no layers are found, or layers
            share keys and values
        """
        check_nothing_shared(model)
        operators = self.find_operators(model)
        layer_types = layer_targets(model, operators, given)
        return group_by_layer(model, operators, layer_types), layer_types

    def chosen_layers(self, layers: Sequence[DecoderLayer]) -> list[DecoderLayer]:
        """
        Return the layers that this run prunes.

        :param layers: all layers of the model
        :return: those that ``layers`` names, or all
        :raises ValueError: if the model does not have the ``layers``
        """
        if self.layers is None:
            return list(layers)
        return chosen_layers(layers, self.layers)

    def check_steps(self, modifiers: Sequence[Modifier]) -> None:
        """
        Refuse a recipe whose other steps do not go with this one.

        :param modifiers: all modifiers of the recipe, in order
        :raises ValueError: if an earlier step has ``layers`` or the same ``resume_dir``
        """
        check_own_folder(self, modifiers)
        for other in modifiers_before(self, modifiers):
            if isinstance(other, LayerwiseModifier) and other.layers is not None:
                raise ValueError(
                    f"layers: '{other.layers}' is of {type(other).__name__}, and "
                    f"{type(self).__name__} comes after it, which needs all layers: "
                    "leave layers out of the steps before the last"
                )

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """
        Find the operators and refuse what cannot be pruned, before any long work.

        :raises OSError: if ``activations_dir`` cannot be made
        :raises ValueError: if there is no calibration data, or a token in it is not in
            the vocabulary, if the accelerator is Apple's, if targets match nothing, if
            an operator cannot have the pattern or is not finite, if the model does not
            have the ``layers`` or could not be saved, if ``resume_dir`` belongs to
            another run, if other steps of the recipe do not go with this one, if
            SmoothQuant, SpinQuant or QuIP would change weights that ranks share, or
            within ``torch.inference_mode()``
        """
        with undone_if_refused(state.model):
            self._set_up(state, kwargs.get("sequential_targets"))
        return True

    def _set_up(self, state: State, given: str | list[str] | None) -> None:
        model = state.model
        if (device := get_main_device()).type == "mps":
            raise ValueError(
                f"{device} has no float64, in which errors are added up: prune on a "
                "machine with another accelerator, or with none"
            )
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "there are no gradients within torch.inference_mode(), which show how "
                "operators depend on one another and train layers: leave it"
            )
        self.check_steps(modifiers_of_recipe())
        check_quantisers(model, modifiers_of_recipe())
        check_changed_once()
        forget_decompression(model)
        if current_ranks().size > 1:
            tie_again(model)
        if state.data.calib is None:
            raise ValueError(
                f"{type(self).__name__} needs calibration data: pass dataset=… to "
                "oneshot"
            )
        make_generation_config_storable(model)
        check_vocabulary(model, getattr(state.data.calib, "dataset", None))
        storage = ActivationStorage(_folder(self.activations_dir))
        if storage.folder is not None:
            storage.folder.mkdir(parents=True, exist_ok=True)
        layers, layer_types = self.find_layers(model, given)
        chosen = self.chosen_layers(layers)
        finished = self._finished_layers(model)
        procedure = self.procedure(state, layers)
        self._check_sharing(procedure.chains_layers)  # fields may have been set since
        if procedure.chains_layers:
            check_one_tower(model, layers)
        warn_of_other_weights(layers)
        by_default: Distribution = "data" if procedure.chains_layers else "layers"
        self._schedule = Schedule(
            model,
            layers,
            chosen,
            procedure,
            Resources(
                self.offload_hessians,
                storage,
                finished,
                current_ranks(),
                self.distribute or by_default,
            ),
        )
        self._contexts.enter_context(traced_with_masks(model))
        self._contexts.enter_context(traces_forgotten())
        if given is None:  # lets the toolkit's pipeline find the same layers
            self._contexts.enter_context(
                patch_attr(model, "_no_split_modules", layer_types)
            )

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self._seconds = -time.perf_counter()
        others = [
            type(one).__name__ for one in modifiers_of_recipe() if one is not self
        ]
        with self._undone_on_error() as schedule:
            if others:
                raise ValueError(
                    f"{type(self).__name__} cannot share a calibration epoch with "
                    f"{', '.join(others)}: leave oneshot's pipeline at 'independent'"
                )
            self._prepare(state, schedule)
            for layer, (module, hook, kind) in schedule.hooks():
                arguments = {"with_kwargs": True} if kind == "forward_pre" else {}
                handle = self.register_hook(module, hook, kind, **arguments)
                self._handles.setdefault(layer, set()).add(handle)
            self._epoch.enter_context(schedule.watching())

    def _prepare(self, state: State, schedule: Schedule) -> None:
        """
        Complete the procedure by what only the model can show that earlier modifiers of
        the recipe have left.
        """

    def on_sequential_epoch_end(
        self,
        state: State,
        event: Event,
        modules: list[torch.nn.Module],
        **kwargs: Any,
    ) -> None:
        here = set(modules)
        for layer in [layer for layer in self._handles if layer.module in here]:
            self.remove_hooks(self._handles.pop(layer))
        with self._undone_on_error() as schedule:
            schedule.leave(modules)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        with self._undone_on_error() as schedule:
            schedule.finish()
        self._seconds += time.perf_counter()
        self._has_ended = True
        self._epoch.close()
        self.remove_hooks()
        if self.unfinished:
            logger.warning(
                f"{len(self.unfinished)} layers are not pruned yet, the first of them "
                f"{self.unfinished[0]}: when other runs have finished them, run again "
                f"with resume_dir '{self.resume_dir}' and without layers"
            )

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        # The toolkit also finalises what an error has ended, before its next run.
        if self._has_ended and (results := self.results):
            report = PruningReport(
                recorded_name(state.model.name_or_path),
                None,
                self._seconds,
                results,
                self.reconstructions,
                share_of_layers=self.share_of_weights,
                **self._of_report(),
                recipe=applied_recipe(),
            )
            describe_on_save(state.model, report)
            error = mean_error(results, attrgetter("relative_error"))
            _warn_of_few_tokens(results)
            logger.info(
                f"Pruned {len(results)} operators to {report.summary_of_patterns}. "
                f"They hold {100 * self.share_of_weights:.1f} % of the decoder layers' "
                f"weights; mean of ‖W*X* − WX‖ / ‖WX‖ as the solver left them: "
                f"{error:.4f}"
            )
        self.remove_hooks()
        self._contexts.close()
        # Ranks share weights and scales. Another step of the recipe, such as a
        # quantisation, may still write some that this rank packs when it saves.
        current_ranks().wait()
        return True

    def _of_report(self) -> dict[str, Any]:
        """Return the fields of the report that a kind of pruning adds."""
        return {}

    def _finished_layers(self, model: torch.nn.Module) -> FinishedLayers | None:
        if self.resume_dir is None:
            return None
        recipe = self._determines_the_result()
        before = modifiers_before(self, modifiers_of_recipe())
        if steps := [_step(one) for one in before]:
            recipe["steps before it"] = steps
        return FinishedLayers(Path(self.resume_dir), fingerprint(model, recipe))

    def _determines_the_result(self) -> dict[str, Any]:
        """Return the fields on which the result depends."""
        return settings_of(self)

    def _check_sharing(self, chains_layers: bool) -> None:
        """
        Refuse to share layers out that depend on one another.

        :param chains_layers: whether a layer depends on how those before it were pruned
        :raises ValueError: if layers are to be shared out and cannot be
        """
        if self.layers is not None and self.resume_dir is None:
            raise ValueError(
                f"layers: '{self.layers}' needs a resume_dir, where the pruned layers "
                "wait for the others"
            )
        shares_layers = self.layers is not None or self.distribute == "layers"
        if chains_layers and shares_layers:
            raise ValueError(
                "with error_correction: full, which is also that of preset: best, a "
                "layer depends on those before it, so that layers cannot be shared "
                "out: leave out layers and distribute, or use error_correction: intra"
            )

    @contextmanager
    def _undone_on_error(self) -> Iterator[Schedule]:
        """
        Undo all changes of the model's behaviour if an error is raised. The toolkit
        tells no modifier of an error, and the user goes on with the model.
        """
        assert self._schedule is not None, "initialized before any event"
        try:
            yield self._schedule
        except BaseException:
            self.remove_hooks()
            self._epoch.close()
            self._contexts.close()
            forget_quantisation(self._schedule.model)
            raise


@contextmanager
def undone_if_refused(model: PreTrainedModel) -> Iterator[None]:
    """
    Undo what the steps of a recipe have prepared in a model, if one of them refuses it.
    The toolkit would do so only before its next run, and not for a quantisation.

    :param model: the model that the recipe is applied to
    """
    try:
        yield
    except BaseException:
        for one in modifiers_of_recipe():
            if isinstance(one, LayerwiseModifier):
                one._contexts.close()
        forget_quantisation(model)
        raise


def _step(modifier: Modifier) -> dict[str, Any]:
    """Return what the result of a step of a recipe depends on."""
    if isinstance(modifier, LayerwiseModifier):
        fields = modifier._determines_the_result()
    else:
        fields = settings_of(modifier)
    return {"modifier": type(modifier).__name__} | fields


def _warn_of_few_tokens(results: Sequence[OperatorResult]) -> None:
    """
    Warn of operators, mostly experts, whose errors say little. A row of a weight has as
    many unknowns as it keeps columns, so that few tokens can be fitted exactly.
    """
    few = [one for one in results if 0 < one.tokens < one.shape[1]]
    if few:
        least = min(few, key=lambda one: one.tokens)
        logger.warning(
            f"{len(few)} of {len(results)} operators were reached by fewer calibration "
            f"tokens than they have columns ({least.name}: {least.tokens} of "
            f"{least.shape[1]}). Their errors on other text are higher than those told "
            "here: use more calibration data"
        )


def _folder(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def overridden(preset: Options, **given: Any) -> Options:
    """
    Replace values of a preset by those of a recipe.

    :param preset: the options of the preset, a dataclass
    :param given: the recipe's values by their fields; None where it has no value
    :return: the options with the values that are given, and the preset's others
    """
    given = {name: value for name, value in given.items() if value is not None}
    return replace(preset, **given)
