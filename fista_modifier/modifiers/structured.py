"""FASP and SPAP in recipes: the fields of their modifiers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from transformers import PreTrainedModel

from fista_modifier.checkpoint.on_save import report_of, report_of_checkpoint
from fista_modifier.models.experts import note_sizes
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.operators import Operator
from fista_modifier.models.resizing import apply_changes
from fista_modifier.models.targets import (
    check_prunable,
    check_quantisable,
    share_of_zeros,
)
from fista_modifier.modifiers.base import LayerwiseModifier, overridden
from fista_modifier.modifiers.steps import check_zeros_stay, modifiers_before
from fista_modifier.pruning.channels import ChannelPlan, Structure, plan_channels
from fista_modifier.pruning.corrected import ErrorCorrection
from fista_modifier.pruning.reconstruction import Reconstruction
from fista_modifier.pruning.structured import StructuredProcedure
from fista_modifier.solver import Unstructured
from fista_modifier.structured import (
    Alternation,
    BiasCompensation,
    FASPScore,
    Fluctuation,
    GreedyElimination,
    KeptWeights,
    LeastSquares,
    LocalSearch,
    Magnitude,
    PenaltyMethod,
    Restorer,
    Selector,
)

__all__ = [
    "FASPPruningModifier",
    "SPAPPruningModifier",
    "StructuredModifier",
    "StructuredPreset",
]

StructuredPreset = Literal["default", "paper"]
SelectorName = Literal["fasp", "spap", "greedy", "local", "flap", "magnitude"]
RestorerName = Literal["least_squares", "alternating", "bias", "none"]
RECONSTRUCTION = {"default": Reconstruction(), "paper": Reconstruction(epochs=0)}
SPARSE = 0.2
"""
The share of zeros above which an operator must have been pruned already. Even weights
that once had 4 bits have only 8 % of zeros.
"""
PRUNING_OF_TOOLKIT = "llmcompressor.modifiers.pruning."


class StructuredModifier(LayerwiseModifier):
    """
    A modifier that takes whole channels out of a model. The model becomes smaller, is
    dense, and is faster wherever it is served (docs/structured.md).
    """

    sparsity: float = Field(
        gt=0,
        lt=1,
        description=(
            "share of the decoder layers' parameters that leaves the model (or, of "
            '"value_dims", is zero in place)'
        ),
    )
    structures: list[Structure] = Field(
        default=["mlp"],
        min_length=1,
        description=(
            'what leaves: "mlp" (channels of MLPs and of experts), "heads" (whole '
            "key/value heads with their query heads), or both. FASP also takes "
            '"value_dims" (single dimensions of the values), but not together with '
            '"heads". These become zeros in place and make no model smaller, because '
            "no loader takes values of fewer dimensions"
        ),
    )
    multiple_of: int = Field(
        default=64,
        ge=1,
        description=(
            "the number of an MLP's channels stays a multiple of this, for tiles of "
            "GPU kernels and for tensor parallelism"
        ),
    )
    preset: StructuredPreset = Field(
        default="default",
        description=(
            'values of the fields below that the recipe leaves out. "default" trains '
            'what is left of each layer; "paper" is the method as published '
            "(SPAP's as we read its abstract, with an alternating restorer)"
        ),
    )
    error_correction: ErrorCorrection | None = Field(
        default=None,
        description=(
            'what the inputs X* of an operator follow: "none" (they are the dense '
            'model\'s), "intra" (what was pruned before in the layer) or "full" (what '
            "was pruned before in all layers)"
        ),
    )
    selector: SelectorName | None = Field(
        default=None,
        description=(
            'what chooses the channels: "fasp", "spap", "greedy" (ZipLM), "local" '
            '(OSSCAR), "flap" or "magnitude"'
        ),
    )
    restorer: RestorerName | None = Field(
        default=None,
        description=(
            'what makes up for the channels that leave: "least_squares" (FASP\'s), '
            '"alternating" (SPAP\'s: it starts from least squares and solves for the '
            'weights of down and of up in turn), "bias" (FLAP\'s, which needs a bias) '
            'or "none". Left out, it is "least_squares", or for SPAP\'s preset "paper" '
            '"alternating"'
        ),
    )
    dampening_frac: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description=(
            "damping of the least squares problem, as a fraction of the geometric mean "
            "of diag(G)"
        ),
    )
    reconstruction_epochs: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description=(
            "passes over the calibration batches in which the weights of a layer are "
            "trained together towards the dense layer's output; may be a fraction, 0 "
            "is none"
        ),
    )
    reconstruction_rate: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description=(
            "highest learning rate of this training, as a share of an operator's mean "
            "|W_ij|; halved for a layer that does not bear it"
        ),
    )

    SELECTOR: ClassVar[SelectorName]
    PAPERS_RESTORER: ClassVar[RestorerName] = "least_squares"
    HAS_VALUES: ClassVar[bool] = False
    PUBLISHED: ClassVar[str]
    _plan: ChannelPlan = PrivateAttr(default_factory=ChannelPlan)

    @model_validator(mode="after")
    def _check_fields(self) -> StructuredModifier:
        self._check_sharing(self._without_plan.chains_layers)
        self._check_structures()
        return self

    def _check_structures(self) -> None:
        if len(set(self.structures)) < len(self.structures):
            raise ValueError(
                f"structures: {self.structures} names one of them twice: name each once"
            )
        if "value_dims" not in self.structures:
            return
        if not self.HAS_VALUES:
            raise ValueError(
                'structures: "value_dims" are of FASP: leave them '
                "out, or use FASPPruningModifier"
            )
        if "heads" in self.structures:
            raise ValueError(
                'structures: "heads" and "value_dims" are of the same operators: leave '
                "one of them out"
            )

    @property
    def removed(self) -> float:
        """Exact share of the decoder layers' parameters that leaves the model."""
        return self._plan.removed

    @property
    def method(self) -> str:
        """Name of the published method, and of the selector if it is another one."""
        if self.selector in (None, self.SELECTOR):
            return self.PUBLISHED
        return f"{self.PUBLISHED}, with channels chosen by '{self.selector}'"

    @property
    def _without_plan(self) -> StructuredProcedure:
        return StructuredProcedure(
            selector=self._selector,
            restorer=self._restorer,
            alternation=self._alternation,
            reconstruction=overridden(
                RECONSTRUCTION[self.preset],
                epochs=self.reconstruction_epochs,
                rate=self.reconstruction_rate,
            ),
            error_correction=self.error_correction or "intra",
        )

    @property
    def _damping(self) -> dict[str, float]:
        if self.dampening_frac is None:
            return {}
        return {"dampening_frac": self.dampening_frac}

    @property
    def _selector(self) -> Selector:
        chosen: dict[SelectorName, Any] = {
            "fasp": FASPScore,
            "flap": Fluctuation,
            "magnitude": Magnitude,
        }
        damped: dict[SelectorName, Any] = {
            "spap": PenaltyMethod,
            "greedy": GreedyElimination,
            "local": LocalSearch,
        }
        name = self.selector or self.SELECTOR
        made: Selector = (
            chosen[name]() if name in chosen else damped[name](**self._damping)
        )
        return made

    @property
    def _restorer_name(self) -> RestorerName:
        papers = self.PAPERS_RESTORER if self.preset == "paper" else "least_squares"
        return self.restorer or papers

    @property
    def _restorer(self) -> Restorer:
        if self._restorer_name == "none":
            return KeptWeights()
        if self._restorer_name == "bias":
            return BiasCompensation()
        return LeastSquares(**self._damping)

    @property
    def _alternation(self) -> Alternation | None:
        if self._restorer_name != "alternating":
            return None
        if self.dampening_frac is None:
            return Alternation()
        return Alternation(dampening_frac=self.dampening_frac)

    def procedure(
        self, state: State, layers: Sequence[DecoderLayer]
    ) -> StructuredProcedure:
        """
        Return the procedure, which is what is done to each layer.

        :param state: state of the toolkit's session, with the model and the data
        :param layers: layers of the model, with the operators that may be changed
        :return: the procedure
        :raises ValueError: if channels cannot leave the model, or too many would
        """
        return self.foreseen(state.model, layers, state.data.calib)

    def foreseen(
        self,
        model: PreTrainedModel,
        layers: Sequence[DecoderLayer],
        batches: Iterable[dict[str, Any]],
    ) -> StructuredProcedure:
        """
        Return the procedure. Batches of any tokens will do for it.

        :param model: the dense model, with its weights
        :param layers: layers of the model, with the operators that may be changed
        :param batches: batches of tokens
        :return: the procedure
        :raises ValueError: as for :meth:`procedure`
        """
        _check_values_left(model)
        operators = [operator for layer in layers for operator in layer.operators]
        for operator in operators:
            check_prunable(operator, Unstructured(0.0))
        name, share = share_of_zeros(operators)
        if share > SPARSE:
            raise ValueError(
                f"{100 * share:.0f} % of {name} are zeros, which would get values "
                "again: take channels out first, and prune to a pattern afterwards"
            )
        self._plan = plan_channels(
            model,
            layers,
            batches,
            self.structures,
            self.sparsity,
            self.multiple_of,
        )
        self._check_biases()
        self._leave_out_others(layers)
        if self._plan.zeroed:
            logger.warning(
                f"{100 * self._plan.zeroed:.2f} % of the decoder layers' parameters "
                "will be zeros in place, as dimensions of values: no loader takes "
                "values of fewer dimensions, so that these make the model neither "
                "smaller nor faster"
            )
        return replace(self._without_plan, plan=self._plan)

    def _leave_out_others(self, layers: Sequence[DecoderLayer]) -> None:
        """
        Take their operators away from layers that no channels leave: lone operators,
        and layers that the data do not reach.
        """
        others = [one for one in layers if one.name not in self._plan.groups]
        names = [one.name for one in others if one.in_sequence and one.operators]
        for layer in others:
            layer.operators = []
        if names:
            logger.warning(
                f"The calibration data do not reach {len(names)} layers, which stay as "
                f"they are and do not count: {names[0]} and others"
            )

    @property
    def zeroed(self) -> float:
        """Exact share of the decoder layers' parameters that is zeros in place."""
        return self._plan.zeroed

    def _check_biases(self) -> None:
        """
        Refuse a restorer that puts constants into biases, where there are none.

        :raises ValueError: if an operator that loses columns has no bias
        """
        if self._restorer_name != "bias":
            return
        for plan in self._plan.every:
            operator = plan.consumer.operator
            if operator.module.bias is None:
                raise ValueError(
                    f"restorer: 'bias' puts a constant into the bias of {operator.name}"
                    ", which has none: use 'least_squares'"
                )

    def check_steps(self, modifiers: Sequence[Modifier]) -> None:
        """
        Refuse a recipe in which another pruning modifier comes before this one. The
        model shows no zeros of the other one yet, because a recipe is initialised as a
        whole, before any of its modifiers runs. Zeros of its own must stay, too.

        :param modifiers: all modifiers of the recipe, in order
        :raises ValueError: if other steps do not go with this one
        """
        super().check_steps(modifiers)
        if "value_dims" in self.structures:
            check_zeros_stay(self, modifiers)
        for other in modifiers_before(self, modifiers):
            kind = type(other)
            if isinstance(other, LayerwiseModifier) or kind.__module__.startswith(
                PRUNING_OF_TOOLKIT
            ):
                raise ValueError(
                    f"{type(self).__name__} comes after {kind.__name__}, whose zeros "
                    "would get values again: take channels out first, by one modifier "
                    "with all structures, and prune to a pattern afterwards"
                )

    @property
    def new_columns(self) -> dict[str, int]:
        """
        The number of columns that operators will have afterwards, by their names. Those
        that keep theirs are not among them.
        """
        return {
            operator.name: columns for operator, columns in self._smaller_consumers()
        }

    def _smaller_consumers(self) -> Iterator[tuple[Operator, int]]:
        for plan in self._plan.every:
            if not plan.zeroes:
                operator, indices = plan.consumer
                yield operator, plan.keep * indices.shape[1]

    def check_quantisable(self) -> None:
        """
        Refuse sizes that cannot be quantised as the recipe asks. All modifiers of the
        recipe must be initialised before.

        :raises ValueError: if an operator is to be quantised in groups of columns into
            which its new columns cannot be divided
        """
        for operator, columns in self._smaller_consumers():
            check_quantisable(operator, columns)

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        with self._undone_on_error():
            self.check_quantisable()
        super().on_calibration_start(state, event, **kwargs)

    def _of_report(self) -> dict[str, Any]:
        sizes = {".".join(path): value for path, value in self._plan.changes}
        return {
            "removed_share": self.removed,
            "zeroed_share": self.zeroed or None,
            "zero_rows": self._plan.zero_rows,
            "sizes": sizes,
            "smaller_by": [self.method],
        }

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        super().on_calibration_end(state, event, **kwargs)
        # At once, as a later step of the recipe may fail.
        if not self.unfinished:
            apply_changes(state.model.config, self._plan.changes)
            note_sizes(state.model)


