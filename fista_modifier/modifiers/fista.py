"""The recipe's face of FISTAPruner: fields and lifecycle, no mathematics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch.utils.hooks import RemovableHandle

from fista_modifier.calibration.activations import ActivationStorage
from fista_modifier.calibration.attention import traced_with_masks, traces_forgotten
from fista_modifier.checkpoint.on_save import describe_on_save
from fista_modifier.distributed import Distribution, current_ranks
from fista_modifier.models.coverage import (
    share_of_weights,
    warn_of_other_weights,
)
from fista_modifier.models.layers import (
    DecoderLayer,
    chosen_layers,
    group_by_layer,
    layer_targets,
)
from fista_modifier.models.limits import check_vocabulary
from fista_modifier.models.operators import (
    check_prunable,
    find_operators,
    warn_of_zeros,
)
from fista_modifier.modifiers.owl import Owl
from fista_modifier.modifiers.patterns import PatternFields
from fista_modifier.pruning.layer import ErrorCorrection
from fista_modifier.pruning.procedures import PRESETS, Preset, Procedure
from fista_modifier.pruning.reconstruction import Reconstruction
from fista_modifier.pruning.results import (
    OperatorResult,
    PruningReport,
    ReconstructionResult,
)
from fista_modifier.pruning.resume import FinishedLayers, fingerprint
from fista_modifier.pruning.schedule import Method, Schedule
from fista_modifier.solver import SolverOptions, WarmStart
from fista_modifier.solver.patterns import mask_structure_of

__all__ = ["FISTAPruningModifier"]

HOW_TO_RUN = {
    "offload_hessians",
    "activations_dir",
    "resume_dir",
    "layers",
    "distribute",
}
"""fields on which the result does not depend"""

NOT_TAKEN = {
    "sequential_update": (
        "llm-compressor takes it for true, whatever it is: leave it out; "
        "error_correction says whether layers see the errors of those before them"
    ),
    "sequential_targets": (
        "it is an argument of oneshot(sequential_targets=…): leave it out of the recipe"
    ),
}
"""fields of the toolkit's pruning modifiers, and why they are none of this one"""

Options = TypeVar("Options", SolverOptions, Reconstruction)


