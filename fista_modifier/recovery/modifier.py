"""Recovery as a step of a recipe, between pruning and quantisation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.offload.dispatch import remove_dispatch
from compressed_tensors.utils import patch_attr
from datasets import Dataset
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from loguru import logger
from pydantic import Field, PrivateAttr
from transformers import PreTrainedModel

from fista_modifier.calibration.contexts import plain_forward
from fista_modifier.checkpoint.on_save import revise_report, when_saved
from fista_modifier.distributed import current_ranks
from fista_modifier.models.limits import check_length
from fista_modifier.models.loading import load_config, load_model
from fista_modifier.models.operators import Operator
from fista_modifier.models.tracing import configs_of
from fista_modifier.models.vocabulary import check_vocabulary_size
from fista_modifier.modifiers.base import LayerwiseModifier, undone_if_refused
from fista_modifier.modifiers.steps import (
    check_own_folder,
    modifiers_before,
    modifiers_of_recipe,
)
from fista_modifier.pruning.results import Calibration, PruningReport, RecoveryResult
from fista_modifier.recovery.checks import check_architecture, check_unchanged
from fista_modifier.recovery.obstacles import (
    check_trainable,
    free_memory,
    lack_of_memory,
)
from fista_modifier.recovery.recover import (
    counted_zeros,
    kept_entries,
    operators_to_train,
    with_recovery,
)
from fista_modifier.recovery.resume import forget
from fista_modifier.recovery.training import (
    Diverged,
    Training,
    check_resume,
    train_operators,
)

__all__ = ["RecoveryModifier"]

COLUMNS = ("input_ids", "attention_mask")
"""The columns of the calibration data that the training reads."""


class RecoveryModifier(Modifier):  # type: ignore[misc]
    """
    A step of a recipe that trains what this package's modifiers before it have kept,
    end to end, towards the dense model's predictions, as ``fista-prune recover`` does.
    It is trained on oneshot's calibration data, of which one sequence in sixteen is
    held out. Zeros stay zeros. A quantisation may follow.

    The whole model is trained, so the device has to have room for it: see
    ``docs/recovery.md``.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        FISTAPruningModifier:
          mask_structure: "2:4"
          preset: fast
          ignore: ["re:.*lm_head"]
    recovery_stage:
      recovery_modifiers:
        RecoveryModifier:
          epochs: 1
    ```

    Lifecycle:

    - on_initialize
        - refuse what cannot be trained, and warn of what may not fit on the device,
          before any long work
    - on_calibration_end
        - train the model; if that fails, give it back the weights that pruning left
    - on_finalize
        - add the training to the report
    """

    teacher: str | None = Field(
        default=None,
        description=(
            "the dense model, a folder or a hub id; by default the one that the "
            "model was loaded from"
        ),
    )
    epochs: float = Field(
        default=Training.epochs, description="how often each sequence is seen"
    )
    rate: float = Field(
        default=Training.rate,
        description=(
            "the highest learning rate, as a share of an operator's mean kept |W_ij|"
        ),
    )
    batch_size: int = Field(
        default=Training.batch_size, description="sequences in a step"
    )
    gradient_checkpointing: bool = Field(
        default=Training.gradient_checkpointing,
        description="run layers again in the backward pass, to keep fewer activations",
    )
    seed: int = Field(
        default=Training.seed, description="seed of the order of the sequences"
    )
    piece_length: int = Field(
        default=Training.piece_length,
        description=(
            "tokens of the longest sequence that is trained on; longer ones are cut "
            "into equal pieces, for more steps"
        ),
    )
    report_to: str = Field(
        default=Training.report_to,
        description=(
            'the tracker that is sent the loss, such as "wandb" or "tensorboard"'
        ),
    )
    resume_dir: str | None = Field(
        default=None,
        description=(
            "folder that keeps the last state of the training; the same run goes on "
            "from it, and deletes it once the model is saved"
        ),
    )

    _pruners: list[LayerwiseModifier] = PrivateAttr(default_factory=list)
    _training: Training = PrivateAttr()
    _tokens: Dataset = PrivateAttr()
    _named: Calibration | None = PrivateAttr(default=None)
    _recovery: RecoveryResult | None = PrivateAttr(default=None)
    _has_ended: bool = PrivateAttr(default=False)  # so that its states have no use
    _failure: str | None = PrivateAttr(default=None)
    _zeros: dict[str, int] = PrivateAttr(default_factory=dict)

    @property
    def failure(self) -> str | None:
        """Why the training failed; None if it did not."""
        return self._failure

    def name_data(self, data: Calibration) -> None:
        """
        Say which data the run has, which it does not know itself, for the report.

        :param data: the data that ``oneshot()`` is about to be given
        """
        self._named = data

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """
        Refuse what cannot be trained, before any long work.

        :raises OSError: if there is no such teacher
        :raises ValueError: if nothing is pruned before this step or something is
            quantised, the settings would train nothing or name a tracker that is not
            installed, ``resume_dir`` belongs to another run, there are no calibration
            data, they are not texts of one length, too few or too long for the model,
            the model does not predict text, the teacher is another model, the model has
            changed since it was loaded and no teacher is named, there are several
            processes, or weights are on a disk
        """
        with undone_if_refused(state.model):
            self._set_up(state)
        return True

    def _set_up(self, state: State) -> None:
        self._training = Training(
            self.epochs,
            self.rate,
            self.batch_size,
            self.gradient_checkpointing,
            self.seed,
            self.piece_length,
            self.report_to,
        )
        check_own_folder(self, modifiers_of_recipe())
        self._pruners = _pruners(self)
        model = state.model
        _check_in_memory(model)
        _check_data(state)
        self._tokens = _tokens(state)  # a sampler that shuffles draws others later
        check_trainable(model.config, current_ranks().size, *_size(self._tokens))
        if not self.teacher:
            self.teacher = _origin(model)
        dense = load_config(self.teacher)
        check_architecture(model.config, dense, self.teacher)
        check_vocabulary_size(model.config, dense, self.teacher)
        memory = free_memory()
        if memory and (lack := lack_of_memory(model, self._pruners, memory)):
            logger.warning(
                f"{lack}: leave it out (--no-recover), and run 'fista-prune recover' "
                "on a larger device"
            )
        if self.resume_dir is not None:
            check_resume(
                Path(self.resume_dir),
                self._tokens,
                self._data(),
                self._training,
                self.teacher,
            )

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """
        Train the model. A training that fails, as it diverges or there is no room on
        the device or the disk, costs nobody the pruning: the model gets back the
        weights that pruning left, and an error is logged.
        """
        if any(pruner.unfinished for pruner in self._pruners):
            logger.warning("RecoveryModifier waits for the layers that are not pruned")
            return
        model = state.model
        results = [one for pruner in self._pruners for one in pruner.results]
        operators = operators_to_train(model, results)
        pruned = {one.name: one.weight.to("cpu", copy=True) for one in operators}
        try:
            recovery = self._train(model, operators)
        except Exception as error:  # transformers' code may raise anything
            for one in operators:
                one.save(pruned[one.name])
            self._failure = f"{type(error).__name__}: {error}"
            self._has_ended = isinstance(error, Diverged)
            logger.opt(exception=True).error(
                "The recovery has failed, and the model is as pruning left it: "
                f"{error}. Save it, and try 'fista-prune recover'"
            )
            return
        self._has_ended = True
        logger.info(
            "Mean KL to the teacher on sequences that were not trained on: "
            f"{recovery.start_divergence:.4f} -> {recovery.divergence:.4f}"
        )
        self._recovery = recovery
        self._zeros = counted_zeros(operators)

    def _train(
        self, model: PreTrainedModel, operators: Sequence[Operator]
    ) -> RecoveryResult:
        teacher = load_model(str(self.teacher))
        with (
            _trainable_model(model),
            torch.enable_grad(),
            plain_forward(model),
            _same_attention(model, teacher),
        ):
            return train_operators(
                model,
                teacher,
                self._tokens,
                operators,
                kept_entries(operators),
                self._data(),
                self._training,
                resume=None if self.resume_dir is None else Path(self.resume_dir),
                teacher_name=str(self.teacher),
            )

    def _data(self) -> Calibration:
        if self._named is not None:
            return self._named
        return Calibration("oneshot's data", *_size(self._tokens), self.seed)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        if self._recovery is not None:
            recovery = self._recovery

            def trained(report: PruningReport) -> PruningReport:
                return with_recovery(report, recovery, self._zeros)

            revise_report(state.model, trained)
        if self._has_ended and self.resume_dir is not None:
            when_saved(state.model, partial(forget, Path(self.resume_dir)))
        return True


def _origin(model: PreTrainedModel) -> str:
    """
    Return the name of the checkpoint that holds a dense model.

    :raises ValueError: if it was not loaded from one, or has changed since
    """
    origin = str(model.name_or_path)
    if not origin:
        raise ValueError(
            "the model was not loaded from a checkpoint: name the dense model in "
            "RecoveryModifier's 'teacher'"
        )
    check_unchanged(model, origin)
    return origin


def _pruners(modifier: RecoveryModifier) -> list[LayerwiseModifier]:
    """
    Return the modifiers of this package that come before one in the recipe.

    :raises ValueError: if there are none, or one of the others quantises
    """
    before = modifiers_before(modifier, modifiers_of_recipe())
    for one in before:
        if isinstance(one, QuantizationMixin):
            raise ValueError(
                f"{type(one).__name__} comes before RecoveryModifier, and rounded "
                "weights cannot be trained: quantise afterwards"
            )
    pruners = [one for one in before if isinstance(one, LayerwiseModifier)]
    if not pruners:
        raise ValueError(
            "RecoveryModifier trains what a modifier before it has pruned, and the "
            "recipe has none: put it behind FISTAPruningModifier, FASPPruningModifier "
            "or SPAPPruningModifier"
        )
    return pruners


def _check_in_memory(model: PreTrainedModel) -> None:
    """
    Refuse a model of which weights are on a disk.

    :raises ValueError: if there are such weights
    """
    with disable_onloading():
        on_disk = any(one.device.type == "meta" for one in model.parameters())
    if on_disk:
        raise ValueError(
            "RecoveryModifier trains the whole model, and some of its weights are on a "
            "disk (--offload, device_map): take the step out of the recipe, and run "
            "'fista-prune recover' where there is room for the model"
        )


def _check_data(state: State) -> None:
    """
    Refuse calibration data that are not whole sequences of text of one length.

    :raises ValueError: if there are none, sequences have different lengths,
        padding or more tokens than the model can be given, or the model is given more
        than text
    """
    data = getattr(state.data.calib, "dataset", None)
    if not isinstance(data, Dataset) or "input_ids" not in data.column_names:
        raise ValueError(
            "RecoveryModifier needs calibration data with input_ids: pass dataset=… to "
            "oneshot"
        )
    known = {*COLUMNS, "labels"}
    accepted = inspect.signature(state.model.forward).parameters
    if others := sorted({*data.column_names} & {*accepted} - known):
        raise ValueError(
            f"the calibration data have {', '.join(others)}, and RecoveryModifier "
            "trains on text alone: leave it out, and run 'fista-prune recover' on text "
            "afterwards"
        )
    longest = _longest(state)
    advice = "join texts and cut them into blocks, as 'fista-prune prune' does"
    lengths = {len(row[:longest]) for row in data["input_ids"]}
    if len(lengths) > 1:
        raise ValueError(
            f"the calibration sequences have {min(lengths)} to {max(lengths)} tokens, "
            f"and RecoveryModifier needs equal lengths: {advice}"
        )
    masks = data["attention_mask"] if COLUMNS[1] in data.column_names else []
    if padded := sum(0 in mask[:longest] for mask in masks):
        raise ValueError(
            f"{padded} of {len(data)} calibration sequences are padded, and "
            f"RecoveryModifier needs whole ones: {advice}"
        )
    check_length(state.model, max(lengths))


def _tokens(state: State) -> Dataset:
    """
    Return the sequences that the toolkit's loader takes from the data, in the order of
    the data, and as long as the loader leaves them.
    """
    loader, longest = state.data.calib, _longest(state)
    with torch.random.fork_rng(devices=[]):  # a shuffling sampler draws from it
        data = loader.dataset.select(sorted(loader.sampler))
    columns = [column for column in COLUMNS if column in data.column_names]
    return Dataset.from_dict(
        {column: [row[:longest] for row in data[column]] for column in columns}
    )


def _size(tokens: Dataset) -> tuple[int, int]:
    """Return the number of sequences and their tokens."""
    return len(tokens), len(tokens[0]["input_ids"])


def _longest(state: State) -> int | None:
    """Return the length that the toolkit's loader cuts sequences to; None for any."""
    longest: int | None = getattr(state.data.calib.collate_fn, "max_seq_length", None)
    return longest


@contextmanager
def _same_attention(model: PreTrainedModel, teacher: PreTrainedModel) -> Iterator[None]:
    """
    Give a model the teacher's implementation of attention: some leave out soft caps of
    the scores, which the weights must not be trained to make up for.
    """
    name = "_attn_implementation"
    chosen = {type(one): getattr(one, name) for one in configs_of(teacher)}
    with ExitStack() as stack:
        for config in configs_of(model):
            own = getattr(config, name)
            stack.enter_context(patch_attr(config, name, chosen.get(type(config), own)))
        yield


@contextmanager
def _trainable_model(model: PreTrainedModel) -> Iterator[None]:
    """
    Give a model its plain weights, without the toolkit's offloading, on one device. The
    toolkit offloads it again when it runs it next.
    """
    remove_dispatch(model)
    device = model.device
    try:
        yield
    finally:
        model.to(device)
