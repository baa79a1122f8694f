"""
Results of each operator, of each layer and of a model, and the report of them.

Nothing here needs the toolkit (llm-compressor): a report can be read where that cannot
be installed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fista_modifier.host import package_versions
from fista_modifier.solver.trials import Trial
from fista_modifier.structured.patterns import lost_channels

__all__ = [
    "PACKAGES",
    "REPORT_NAME",
    "SHOWN",
    "Calibration",
    "OperatorResult",
    "PruningReport",
    "ReconstructionResult",
    "RecoveryResult",
    "mean_error",
    "short_name",
]

REPORT_NAME = "pruning_report.json"
FISTAPRUNER = "FISTAPruner (Zhao et al., EMNLP 2025)"
"""The name of the method in reports and model cards."""
SHOWN = 4
"""
The most patterns that a summary names one by one. It gives the range of more of them.
"""
PACKAGES = (
    "fista-modifier",
    "llmcompressor",
    "compressed-tensors",
    "transformers",
    "torch",
)


@dataclass(frozen=True)
class OperatorResult:
    """
    What became of one operator.

    :param name: name of the operator's module
    :param shape: (m, n), out and in features
    :param pattern: the sparsity asked for
    :param zeros: number of zero entries of W*
    :param relative_error: ‖W* X* − W X‖_F / ‖W X‖_F as the solver left the operator,
        over all calibration tokens; that is how it is stored, unless its layer was
        reconstructed
    :param relative_start_error: the relative error of the warm start
    :param penalty: λ of the best trial, in units of ``lambda_unit``; 0 if the warm
        start was never improved on
    :param trials: number of values of λ tried
    :param iterations: FISTA iterations in all
    :param tokens: calibration tokens that reached the operator
    :param seconds: wall time of the solver: that of its stage, shared out by rows
    :param reconstructed_error: the error of the weight as it is stored, over every
        sixteenth batch; None if its layer was not reconstructed
    :param search: the values of λ, in the order in which they were tried, with errors
        relative like those above
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    zeros: int
    relative_error: float
    relative_start_error: float
    penalty: float
    trials: int
    iterations: int
    tokens: int
    seconds: float
    reconstructed_error: float | None = None
    search: tuple[Trial, ...] = ()

    @property
    def stored_error(self) -> float:
        """The relative error of the weight as it is stored."""
        if self.reconstructed_error is None:
            return self.relative_error
        return self.reconstructed_error

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / (self.shape[0] * self.shape[1])

    @property
    def is_smaller(self) -> bool:
        """
        True if the operator lost whole channels (of which some are zeros in place), and
        did not get the zeros of a pattern.
        """
        return lost_channels(self.pattern)

    @property
    def kind(self) -> str:
        """The last part of the name, such as ``q_proj``."""
        return self.name.rpartition(".")[2]


def mean_error(
    results: Iterable[OperatorResult], error: Callable[[OperatorResult], float]
) -> float:
    """
    Return the mean of an error over operators, without those that no calibration token
    reached (experts that a router never chose), whose errors are not known.

    :param results: what became of operators
    :param error: one of an operator's errors
    :return: the mean; NaN if no operator was reached
    """
    known = [error(result) for result in results if result.tokens]
    return fmean(known) if known else math.nan


@dataclass(frozen=True)
class ReconstructionResult:
    """
    What became of a layer. Errors are over the tokens of every sixteenth batch. Those
    of the layer are the root mean square of ‖o* − o‖ / ‖o‖, o being the layer's output
    for a token; each feature counts by its size, as ``docs/method.md`` says.

    :param start_error: error of the layer with its operators as the solver left them
    :param error: error of the layer as it is stored
    :param operator_errors: ‖W* X* − W X‖_F / ‖W X‖_F of each operator as it is stored,
        by its name; none for an operator that not all tokens reach (an expert),
        because other tokens may reach it in the pruned layer than in the dense one
    :param steps: steps of Adam; 0 if they did not lower the error and were undone
    :param seconds: wall time
    :param rate: the highest learning rate of these steps, as a share of an operator's
        mean kept |W_ij|; None in reports of older versions
    """

    start_error: float
    error: float
    operator_errors: dict[str, float]
    steps: int
    seconds: float
    rate: float | None = None

    def after(self, earlier: ReconstructionResult | None) -> ReconstructionResult:
        """
        Return this result with the time of an earlier training of the same layer.

        :param earlier: the result of a step before in the recipe; None if there is none
        :return: the result, with the time of both
        """
        seconds = earlier.seconds if earlier else 0.0
        return replace(self, seconds=self.seconds + seconds)


