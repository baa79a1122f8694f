"""The training of some operators of a model towards another one's predictions."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments, default_data_collator
from transformers.integrations import get_available_reporting_integrations
from transformers.modeling_layers import GradientCheckpointingLayer

from fista_modifier.data.records import recorded_name
from fista_modifier.evaluation.agreement import Agreement, block_agreement
from fista_modifier.evaluation.results import digest, state_of_checkpoint
from fista_modifier.models.limits import check_calibration
from fista_modifier.models.operators import Operator, trainable
from fista_modifier.pruning.results import Calibration, RecoveryResult
from fista_modifier.pruning.runs import fingerprint
from fista_modifier.recovery.distillation import DistillationTrainer
from fista_modifier.recovery.resume import begin, check, last_state
from fista_modifier.recovery.sharding import (
    check_shardable,
    is_sharded,
    shard,
    whole,
)
from fista_modifier.recovery.zeros import KeepZeros, check_unsharded
from fista_modifier.solver.precision import matmul_precision

__all__ = [
    "Diverged",
    "Training",
    "check_enough",
    "check_resume",
    "held_out",
    "in_pieces",
    "train_operators",
]

HELD_OUT = 16
"""
The number of sequences for each one that is held out. A sixteenth of all, and at least
one, is not trained on.
"""
WARM_UP = 0.05
"""The share of the steps in which the learning rate rises."""
STATES = 0.1
"""
The share of the steps between two states on disk, and between two lines of the log.
"""
TENSORBOARD = "TENSORBOARD_LOGGING_DIR"
"""The variable of the environment that names TensorBoard's folder."""


@dataclass(frozen=True)
class Training:
    """
    The settings of a training, which is by AdamW without weight decay. The learning
    rate rises linearly over the first twentieth of the steps, if that is a step at
    least, and falls linearly to zero. A gradient's norm is at most 1. A step of AdamW
    is as long as the rate, whatever the weights are, so the rate is a share of them.

    :param epochs: how often each sequence is seen
    :param rate: the highest learning rate, as a share of an operator's mean kept |W_ij|
    :param batch_size: sequences in a step of one process
    :param gradient_checkpointing: whether layers run again in the backward pass, so
        that their activations need not be kept
    :param seed: seed of the order of the sequences
    :param piece_length: tokens of the longest sequence that is trained on. Longer ones
        are cut into equal pieces, as more steps are worth more than a long context
    :param report_to: the tracker that transformers' ``Trainer`` sends the loss to, such
        as "wandb"; "none" for none
    :raises ValueError: if nothing would be trained, the tracker is not installed, or
        TensorBoard has no folder
    """

    epochs: float = 1.0
    rate: float = 0.002
    batch_size: int = 1
    gradient_checkpointing: bool = False
    seed: int = 0
    piece_length: int = 512
    report_to: str = "none"

    def __post_init__(self) -> None:
        positive = self.epochs > 0 and self.rate > 0 and self.batch_size >= 1
        if not positive or not math.isfinite(self.epochs * self.rate):
            raise ValueError(
                f"{self.epochs:g} epochs, rate {self.rate:g} and "
                f"batches of {self.batch_size} train nothing: each has to be positive "
                "and finite"
            )
        if self.piece_length < 2:
            raise ValueError(
                f"pieces of {self.piece_length} tokens have no next token to predict: "
                "the length has to be 2 at least"
            )
        _check_tracker(self.report_to)

    def arguments(self, folder: Path, kept: bool, bf16: bool) -> TrainingArguments:
        """
        Return the settings in the form that transformers' ``Trainer`` takes.

        :param folder: folder for the states of the training
        :param kept: whether states are written
        :param bf16: whether to multiply in bfloat16
        :return: the arguments of the ``Trainer``
        """
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=self.epochs,
            learning_rate=self.rate,
            per_device_train_batch_size=self.batch_size,
            gradient_checkpointing=self.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            seed=self.seed,
            bf16=bf16,
            optim="adamw_torch",
            weight_decay=0.0,
            lr_scheduler_type="linear",
            warmup_steps=WARM_UP,
            max_grad_norm=1.0,
            save_strategy="steps" if kept else "no",
            save_steps=STATES,
            save_total_limit=1,
            logging_steps=STATES,
            logging_nan_inf_filter=False,
            report_to=self.report_to,
            remove_unused_columns=False,
            dataloader_pin_memory=False,  # a batch is a few tokens
            use_cpu=not torch.accelerator.is_available(),
        )
        # a process that sees several GPUs would take a batch for each of them
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return arguments


