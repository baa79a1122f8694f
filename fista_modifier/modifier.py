"""The recipe's face of FISTAPruner: fields and lifecycle, no mathematics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

import torch
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fista_modifier.calibration.attention import check_causal, traced_with_masks
from fista_modifier.calibration.layers import DecoderLayer, group_by_layer
from fista_modifier.calibration.operators import (
    Operator,
    check_prunable,
    find_operators,
)
from fista_modifier.calibration.recording import Recording
from fista_modifier.calibration.replay import calibration_runs
from fista_modifier.calibration.stream import PrunedStream
from fista_modifier.checkpoint.sparsity_config import record_sparsity
from fista_modifier.layer import ErrorCorrection, OperatorResult, prune_layer
from fista_modifier.progress import LayerProgress
from fista_modifier.reconstruction import Reconstruction, ReconstructionResult
from fista_modifier.solver import (
    FAST,
    PAPER,
    SolverOptions,
    SparsityPattern,
    WarmStart,
    parse_pattern,
)

__all__ = ["FISTAPruningModifier", "Preset"]

Preset = Literal["default", "fast", "paper"]
Options = TypeVar("Options", SolverOptions, Reconstruction)
PRESETS: dict[Preset, tuple[SolverOptions, Reconstruction]] = {
    "default": (SolverOptions(), Reconstruction()),
    "fast": (FAST, Reconstruction(epochs=0)),
    "paper": (PAPER, Reconstruction(epochs=0)),
}


class FISTAPruningModifier(Modifier):
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

    :param sparsity: share of zeros in [0, 1); may be left out for n:m
    :param mask_structure: "n:m" keeps n of every m entries of a row; "0:0" is
        unstructured, round(sparsity·m·n) zeros anywhere in the matrix
    :param targets: class names, module names or "re:" patterns. Modules that contain
        linear operators stand for all of them; the output embedding is pruned only
        if a target names it
    :param ignore: what to leave dense, in the same notation
    :param error_correction: "none", "intra" or "full", see above
    :param preset: values of the fields below that the recipe leaves out. "default" is
        the most accurate (docs/method.md): columns scaled, support found by ADMM, kept
        entries refitted. "fast" stops at a shorter ADMM and its refit. "paper" is
        Algorithm 1 as published
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
    :param dampening_frac: damping of the least squares problem (with ``refit``) and of
        a SparseGPT warm start, as a fraction of the mean of diag(G)
    :param block_size: block size of a SparseGPT warm start, in columns
    :param reconstruction_epochs: passes over the calibration batches in which the kept
        weights of a layer are trained together towards the dense layer's output, once
        its operators are pruned; may be a fraction, 0 is none
    :param reconstruction_rate: highest learning rate of this, as a share of an
        operator's mean kept |W_ij|
    """

    requires_calibration_data: bool = True

    sparsity: float | None = None
    mask_structure: str = "0:0"
    targets: str | list[str] = ["Linear"]
    ignore: list[str] = Field(default_factory=list)
    error_correction: ErrorCorrection = "intra"
    preset: Preset = "default"
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

    _results: list[OperatorResult] = PrivateAttr(default_factory=list)
    _reconstructions: dict[str, ReconstructionResult] = PrivateAttr(
        default_factory=dict
    )
    _pattern: SparsityPattern = PrivateAttr()
    _options: SolverOptions = PrivateAttr()
    _reconstruction: Reconstruction = PrivateAttr()
    # what is to be pruned, by decoder layer, in the order of the model
    _layers: list[DecoderLayer] = PrivateAttr(default_factory=list)
    # pruned weights of layers that the pipeline has not left yet
    _pending: dict[Operator, Tensor] = PrivateAttr(default_factory=dict)
    _stream: PrunedStream | None = PrivateAttr(default=None)
    _contexts: ExitStack = PrivateAttr(default_factory=ExitStack)

    @model_validator(mode="after")
    def _check_fields(self) -> FISTAPruningModifier:
        self._pattern = parse_pattern(self.mask_structure, self.sparsity)
        solver, reconstruction = PRESETS[self.preset]
        names = {field.name for field in fields(solver)} - {"start"}
        given = {name: getattr(self, name) for name in names}
        self._options = _overridden(solver, start=self.warm_start, **given)
        self._reconstruction = _overridden(
            reconstruction,
            epochs=self.reconstruction_epochs,
            rate=self.reconstruction_rate,
        )
        if self._options.lambda_init >= self._options.lambda_max:
            raise ValueError(
                f"lambda_init ({self._options.lambda_init}) must be below lambda_max "
                f"({self._options.lambda_max}): the search for λ runs between them"
            )
        return self

    @property
    def results(self) -> list[OperatorResult]:
        """what became of each operator, in the order of pruning"""
        return list(self._results)

    @property
    def reconstructions(self) -> dict[str, ReconstructionResult]:
        """what became of each reconstructed layer, by its name"""
        return dict(self._reconstructions)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """
        Find the operators and refuse what cannot be pruned, before any long work.

        :raises ValueError: if there is no calibration data, if targets match nothing,
            or if an operator cannot have the pattern or is not finite
        """
        model = state.model
        if state.data.calib is None:
            raise ValueError(
                "FISTAPruningModifier needs calibration data: pass dataset=… to oneshot"
            )
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        operators = find_operators(model, targets, self.ignore)
        for operator in operators:
            check_prunable(operator, self._pattern)
        layer_types = infer_sequential_targets(model, kwargs.get("sequential_targets"))
        self._layers = group_by_layer(model, operators, layer_types)
        self._contexts.enter_context(traced_with_masks(model))
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        modifiers = active_session().lifecycle.recipe.modifiers
        others = [type(other).__name__ for other in modifiers if other is not self]
        if others:
            with self._undone_on_error():
                raise ValueError(
                    "FISTAPruningModifier cannot share a calibration epoch with "
                    f"{', '.join(others)}: leave oneshot's pipeline at 'independent'"
                )
        offload_device = torch.device("cpu")
        if self.error_correction == "full":
            self._stream = PrunedStream(offload_device)
        for layer in self._layers:
            if layer.operators or self._stream:
                layer.recording = Recording(
                    layer.module,
                    layer.operators,
                    offload_device,
                    with_outputs=self._reconstructs(layer),
                )
                layer.handles = set(self._register(layer.recording))

    def on_sequential_epoch_end(
        self,
        state: State,
        event: Event,
        modules: list[torch.nn.Module],
        **kwargs: Any,
    ) -> None:
        self._store_pending()
        here = set(modules)
        with self._undone_on_error(), calibration_runs(state.model):
            for layer in self._layers:
                if layer.module in here and layer.recording is not None:
                    self._pending |= self._prune(layer, layer.recording)
                    layer.recording = None
                    self.remove_hooks(layer.handles)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self._store_pending()
        self.remove_hooks()

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        if self._results:
            record_sparsity(state.model, self._results, self._pattern)
        self.remove_hooks()
        self._contexts.close()
        self._layers = []
        self._stream = None
        return True

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """The toolkit tells nobody of an error, and the user's model lives on."""
        try:
            yield
        except BaseException:
            self.remove_hooks()
            self._contexts.close()
            raise

    def _register(self, recording: Recording) -> Iterator[RemovableHandle]:
        for module, hook, kind in recording.hooks():
            arguments = {"with_kwargs": True} if kind == "forward_pre" else {}
            yield self.register_hook(module, hook, kind, **arguments)

    def _prune(
        self, layer: DecoderLayer, recording: Recording
    ) -> dict[Operator, Tensor]:
        """Prune one layer; the model stays as it is."""
        inputs = recording.inputs
        if not len(inputs):
            raise ValueError(
                f"{layer.name} was not run by the calibration pipeline, so it cannot "
                "be pruned; put its operators on the ignore list"
            )
        if layer.in_sequence:
            check_causal(next(iter(inputs)), layer.name)
        stream = self._stream if layer.in_sequence else None
        pruned_inputs = stream.inputs_of(inputs, layer.name) if stream else inputs
        with LayerProgress(layer) as progress:
            pruned = prune_layer(
                layer.operators,
                recording,
                pruned_inputs,
                self._pattern,
                self._options,
                correct_errors=self.error_correction != "none",
                reconstruction=(
                    self._reconstruction if self._reconstructs(layer) else None
                ),
                on_batch=progress.on_batch,
                on_operator=progress.on_operator,
            )
            if pruned.reconstruction:
                self._reconstructions[layer.name] = pruned.reconstruction
                progress.on_reconstruction(pruned.reconstruction)
        self._results += pruned.operators
        if stream:
            stream.advance(inputs, pruned_inputs, pruned.weights)
        return pruned.weights

    def _store_pending(self) -> None:
        """Store the layers that the pipeline has left: it no longer runs them."""
        for operator, weight in self._pending.items():
            operator.save(weight)
        self._pending = {}

    def _reconstructs(self, layer: DecoderLayer) -> bool:
        """A lone operator has no layer around it, and its refit is all there is."""
        wanted = self._reconstruction.epochs > 0
        return wanted and layer.in_sequence and bool(layer.operators)


def _overridden(preset: Options, **given: Any) -> Options:
    """A preset's values, apart from those that a recipe gives."""
    given = {name: value for name, value in given.items() if value is not None}
    return replace(preset, **given)