@dataclass(frozen=True)
class Calibration:
    """
    The data that a model was calibrated on.

    :param dataset: local file or hub id
    :param samples: number of sequences
    :param seq_len: tokens in each sequence
    :param seed: seed of the choice of sequences
    :param text_column: the column that holds the text, if the user named one
    """

    dataset: str
    samples: int
    seq_len: int
    seed: int
    text_column: str | None = None


@dataclass(frozen=True)
class RecoveryResult:
    """
    The outcome of a training of the whole pruned model, towards the dense one's
    predictions. Divergences are mean KL(teacher ‖ model) in nats per token, over
    sequences that were held out. Pruning may have been calibrated on these: both are
    lower then than on other text.

    :param teacher: the dense model, a folder or a hub id
    :param calibration: the data that the model was trained on, with what was held out
        of them
    :param tokens: tokens that the model was trained on, in each epoch
    :param held_out_tokens: tokens that the model was not trained on
    :param epochs: how often the model saw the tokens
    :param rate: the highest learning rate, as a share of an operator's mean kept |W_ij|
    :param batch_size: sequences in a step of one process
    :param steps: steps of AdamW
    :param start_divergence: divergence of the model as pruning left it
    :param divergence: divergence of the model as it is stored
    :param seconds: wall time of the process that finished the training
    :param sequence_length: tokens of a sequence in a step; None if that is the
        calibration's, as in reports of earlier versions
    :param pruned_after: whether the model was pruned once more after the training, so
        that the divergence is not that of the checkpoint
    """

    teacher: str
    calibration: Calibration
    tokens: int
    held_out_tokens: int
    epochs: float
    rate: float
    batch_size: int
    steps: int
    start_divergence: float
    divergence: float
    seconds: float
    sequence_length: int | None = None
    pruned_after: bool = False


