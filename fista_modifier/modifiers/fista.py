"""FISTAPruner in recipes: the fields of its modifier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast, get_args

from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator
from transformers import PreTrainedModel

from fista_modifier.distributed import current_ranks
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.targets import check_prunable, warn_of_zeros
from fista_modifier.modifiers.base import LayerwiseModifier, overridden
from fista_modifier.modifiers.patterns import PatternFields
from fista_modifier.modifiers.steps import (
    check_zeros_stay,
    modifiers_before,
    modifiers_of_recipe,
)
from fista_modifier.pruning.corrected import ErrorCorrection
from fista_modifier.pruning.orders import plan_orders
from fista_modifier.pruning.owl import Owl
from fista_modifier.pruning.presets import PRESETS, Preset
from fista_modifier.pruning.results import FISTAPRUNER
from fista_modifier.pruning.schedule import Schedule
from fista_modifier.pruning.sparse import SparseProcedure
from fista_modifier.solver import (
    SolverFactory,
    SolverOptions,
    SparsityPattern,
    WarmStart,
    pattern_of,
)
from fista_modifier.solver.patterns import mask_structure_of, meant_by_sparsegpt
from fista_modifier.solver.warm_start import OneShot

__all__ = ["FISTAPruningModifier"]


NOT_TAKEN = {
    "sequential_update": (
        "llm-compressor takes it for true, whatever it is: leave it out; "
        "error_correction says whether layers see the errors of those before them"
    ),
    "sequential_targets": (
        "it is an argument of oneshot(sequential_targets=…): leave it out of the recipe"
    ),
}
"""
The fields of the toolkit's pruning modifiers that this modifier refuses, and the
reasons.
"""


class FISTAPruningModifier(LayerwiseModifier):
    """
    A modifier that prunes linear operators by FISTAPruner (Zhao et al., EMNLP 2025).
    Each operator is an ℓ1-regularised least squares problem, solved by FISTA, with λ
    tuned until the rounded weight has the lowest output error (Algorithm 1).

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        FISTAPruningModifier:
          mask_structure: "2:4"
          targets: ["Linear"]
          ignore: ["re:.*lm_head"]
    ```

    Layers are independent, unless ``error_correction`` is "full". This field says what
    X* is:

    - ``none``: X* = X, the operator's input in the dense model
    - ``intra`` (the paper's): the layer's input is the dense model's; inside the layer,
      X* follows from the operators pruned before
    - ``full``: X* is the input in the model pruned so far, through all layers; X stays
      the dense model's. This takes one more run of each layer and one more set of its
      inputs.
    """

    sparsity: float | list[float] | None = Field(
        default=None,
        description=(
            "share of zeros in [0, 1); may be left out for n:m. A list has one share "
            "for each decoder layer, and 0 leaves a layer dense"
        ),
    )
    mask_structure: str = Field(
        default="0:0",
        description=(
            '"n:m" keeps n of every m entries of a row; "0:0" is unstructured, '
            "round(sparsity·m·n) zeros anywhere in the matrix"
        ),
    )
    sparsity_profile: Literal["owl"] | None = Field(
        default=None,
        description=(
            '"owl" spreads sparsity over the decoder layers by their outliers (Yin et '
            "al., 2024), with owl_m and owl_lmbda"
        ),
    )
    owl_m: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description=(
            "a weight is an outlier if its |W_ij|·‖x_j‖ is more than so many times the "
            "mean of its layer"
        ),
    )
    owl_lmbda: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="half of the range of the layers' sparsities",
    )
    patterns: dict[str, str] = Field(
        default_factory=dict,
        description=(
            'patterns by targets, in the notation of targets: "n:m", a sparsity, or '
            '"dense". If several entries match an operator, the last one counts. If '
            "none does, the operator has the pattern of the fields above"
        ),
    )
    preset: Preset = Field(
        default="default",
        description=(
            'values of the fields below that the recipe leaves out. "default": '
            "columns scaled, support found by ADMM, kept entries refitted, and "
            'layers reconstructed (docs/method.md). "best" is the most '
            'accurate and takes half as much time again: it has "full" error '
            'correction and two epochs of reconstruction. "fast" ends with ADMM and a '
            'refit of less damping, and trains no layer. "paper" is Algorithm 1 as '
            "published"
        ),
    )
    preserve_sparsity_mask: bool = Field(
        default=False,
        description=(
            "whether zeros of a model that is sparse already stay zero (the "
            "pattern then holds within them); otherwise they may get values "
            "again"
        ),
    )
    permute_channels: bool | None = Field(
        default=None,
        description=(
            "whether channels inside a layer change places, so that an n:m pattern "
            "costs less: those of an MLP, and the dimensions of the values within a "
            "head. The dense model would compute the same. If left out, they do, "
            "unless the warm start is a one-shot method, zeros are preserved, or "
            "Python gives another solver"
        ),
    )
    error_correction: ErrorCorrection | None = Field(
        default=None,
        description=(
            "the operators whose errors an operator makes up for, because its inputs "
            'X* follow them: "none" (X* = X), "intra" (those that were pruned before '
            'in its layer) or "full" (all that were pruned before)'
        ),
    )
    warm_start: WarmStart | None = Field(
        default=None,
        description=(
            'what the solver starts from (W₀*): "dense", "magnitude", "wanda", '
            '"sparsegpt" or "admm"'
        ),
    )
    admm_steps: int | None = Field(
        default=None,
        ge=1,
        description=('steps of an "admm" warm start'),
    )
    column_scaling: bool | None = Field(
        default=None,
        description=("weigh entries by their feature's norm, as Wanda does"),
    )
    refit: bool | None = Field(
        default=None,
        description=(
            "give the kept entries their least squares values after each rounding"
        ),
    )
    lambda_init: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description=(
            "λ₀, where the search for λ starts. λ is in units of "
            "mean|W_ij|·mean(G_jj), G = X* X*ᵀ, which makes it independent of "
            "the amount and scale of the data and of the scale of the weights"
        ),
    )
    lambda_max: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description=("M, the largest λ, in the same unit"),
    )
    max_iterations: int | None = Field(
        default=None,
        ge=1,
        description=("K, FISTA iterations for one value of λ"),
    )
    patience: int | None = Field(
        default=None,
        ge=0,
        description=(
            "T, consecutive values of λ without improvement that end the "
            "search; with 0 there is no search, and the result is the warm start"
        ),
    )
    epsilon: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description=(
            "ε, relative improvement of the error below which the search ends"
        ),
    )
    xi: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description=(
            "ξ: λ is raised while rounding causes more than this share of the error"
        ),
    )
    dampening_frac: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description=(
            "damping of the least squares problem (with refit), as a fraction "
            "of the geometric mean of diag(G), and of a SparseGPT warm start, "
            "as a fraction of its arithmetic mean"
        ),
    )
    block_size: int | None = Field(
        default=None,
        ge=1,
        description=("block size of a SparseGPT warm start, in columns"),
    )
    reconstruction_epochs: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description=(
            "passes over the calibration batches in which the kept weights of a "
            "layer are trained together towards the dense layer's output, once "
            "its operators are pruned; may be a fraction, 0 is none"
        ),
    )
    reconstruction_rate: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description=(
            "highest learning rate of this training, as a share of an operator's mean "
            "kept |W_ij|; halved for a layer that does not bear it"
        ),
    )

    _patterns: PatternFields = PrivateAttr()
    _solver: SolverFactory | None = PrivateAttr(default=None)

    def with_solver(self, solver: SolverFactory) -> FISTAPruningModifier:
        """
        Use another solver in place of Algorithm 1, from Python. All else stays:
        calibration, stages, error correction, reconstruction, reports.

        :param solver: makes the solver of a stage from its sums
        :return: this modifier, with that solver
        """
        self._solver = solver
        return self

    @model_validator(mode="before")
    @classmethod
    def _refuse_fields(cls, given: Any) -> Any:
        """Refuse fields of the toolkit's modifiers that have no meaning here."""
        for name, reason in NOT_TAKEN.items():
            if isinstance(given, dict) and name in given:
                raise ValueError(f"{name} is no field of {cls.__name__}: {reason}")
        return given

    @field_validator("mask_structure", mode="before")
    @classmethod
    def _read_number(cls, value: Any) -> Any:
        """Read n:m without quotes, which YAML takes for a number."""
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return mask_structure_of(value) if is_number else value

    @field_validator("patterns", mode="before")
    @classmethod
    def _read_numbers(cls, value: Any) -> Any:
        """Read a sparsity, and n:m without quotes, which YAML takes for numbers."""
        if not isinstance(value, dict):
            return value
        return {
            target: str(name) if isinstance(name, float) else cls._read_number(name)
            for target, name in value.items()
        }

    @field_validator("sparsity_profile", mode="before")
    @classmethod
    def _read_profile(cls, value: Any) -> Any:
        """Read a profile in lower case, because the toolkit takes "OWL", too."""
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_fields(self) -> FISTAPruningModifier:
        self._patterns = PatternFields(
            self.sparsity, self.mask_structure, self.patterns, self._owl
        )
        options = self._solver_options
        if options.lambda_init >= options.lambda_max:
            raise ValueError(
                f"lambda_init ({options.lambda_init}) must be below lambda_max "
                f"({options.lambda_max}): the search for λ runs between them"
            )
        self._check_sharing(self.without_patterns.chains_layers)
        self._check_order()
        return self

    @property
    def _owl(self) -> Owl | None:
        """
        The choice of sparsities by OWL; None if the recipe has no fields for it.

        :raises ValueError: if only some of the three fields of OWL are there
        """
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
    def _solver_options(self) -> SolverOptions:
        preset = PRESETS[self.preset].options
        return overridden(
            preset,
            start=self.warm_start,
            admm_steps=self.admm_steps,
            column_scaling=self.column_scaling,
            refit=self.refit,
            lambda_init=self.lambda_init,
            lambda_max=self.lambda_max,
            max_iterations=self.max_iterations,
            patience=self.patience,
            epsilon=self.epsilon,
            xi=self.xi,
            dampening_frac=self.dampening_frac,
            block_size=self.block_size,
        )

    def _check_order(self) -> None:
        """
        Refuse ``permute_channels`` with a warm start that would choose zeros in the old
        order of the channels.

        :raises ValueError: if the warm start is a one-shot method
        """
        start = self._solver_options.start
        if self.permute_channels and self._starts_in_one_shot:
            raise ValueError(
                f"permute_channels: a warm start of '{start}' would choose zeros in "
                "the old order of the channels: leave permute_channels out, or write "
                "warm_start: admm"
            )

    @property
    def _starts_in_one_shot(self) -> bool:
        """Whether the warm start is a one-shot method."""
        return self._solver_options.start in get_args(OneShot)

    @property
    def _permutes(self) -> bool:
        """Whether channels change places."""
        if self.permute_channels is not None:
            return self.permute_channels
        expects_given_order = self._starts_in_one_shot or self._solver is not None
        return not (expects_given_order or self.preserve_sparsity_mask)

    @property
    def without_patterns(self) -> SparseProcedure:
        """What is done to a layer, apart from the patterns of its operators."""
        preset = PRESETS[self.preset]
        return SparseProcedure(
            solver=self._solver or self._solver_options,
            reconstruction=overridden(
                preset.reconstruction,
                epochs=self.reconstruction_epochs,
                rate=self.reconstruction_rate,
            ),
            error_correction=self.error_correction or preset.error_correction,
            preserve_sparsity_mask=self.preserve_sparsity_mask,
        )

    def check_steps(self, modifiers: Sequence[Modifier]) -> None:
        super().check_steps(modifiers)
        check_zeros_stay(self, modifiers)

    def procedure(
        self, state: State, layers: Sequence[DecoderLayer]
    ) -> SparseProcedure:
        """
        Return the procedure, which is what is done to each layer.

        :param state: state of the toolkit's session, with the model and the data
        :param layers: layers of the model, with the operators to prune; those that stay
            dense are taken away
        :return: the procedure
        :raises ValueError: if an operator has no pattern, cannot have it or is not
            finite
        """
        self._warn_of_other_meanings()
        patterns = self._patterns.of_operators(
            state.model, layers, state.data.calib, current_ranks()
        )
        procedure = self._with_patterns(patterns, layers)
        _check_new_columns(modifiers_before(self, modifiers_of_recipe()), patterns)
        if not self.preserve_sparsity_mask:
            warn_of_zeros(
                [operator for layer in layers for operator in layer.operators]
            )
        return procedure

    def _prepare(self, state: State, schedule: Schedule) -> None:
        """Find channels that may change places, of which some may have left before."""
        if self._permutes:
            procedure = cast(SparseProcedure, schedule.procedure)
            plan = plan_orders(
                state.model, schedule.layers, state.data.calib, procedure.patterns
            )
            schedule.procedure = replace(procedure, interchangeable=plan)
            if self.permute_channels and not plan:
                logger.warning(
                    "permute_channels: true has no effect, as no channels were found "
                    "that can change places between operators that all get n:m patterns"
                )

    def _warn_of_other_meanings(self) -> None:
        """Warn of fields that mean something else in a recipe of SparseGPTModifier."""
        start = self._solver_options.start
        if self.block_size is not None and (self._solver or start != "sparsegpt"):
            logger.warning(
                f"block_size: {self.block_size} has no effect: only a warm start of "
                f"'sparsegpt' has blocks, and this one is '{start}'. Leave it out"
            )
        if self.sparsity is not None or self.mask_structure == "0:0":
            return
        pattern = pattern_of(self.mask_structure)
        other = meant_by_sparsegpt(pattern)
        if other is not None:
            n, m = other.m - other.n, other.m
            logger.warning(
                f"mask_structure '{pattern}' keeps {n} of every {m} weights, where "
                f"llm-compressor's SparseGPTModifier would prune {n}. If this is what "
                f"you mean, write sparsity: {pattern.sparsity:g} beside it; if not, "
                f"write '{other}'"
            )

    def foreseen(
        self, model: PreTrainedModel, layers: Sequence[DecoderLayer]
    ) -> tuple[SparseProcedure, set[str]]:
        """
        Return the procedure as far as it is known before there are data and weights.

        :param model: the model that is to be pruned, maybe on the meta device
        :param layers: layers of the model, with the operators that targets and ignore
            leave; those that stay dense are taken away
        :return: the procedure, and the names of the operators whose sparsity the data
            will change; the procedure has the mean of these sparsities
        :raises ValueError: as for :meth:`procedure`, apart from weights and data
        """
        by_data = self._patterns.chosen_by_data(model, layers)
        patterns = self._patterns.before_data(model, layers)
        return self._with_patterns(patterns, layers), by_data

    def _with_patterns(
        self, patterns: dict[str, SparsityPattern], layers: Sequence[DecoderLayer]
    ) -> SparseProcedure:
        for layer in layers:
            layer.operators = [one for one in layer.operators if one.name in patterns]
            for operator in layer.operators:
                check_prunable(operator, patterns[operator.name])
        return replace(self.without_patterns, patterns=patterns)

    def _of_report(self) -> dict[str, Any]:
        return {"sparse_by": [FISTAPRUNER if self._solver is None else self._its_name]}

    @property
    def _its_name(self) -> str:
        """The name of a solver that was given from Python."""
        name = getattr(self._solver, "__name__", type(self._solver).__name__)
        return f"{name} (a solver given from Python)"

    def _determines_the_result(self) -> dict[str, Any]:
        method = super()._determines_the_result()
        # the last entry that matches an operator counts, so their order is kept
        method["patterns"] = [[*entry] for entry in self.patterns.items()]
        if self._solver is not None:
            method["solver"] = str(self._solver)
        return method


def _check_new_columns(
    before: Iterable[Modifier], patterns: Mapping[str, SparsityPattern]
) -> None:
    """
    Refuse numbers of columns that earlier steps of the recipe will leave.

    :param before: the modifiers before this one, initialised
    :param patterns: the pattern of each operator, by its name
    :raises ValueError: if an operator's columns cannot be divided into the groups of
        its pattern then
    """
    for modifier in before:
        if not isinstance(modifier, LayerwiseModifier):
            continue
        for name, columns in modifier.new_columns.items():
            try:
                if name in patterns:
                    patterns[name].check_columns(columns)
            except ValueError as error:
                raise ValueError(
                    f"{name} would have {columns} columns after "
                    f"{type(modifier).__name__}, and {error}, or set multiple_of to a "
                    "multiple of the pattern's m"
                ) from None