def _check_tracker(name: str) -> None:
    if name == "none":
        return
    installed = get_available_reporting_integrations()
    if name not in installed:
        raise ValueError(
            f"the loss cannot be sent to {name}, which transformers does not know or "
            f"which is not installed: take one of {', '.join(['none', *installed])}"
        )
    if name == "tensorboard" and not os.environ.get(TENSORBOARD):
        raise ValueError(
            f"TensorBoard has no folder to write to: set {TENSORBOARD} to one"
        )


class Diverged(RuntimeError):
    """A training that made a model predict nothing."""


@dataclass(frozen=True)
class _Task:
    """What is trained, on what and how. The blocks are those to judge by."""

    operators: Sequence[Operator]
    masks: Mapping[str, Tensor]
    tokens: Dataset
    blocks: Tensor
    arguments: TrainingArguments


def check_resume(
    folder: Path,
    tokens: Dataset,
    data: Calibration,
    training: Training,
    teacher_name: str,
) -> None:
    """
    Refuse the folder of another training, before there is a model to train.

    :param folder: the folder that is to keep the state of the training
    :param tokens: the sequences, before any is held out
    :param data: the data that they are from
    :param training: how to train
    :param teacher_name: the teacher's folder or hub id
    :raises ValueError: if the folder is another run's; the message names what differs
    """
    run = _run(torch.nn.Module(), tokens, training, data, teacher_name)
    del run["model"], run["config"]  # not known yet
    check(folder, run)


def train_operators(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokens: Dataset,
    operators: Sequence[Operator],
    masks: Mapping[str, Tensor],
    data: Calibration,
    training: Training,
    *,
    resume: Path | None = None,
    sharded: bool = False,
    teacher_name: str = "",
) -> RecoveryResult:
    """
    Train some operators of a model towards the teacher's predictions. The method is
    ours; the loss is that of Hinton et al. (2015). Weights are trained in float32, and
    get their own dtypes again. One of sixteen sequences is held out, to see whether the
    training helped.

    :param model: changed in place
    :param teacher: the dense model, with the same vocabulary
    :param tokens: ``input_ids`` and ``attention_mask`` of equal lengths
    :param operators: the operators of the model that are trained
    :param masks: masks, bool out×in, of the operators whose zeros stay zeros, by the
        operators' names
    :param data: the data that the tokens are from
    :param training: how to train
    :param resume: folder that keeps the state of the training; the same call goes on
        from it. See :func:`fista_modifier.recovery.resume.forget`
    :param sharded: whether each process holds a part of the weights while they are
        trained; then only the first one's model is changed
    :param teacher_name: the teacher's folder or hub id
    :return: the result of the training
    :raises ValueError: if there are fewer than two sequences, the model cannot be run
        on them, the folder is another run's, or a process has only a part of the
        weights
    :raises Diverged: if the training has diverged
    """
    started = time.perf_counter()
    if sharded:
        check_shardable(model, resume)
    train, held = held_out(tokens)
    train = in_pieces(train, training.piece_length)
    check_calibration(model, tokens)
    check_calibration(teacher, tokens)
    dtypes = {one.dtype for one in model.parameters()}
    blocks = torch.tensor(held["input_ids"])
    with _states(resume) as folder:
        bf16 = torch.bfloat16 in dtypes and torch.accelerator.is_available()
        arguments = training.arguments(folder, resume is not None, bf16)
        if resume is not None:
            run = _run(model, tokens, training, data, teacher_name)
            # a step has the sequences of all processes, so their number counts
            run["processes"] = {"number": arguments.world_size}
            begin(folder, run)
        task = _Task(operators, masks, train, blocks, arguments)
        train_all = _train_parts if sharded else _train_wholes
        before, after, steps = train_all(model, teacher, task)
    _judge(before.divergence, after.divergence)
    return RecoveryResult(
        teacher=recorded_name(teacher_name or teacher.name_or_path),
        calibration=replace(data, dataset=recorded_name(data.dataset)),
        tokens=sum(map(len, train["input_ids"])),
        held_out_tokens=after.tokens,
        epochs=training.epochs,
        rate=training.rate,
        batch_size=training.batch_size,
        sequence_length=len(train[0]["input_ids"]),
        steps=steps,
        start_divergence=before.divergence,
        divergence=after.divergence,
        seconds=time.perf_counter() - started,
    )