def _check_values_left(model: PreTrainedModel) -> None:
    """
    Refuse a model in which dimensions of values are zeros in place already. They would
    be counted once more, or leave with their heads.

    :raises ValueError: if an earlier run has made some, in this process or before
    """
    report = report_of(model) or report_of_checkpoint(model)
    if report and report.zero_rows:
        name = next(iter(report.zero_rows))
        raise ValueError(
            f"{report.zero_rows[name]} dimensions of values in {name} are zeros in "
            "place already, of an earlier run: take the dense model, and name all "
            "structures in one run"
        )


class FASPPruningModifier(StructuredModifier):
    """
    A modifier that takes channels out of a model by FASP (Hu, Zhao, Yuan et al., 2025).
    Those channels leave whose scores |W_ij| ‖X_j‖, summed over a column, are lowest.
    Least squares restores the operators that read them.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        FASPPruningModifier:
          sparsity: 0.2
          ignore: ["re:.*lm_head"]
    ```
    """

    SELECTOR: ClassVar[SelectorName] = "fasp"
    HAS_VALUES: ClassVar[bool] = True
    PUBLISHED: ClassVar[str] = "FASP (Hu, Zhao, Yuan et al., 2025)"


class SPAPPruningModifier(StructuredModifier):
    """
    A modifier that takes channels out of a model by SPAP's penalty method (Hu, Yuan,
    2025). The error is minimised over the share z ∈ [0, 1] of each channel that is
    kept, and a growing penalty makes z binary. With preset "paper" the weights of an
    MLP's last operator and of its linear one are then found in turn (alternating
    minimisation), and no layer is trained. The abstract gives no formulas, so this is
    our reading of it.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        SPAPPruningModifier:
          sparsity: 0.2
          ignore: ["re:.*lm_head"]
    ```
    """

    SELECTOR: ClassVar[SelectorName] = "spap"
    PAPERS_RESTORER: ClassVar[RestorerName] = "alternating"
    PUBLISHED: ClassVar[str] = "SPAP (Hu and Yuan, 2025)"