class FISTAPruningModifier(Modifier):  # type: ignore[misc]
    """
    Prunes linear operators by FISTAPruner (Zhao et al., EMNLP 2025): each by an
    ℓ1-regularised least squares problem, solved by FISTA, with λ tuned until the
    rounded weight has the lowest output error (Algorithm 1).

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        FISTAPruningModifier:
          sparsity: 0.5
          mask_structure: "2:4"
          targets: ["Linear"]
          ignore: ["re:.*lm_head"]
    ```

    Lifecycle:

    - on_initialize
        - find the operators and check that each can have the pattern
    - on_calibration_start
        - hook the decoder layers
    - hooked pass of a layer
        - remember what the layer is called with
    - on_sequential_epoch_end
        - replay the layer stage by stage, accumulate Gram matrices, prune
        - train the kept weights of the layer together
    - on_calibration_end
        - store the last layer, remove hooks

    Layers are independent: whatever ``propagate_error`` says, the toolkit's pipeline
    carries the dense model's activations from layer to layer, because a pruned layer
    is stored only once the pipeline has left it. ``error_correction`` sets what X* is:

    - ``none``: X* = X, the operator's input in the dense model
    - ``intra`` (the paper's): the layer's input is the dense model's; inside the layer,
      X* follows from the operators pruned before
    - ``full``: X* is the input in the model pruned so far, through all layers; X stays
      the dense model's. One more run of each layer and one more set of its inputs.

    Because of this the modifier needs a calibration epoch of its own, which the
    toolkit's default pipeline "independent" gives to every modifier.

    :param sparsity: share of zeros in [0, 1); may be left out for n:m. A list has one
        for each decoder layer, where 0 leaves a layer dense
    :param mask_structure: "n:m" keeps n of every m entries of a row; "0:0" is
        unstructured, round(sparsity·m·n) zeros anywhere in the matrix
    :param sparsity_profile: "owl" spreads ``sparsity`` over the decoder layers by their
        outliers (Yin et al., 2024), with ``owl_m`` and ``owl_lmbda``
    :param owl_m: how many times its layer's mean |W_ij|·‖x_j‖ makes a weight an outlier
    :param owl_lmbda: half of the range of the layers' sparsities
    :param patterns: patterns by targets, in the notation of ``targets``: "n:m", a
        sparsity, or "dense". Of several entries that match an operator the last counts;
        an operator that none matches has the pattern of the fields above
    :param targets: class names, module names or "re:" patterns. Modules that contain
        linear operators stand for all of them; the output embedding is pruned only
        if a target names it
    :param ignore: what to leave dense, in the same notation
    :param preset: values of the fields below that the recipe leaves out. "default":
        columns scaled, support found by ADMM, kept entries refitted, and layers
        reconstructed (docs/method.md). "best" is the most accurate, for half as much
        time again: "full" error correction and two epochs of reconstruction. "fast"
        ends with ADMM and its refit, of less damping, and trains no layer. "paper" is
        Algorithm 1 as published
    :param preserve_sparsity_mask: whether zeros of a model that is sparse already stay
        zero (the pattern then holds within them); otherwise they may get values again
    :param error_correction: "none", "intra" or "full", see above
    :param warm_start: W₀*: "dense", "magnitude", "wanda", "sparsegpt" or "admm"
    :param admm_steps: steps of an "admm" warm start
    :param column_scaling: weigh entries by their feature's norm, as Wanda does
    :param refit: give the kept entries their least squares values after each rounding
    :param lambda_init: λ₀, where the search for λ starts. λ is in units of
        mean|W_ij|·mean(G_jj), G = X* X*ᵀ, which makes it independent of the amount and
        scale of the data and of the scale of the weights
    :param lambda_max: M, the largest λ, in the same unit
    :param max_iterations: K, FISTA iterations for one value of λ
    :param patience: T, consecutive values of λ without improvement that end the search;
        0 for no search, the result is then the warm start
    :param epsilon: ε, relative improvement of the error below which the search ends
    :param xi: ξ: λ is raised while rounding causes more than this share of the error
    :param dampening_frac: damping of the least squares problem (with ``refit``), as a
        fraction of the geometric mean of diag(G), and of a SparseGPT warm start, as a
        fraction of its arithmetic mean
    :param block_size: block size of a SparseGPT warm start, in columns
    :param reconstruction_epochs: passes over the calibration batches in which the kept
        weights of a layer are trained together towards the dense layer's output, once
        its operators are pruned; may be a fraction, 0 is none
    :param reconstruction_rate: highest learning rate of this, as a share of an
        operator's mean kept |W_ij|
    :param offload_hessians: keep Gram matrices in main memory, as in the toolkit's
        modifiers, for operators so wide that the device has no room for them; products
        take them block by block, and factorisations are done by the CPU
    :param activations_dir: folder on a disk in which recorded activations wait instead
        of in main memory; it ends empty, as the files have no names
    :param resume_dir: folder in which every finished layer is kept; a run that was
        interrupted goes on from there and gives the same weights, bit for bit
    :param layers: numbers of the decoder layers to prune, such as "0-9" or "0-3,30".
        With a ``resume_dir`` that they share, processes that prune different layers do
        the work of one model; one more run without ``layers`` puts it together
    :param distribute: what the ranks of a ``torch.distributed`` run share out: "layers"
        (each prunes layers of its own with all data) or "data" (each runs its own
        batches; sums are reduced and operators shared out). "layers" by default, but
        "data" for ``error_correction: full``, whose layers depend on one another
    """

    requires_calibration_data: bool = True

    sparsity: float | list[float] | None = None
    mask_structure: str = "0:0"
    sparsity_profile: Literal["owl"] | None = None
    owl_m: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    owl_lmbda: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    patterns: dict[str, str] = Field(default_factory=dict)
    targets: str | list[str] = ["Linear"]
    ignore: list[str] = Field(default_factory=list)
    preset: Preset = "default"
    preserve_sparsity_mask: bool = False
    error_correction: ErrorCorrection | None = None
    warm_start: WarmStart | None = None
    admm_steps: int | None = Field(default=None, ge=1)
    column_scaling: bool | None = None
    refit: bool | None = None
    lambda_init: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    lambda_max: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_iterations: int | None = Field(default=None, ge=1)
    patience: int | None = Field(default=None, ge=0)
    epsilon: float | None = Field(default=None, ge=0, lt=1)
    xi: float | None = Field(default=None, gt=0, lt=1)
    dampening_frac: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    block_size: int | None = Field(default=None, ge=1)
    reconstruction_epochs: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    reconstruction_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    offload_hessians: bool = False
    activations_dir: str | None = None
    resume_dir: str | None = None
    layers: str | None = None
    distribute: Distribution | None = None

    _patterns: PatternFields = PrivateAttr()
    _method: Method = PrivateAttr()
    _schedule: Schedule | None = PrivateAttr(default=None)
    _handles: dict[DecoderLayer, set[RemovableHandle]] = PrivateAttr(
        default_factory=dict
    )
    _contexts: ExitStack = PrivateAttr(default_factory=ExitStack)
    _epoch: ExitStack = PrivateAttr(default_factory=ExitStack)
    _seconds: float = PrivateAttr(default=0.0)

    @model_validator(mode="before")
    @classmethod
    def _refuse_fields(cls, given: Any) -> Any:
        """Those that a recipe of the toolkit may have and that have no meaning here."""
        for name, reason in NOT_TAKEN.items():
            if isinstance(given, dict) and name in given:
                raise ValueError(f"{name} is no field of {cls.__name__}: {reason}")
        return given

    @field_validator("mask_structure", mode="before")
    @classmethod
    def _read_number(cls, value: Any) -> Any:
        """YAML takes n:m without quotes for a number."""
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return mask_structure_of(value) if is_number else value

    @field_validator("patterns", mode="before")
    @classmethod
    def _read_numbers(cls, value: Any) -> Any:
        """A sparsity is a number in YAML, and so is n:m without quotes."""
        if not isinstance(value, dict):
            return value
        return {
            target: str(name) if isinstance(name, float) else cls._read_number(name)
            for target, name in value.items()
        }

    @field_validator("sparsity_profile", mode="before")
    @classmethod
    def _read_profile(cls, value: Any) -> Any:
        """The toolkit takes "OWL", too."""
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_fields(self) -> FISTAPruningModifier:
        self._patterns = PatternFields(
            self.sparsity, self.mask_structure, self.patterns, self._owl
        )
        preset = PRESETS[self.preset]
        names = {field.name for field in fields(SolverOptions)} - {"start"}
        given = {name: getattr(self, name) for name in names}
        options = _overridden(preset.solver, start=self.warm_start, **given)
        if options.lambda_init >= options.lambda_max:
            raise ValueError(
                f"lambda_init ({options.lambda_init}) must be below lambda_max "
                f"({options.lambda_max}): the search for λ runs between them"
            )
        reconstruction = _overridden(
            preset.reconstruction,
            epochs=self.reconstruction_epochs,
            rate=self.reconstruction_rate,
        )
        correction = self.error_correction or preset.error_correction
        procedure = Procedure(options, reconstruction, correction)
        self._method = Method(
            {},  # known when the model is
            procedure,
            self.offload_hessians,
            ActivationStorage(_folder(self.activations_dir)),
        )
        if self.layers is not None and self.resume_dir is None:
            raise ValueError(
                f"layers: '{self.layers}' needs a resume_dir, where the pruned layers "
                "wait for the others"
            )
        shares_layers = self.layers is not None or self.distribute == "layers"
        if procedure.chains_layers and shares_layers:
            raise ValueError(
                "with error_correction: full, which is also that of preset: best, a "
                "layer depends on those before it, so that layers cannot be shared "
                "out: leave out layers and distribute, or use error_correction: intra"
            )
        return self

    @property
    def results(self) -> list[OperatorResult]:
        """what became of each operator, in the order of pruning"""
        return list(self._schedule.results) if self._schedule else []

    @property
    def reconstructions(self) -> dict[str, ReconstructionResult]:
        """what became of each reconstructed layer, by its name"""
        return dict(self._schedule.reconstructions) if self._schedule else {}

    @property
    def share_of_weights(self) -> float:
        """of the decoder layers' matrices, what the pruned operators hold"""
        if self._schedule is None:
            return 0.0
        names = [result.name for result in self.results]
        return share_of_weights(self._schedule.layers, names)

    @property
    def unfinished(self) -> list[str]:
        """names of layers that are left to other runs: see ``layers``"""
        return self._schedule.unfinished if self._schedule else []

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """
        Find the operators and refuse what cannot be pruned, before any long work.

        :raises OSError: if there can be no ``activations_dir``
        :raises ValueError: if there is no calibration data, or a token in it is not in
            the vocabulary, if targets match nothing, if an operator has no pattern,
            cannot have it or is not finite, if the model does not have the ``layers``,
            or if ``resume_dir`` belongs to another run
        """
        model = state.model
        if state.data.calib is None:
            raise ValueError(
                "FISTAPruningModifier needs calibration data: pass dataset=… to oneshot"
            )
        check_vocabulary(model, getattr(state.data.calib, "dataset", None))
        if self._method.storage.folder is not None:
            self._method.storage.folder.mkdir(parents=True, exist_ok=True)
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        operators = find_operators(model, targets, self.ignore)
        given = kwargs.get("sequential_targets")
        layer_types = layer_targets(model, operators, given)
        layers = group_by_layer(model, operators, layer_types)
        patterns = self._patterns.of_operators(
            model, layers, state.data.calib, current_ranks()
        )
        self._method = replace(self._method, patterns=patterns)
        operators = [one for one in operators if one.name in patterns]
        for operator in operators:
            check_prunable(operator, patterns[operator.name])
        if not self.preserve_sparsity_mask:
            warn_of_zeros(operators)
        for layer in layers:
            layer.operators = [one for one in layer.operators if one.name in patterns]
        warn_of_other_weights(layers)
        self._schedule = Schedule(
            model,
            layers,
            layers if self.layers is None else chosen_layers(layers, self.layers),
            self._method,
            self._finished_layers(model),
            current_ranks(),
            self.distribute or self._default_distribution,
        )
        self._contexts.enter_context(traced_with_masks(model))
        self._contexts.enter_context(traces_forgotten())
        if given is None:  # the pipeline is to find the same layers
            self._contexts.enter_context(
                patch_attr(model, "_no_split_modules", layer_types)
            )
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self._seconds = -time.perf_counter()
        modifiers = active_session().lifecycle.recipe.modifiers
        others = [type(other).__name__ for other in modifiers if other is not self]
        with self._undone_on_error() as schedule:
            if others:
                raise ValueError(
                    "FISTAPruningModifier cannot share a calibration epoch with "
                    f"{', '.join(others)}: leave oneshot's pipeline at 'independent'"
                )
            for layer, (module, hook, kind) in schedule.hooks():
                arguments = {"with_kwargs": True} if kind == "forward_pre" else {}
                handle = self.register_hook(module, hook, kind, **arguments)
                self._handles.setdefault(layer, set()).add(handle)
            self._epoch.enter_context(schedule.watching())

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
        self._epoch.close()
        self.remove_hooks()
        if self.unfinished:
            logger.warning(
                f"{len(self.unfinished)} layers are not pruned yet, the first of them "
                f"{self.unfinished[0]}: when other runs have finished them, run again "
                f"with resume_dir '{self.resume_dir}' and without layers"
            )

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        if results := self.results:
            report = PruningReport(
                state.model.name_or_path,
                None,
                self._seconds,
                results,
                self.reconstructions,
                share_of_layers=self.share_of_weights,
                recipe=active_session().lifecycle.recipe.yaml(),
            )
            describe_on_save(state.model, report)
            error = fmean(result.relative_error for result in results)
            logger.info(
                f"Pruned {len(results)} operators to {report.summary_of_patterns}. "
                f"They hold {100 * self.share_of_weights:.1f} % of the decoder layers' "
                f"weights; mean of ‖W*X* − WX‖ / ‖WX‖ as the solver left them: "
                f"{error:.4f}"
            )
        self.remove_hooks()
        self._contexts.close()
        return True

    @property
    def _owl(self) -> Owl | None:
        """:raises ValueError: unless the three fields of OWL are there, or none is"""
        given = (self.sparsity_profile, self.owl_m, self.owl_lmbda)
        if any(given) and not all(given):
            raise ValueError(
                "sparsity_profile: owl, owl_m and owl_lmbda go together: write all "
                "three, for example owl_m: 5 and owl_lmbda: 0.08, or none"
            )
        return (
            Owl(self.owl_m, self.owl_lmbda) if self.owl_m and self.owl_lmbda else None
        )

    @property
    def _default_distribution(self) -> Distribution:
        """Layers that depend on one another cannot be shared out."""
        return "data" if self._method.procedure.chains_layers else "layers"

    def _finished_layers(self, model: torch.nn.Module) -> FinishedLayers | None:
        if self.resume_dir is None:
            return None
        method = set(type(self).model_fields) - set(Modifier.model_fields) - HOW_TO_RUN
        recipe = self.model_dump(mode="json", include=method)
        recipe["patterns"] = [[*entry] for entry in self.patterns.items()]  # ordered
        run = fingerprint(model, recipe)
        return FinishedLayers(Path(self.resume_dir), run)

    @contextmanager
    def _undone_on_error(self) -> Iterator[Schedule]:
        """The toolkit tells nobody of an error, and the user's model lives on."""
        assert self._schedule is not None, "initialized before any event"
        try:
            yield self._schedule
        except BaseException:
            self.remove_hooks()
            self._epoch.close()
            self._contexts.close()
            raise


def _folder(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _overridden(preset: Options, **given: Any) -> Options:
    """A preset's values, apart from those that a recipe gives."""
    given = {name: value for name, value in given.items() if value is not None}
    return replace(preset, **given)