def held_out(tokens: Dataset) -> tuple[Dataset, Dataset]:
    """
    Split sequences into those to train on and those to judge by.

    :param tokens: sequences, in no order
    :return: the sequences to train on, and those to judge by, which are the last
        sixteenth and at least one
    :raises ValueError: if there are not enough for both, or they are of one token
    """
    check_enough(len(tokens), len(tokens[0]["input_ids"]) if len(tokens) else 0)
    border = len(tokens) - max(1, len(tokens) // HELD_OUT)
    return tokens.select(range(border)), tokens.select(range(border, len(tokens)))


def in_pieces(tokens: Dataset, longest: int) -> Dataset:
    """
    Cut sequences into as few pieces of one length as possible. A token that all
    sequences begin with begins each piece, too, because some models predict badly
    without. Of a sequence that cannot be cut into equal pieces, the last tokens are
    left out, fewer than it has pieces.

    :param tokens: sequences of one length
    :param longest: the most tokens of a piece
    :return: the pieces, in the order of the tokens
    """
    length = len(tokens[0]["input_ids"])
    if length <= longest:
        return tokens
    common = int(len({row[0] for row in tokens["input_ids"]}) == 1)
    pieces = math.ceil((length - common) / (longest - common))
    size = (length - common) // pieces
    return Dataset.from_dict(
        {
            column: [
                row[:common] + row[start : start + size]
                for row in tokens[column]
                for start in range(common, common + pieces * size, size)
            ]
            for column in tokens.column_names
        }
    )


def check_enough(sequences: int, length: int) -> None:
    """
    Refuse data that are too few to train on some and judge by others.

    :param sequences: how many there are
    :param length: their tokens
    :raises ValueError: if there are not enough
    """
    if sequences < 2:
        raise ValueError(
            f"{sequences} sequence is too little: one is held out, and at least one is "
            "trained on: use more samples"
        )
    if length < 2:
        raise ValueError(
            "sequences of one token have no next token to predict: use a longer "
            "--seq-len"
        )


def _train_wholes(
    model: PreTrainedModel, teacher: PreTrainedModel, task: _Task
) -> tuple[Agreement, Agreement, int]:
    """
    Train where each process has the whole model. Return the agreement with the teacher
    before and afterwards, and the number of steps.
    """
    for one in (model, teacher):
        one.to(task.arguments.device)
    before = block_agreement(model, teacher, task.blocks, progress=False)
    with _in_float32(model), trainable(model, task.operators):
        steps = _train(model, teacher, task)
    return before, block_agreement(model, teacher, task.blocks, progress=False), steps


def _train_parts(
    model: PreTrainedModel, teacher: PreTrainedModel, task: _Task
) -> tuple[Agreement, Agreement, int]:
    """
    Train a copy of the model of which each process has a part. The first process's
    model gets the weights. Return what :func:`_train_wholes` does.
    """
    part = deepcopy(model).requires_grad_(False)
    for one in task.operators:
        part.get_parameter(f"{one.name}.weight").requires_grad_(True)
    _to_float32(part)
    shard(part, torch.bfloat16 if task.arguments.bf16 else None)
    shard(teacher)
    before = block_agreement(part, teacher, task.blocks, progress=False)
    steps = _train(part, teacher, task)
    for one in task.operators:
        weight, target = (
            one_of.get_parameter(f"{one.name}.weight").data for one_of in (part, model)
        )
        weight.copy_(weight.to(target.dtype))  # as it is stored
        gathered = whole(weight)
        if task.arguments.process_index == 0:
            target.copy_(gathered)
    return before, block_agreement(part, teacher, task.blocks, progress=False), steps


def _train(model: PreTrainedModel, teacher: PreTrainedModel, task: _Task) -> int:
    """Train the parameters that require gradients, and return the number of steps."""
    use_cache = getattr(model.config, "use_cache", None)
    zeros = KeepZeros(task.masks)
    trainer = DistillationTrainer(
        model,
        task.arguments,
        teacher=teacher,
        train_dataset=task.tokens,
        data_collator=default_data_collator,
        callbacks=[zeros] if task.masks else [],
    )
    if not is_sharded(model):
        check_unsharded(model)
    state = last_state(Path(task.arguments.output_dir))
    if state is not None:
        logger.info(f"Resuming the training from {state}")
    try:
        with matmul_precision("bf16"), _without_noise(model):
            trainer.train(resume_from_checkpoint=state and str(state))
    finally:  # after a failure, too, the caller has a model to go on with
        zeros.on_train_end()
        if task.arguments.gradient_checkpointing:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        model.eval()
        if use_cache is not None:  # the Trainer has changed it
            model.config.use_cache = use_cache
    return int(trainer.state.global_step)


@contextmanager
def _without_noise(model: PreTrainedModel) -> Iterator[None]:
    """
    Let a model compute as in evaluation while it is trained, since the teacher has no
    dropout either. A layer counts as in training outside its own forward pass: else it
    would not be run once more in the backward pass.
    """
    layers = [
        one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)
    ]

    def before_model(model: torch.nn.Module, _given: Any) -> None:
        model.eval()
        for layer in layers:
            layer.training = True

    def before_layer(layer: torch.nn.Module, _given: Any) -> None:
        layer.training = False

    def after_layer(layer: torch.nn.Module, _given: Any, _result: Any) -> None:
        layer.training = True

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(before_model).remove)
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(before_layer).remove)
            hooks.callback(layer.register_forward_hook(after_layer).remove)
        yield