@dataclass(frozen=True)
class PruningReport:
    """
    The report of what was done to a model, which is kept beside its checkpoint.

    :param model: the model that was pruned, a folder or a hub id
    :param calibration: the data that it was calibrated on; None if only the caller of
        ``oneshot()`` knows
    :param seconds: wall time of calibration and pruning, in the process that finished
        the run
    :param operators: what became of each operator, in the order of pruning
    :param layers: what became of each reconstructed decoder layer, by its name
    :param storage_format: how the operators' weights are stored
    :param stored_share: bytes of these weights, as a share of those of dense ones
    :param share_of_layers: what the pruned operators hold of the matrices in the
        decoder layers; reports of older versions have none
    :param removed_share: share of the decoder layers' parameters that left the model;
        None if nothing did
    :param zeroed_share: share of the decoder layers' parameters that belong to whole
        channels which are zeros in place, and did not leave; None if there are none
    :param zero_rows: number of output channels that are zeros in place, biases too, by
        the names of the operators that have some
    :param sizes: values of config.json that changed as channels left, by their names,
        with dots between those of nested configurations
    :param sparse_by: the methods that found the zeros; reports of older versions have
        none, and are of FISTAPruner
    :param smaller_by: the published methods that took channels out. If the recipe names
        another choice of channels than the method's, that choice is named too
    :param recovery: each training of the whole model after its pruning, in order; the
        operators' errors are those before it, their zeros those after it
    :param recipe: the recipe that was applied, as YAML; reports of older versions have
        none
    :param versions: versions of this package and of those that its result depends on
    """

    model: str
    calibration: Calibration | None
    seconds: float
    operators: Sequence[OperatorResult]
    layers: dict[str, ReconstructionResult] = field(default_factory=dict)
    storage_format: str = "dense"
    stored_share: float = 1.0
    share_of_layers: float | None = None
    removed_share: float | None = None
    zeroed_share: float | None = None
    zero_rows: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    sparse_by: Sequence[str] = field(default_factory=list)
    smaller_by: Sequence[str] = field(default_factory=list)
    recovery: Sequence[RecoveryResult] = field(default_factory=list)
    recipe: str = ""
    versions: dict[str, str] = field(
        default_factory=lambda: package_versions(*PACKAGES)
    )

    @property
    def tokens(self) -> int:
        """Number of calibration tokens, without padding."""
        return max((operator.tokens for operator in self.operators), default=0)

    @property
    def stored(self) -> list[OperatorResult]:
        """The last result of each operator, which is that of what is stored."""
        return _last(self.operators)

    @property
    def patterns(self) -> dict[str, int]:
        """
        Number of operators with each size or pattern, by its name, the most common
        first.
        """
        changes = [*self.smaller, *self.sparse]
        return dict(Counter(one.pattern for one in changes).most_common())

    @property
    def summary_of_patterns(self) -> str:
        """
        The patterns in words: the only one, a few with their counts, or the range of
        many.
        """
        counts = self.patterns
        if len(counts) > SHOWN:
            changes = [*self.smaller, *self.sparse]
            by_zeros = sorted(changes, key=lambda operator: operator.sparsity)
            least, most = by_zeros[0].pattern, by_zeros[-1].pattern
            return f"{len(counts)} patterns from {least} to {most}"
        if len(counts) > 1:
            return ", ".join(f"{one} ({count})" for one, count in counts.items())
        return "".join(counts)

    @property
    def smaller(self) -> list[OperatorResult]:
        """The last loss of channels of each operator that lost some."""
        return _last(one for one in self.operators if one.is_smaller)

    @property
    def sparse(self) -> list[OperatorResult]:
        """
        The last zeros of each operator that got some. It may have lost channels before.
        """
        return _last(one for one in self.operators if not one.is_smaller)

    @property
    def solvers(self) -> Sequence[str]:
        """The methods that found the zeros; none if the model has got none."""
        return (self.sparse_by or [FISTAPRUNER]) if self.sparse else ()

    @property
    def methods(self) -> list[str]:
        """The names of all methods, without their references."""
        return [*map(short_name, (*self.smaller_by, *self.solvers))]

    @property
    def sparsity(self) -> float:
        """The share of zeros in the weights of all operators that got some."""
        operators = self.sparse
        zeros = sum(operator.zeros for operator in operators)
        return zeros / max(_weights(operators), 1)

    @property
    def is_recovered(self) -> bool:
        """Whether a training of the whole model was the last that changed weights."""
        return bool(self.recovery) and not self.recovery[-1].pruned_after

    def followed_by(self, later: PruningReport) -> PruningReport:
        """
        Join this report with one of what was done to the same model afterwards.

        :param later: the later report
        :return: a report of both
        """
        share = None
        if self.share_of_layers is not None and later.share_of_layers is not None:
            again = {operator.name for operator in later.operators}
            before = [one for one in self.stored if one.name not in again]
            left = _weights(before) / max(_weights(self.stored), 1)
            share = later.share_of_layers + left * self.share_of_layers
        earlier = [
            replace(one, pruned_after=one.pruned_after or bool(later.operators))
            for one in self.recovery
        ]
        return replace(
            later,
            model=self.model,
            share_of_layers=share,
            removed_share=_removed(self.removed_share, later.removed_share),
            zeroed_share=_zeroed(self, later),
            zero_rows=self.zero_rows | later.zero_rows,
            sizes=self.sizes | later.sizes,
            sparse_by=list(dict.fromkeys((*self.sparse_by, *later.sparse_by))),
            smaller_by=list(dict.fromkeys((*self.smaller_by, *later.smaller_by))),
            recovery=[*earlier, *later.recovery],
            calibration=later.calibration if later.operators else self.calibration,
            seconds=self.seconds + later.seconds,
            operators=[*self.operators, *later.operators],
            layers=self.layers
            | {
                name: one.after(self.layers.get(name))
                for name, one in later.layers.items()
            },
        )

    def save(self, folder: Path) -> None:
        """
        Write ``pruning_report.json`` into a folder.

        :param folder: folder of the checkpoint
        """
        text = json.dumps(asdict(self), indent=2)
        (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> PruningReport:
        """
        Read the report of a checkpoint.

        :param folder: folder of the checkpoint
        :return: its report
        :raises FileNotFoundError: if it has none
        :raises ValueError: if the file is not such a report, naming the field
        """
        file = folder / REPORT_NAME
        try:
            return TypeAdapter(cls).validate_json(file.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{file} is not a pruning report: {error}") from error


def short_name(method: str) -> str:
    """
    Return the name of a method without its reference.

    :param method: a method as reports name it
    :return: its first word
    """
    return method.partition(" ")[0]


def _removed(first: float | None, then: float | None) -> float | None:
    """
    Return the share that two runs remove together. The second is a share of what the
    first has left. None means that a run removes nothing.
    """
    if first is None or then is None:
        return then if first is None else first
    return 1 - (1 - first) * (1 - then)


def _zeroed(first: PruningReport, then: PruningReport) -> float | None:
    """
    Return the share that two runs leave as zeros in place, of the layers as they were
    before both. The second is a share of what the first has left. Only one of them has
    any, because dimensions of values are set to zero once.
    """
    if then.zeroed_share is None:
        return first.zeroed_share
    return (1 - (first.removed_share or 0)) * then.zeroed_share


def _last(results: Iterable[OperatorResult]) -> list[OperatorResult]:
    """Return the last result of each operator; a chain may prune an operator twice."""
    return list({one.name: one for one in results}.values())


def _weights(operators: Sequence[OperatorResult]) -> int:
    return sum(math.prod(operator.shape) for operator in operators)