@contextmanager
def _states(resume: Path | None) -> Iterator[Path]:
    """Give the ``Trainer`` a folder: the user's, or else one that is deleted again."""
    if resume is not None:
        yield resume
        return
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        yield Path(folder)


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Turn a model's weights into float32, and give each its own dtype afterwards."""
    dtypes = {name: value.dtype for name, value in model.named_parameters()}
    try:
        _to_float32(model)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.data = parameter.data.to(dtypes[name])


def _to_float32(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.float()


def _run(
    model: torch.nn.Module,
    tokens: Dataset,
    training: Training,
    data: Calibration,
    teacher: str,
) -> dict[str, dict[str, Any]]:
    """Return what the result of a training depends on, in sections."""
    state = state_of_checkpoint(teacher) if teacher else ""
    settings = asdict(training)
    del settings["report_to"]  # which changes nothing
    return fingerprint(model, settings) | {
        "teacher": {"name": teacher, "checkpoint": state},
        "data": asdict(data) | {"tokens": digest(list(tokens["input_ids"]))},
    }


def _judge(before: float, after: float) -> None:
    """
    Judge a training by the divergence before and after. A warning says if it rose.

    :raises Diverged: if the divergence is infinite or NaN
    """
    if not after < float("inf"):
        raise Diverged(
            f"the training diverged: the mean KL to the teacher was {before:.4f} and "
            f"is {after}. Use a lower rate"
        )
    if after > before:
        logger.warning(
            f"The mean KL to the teacher rose from {before:.4g} to {after:.4g} on the "
            "sequences that were not trained on: use more samples, fewer epochs or "
            "a lower rate. If pruning was calibrated on these sequences, it may have "
            "fallen on other text: 'fista-prune eval --reference' tells"
        )
