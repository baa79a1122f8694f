"""The way from a model's name to a pruned checkpoint on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fista_modifier.checkpoint.model_card import write_model_card
from fista_modifier.checkpoint.on_save import (
    report_of,
    report_of_checkpoint,
    saved_by_caller,
)
from fista_modifier.checkpoint.processors import copy_processors
from fista_modifier.checkpoint.storage import StorageFormat, convert
from fista_modifier.data import calibration_dataset
from fista_modifier.distributed import current_ranks
from fista_modifier.files import whole
from fista_modifier.models.experts import native_experts
from fista_modifier.models.generation import make_generation_config_storable
from fista_modifier.models.limits import check_calibration
from fista_modifier.models.loading import load_config, load_model, load_tokenizer
from fista_modifier.modifiers.base import LayerwiseModifier
from fista_modifier.modifiers.recipes import read_recipe
from fista_modifier.pruning.results import (
    Calibration,
    OperatorResult,
    PruningReport,
)

__all__ = [
    "PruningRun",
    "calibration_tokens",
    "check_output",
    "load_config",
    "load_model",
    "load_tokenizer",
    "prune",
    "save",
]


@dataclass(frozen=True)
class PruningRun:
    """
    A model after its recipe was applied.

    :param model: the pruned model, in memory
    :param report: what this package did to it; None if the recipe has no modifier of
        this package
    :param unfinished: names of the layers that are left to other runs
    """

    model: PreTrainedModel
    report: PruningReport | None = None
    unfinished: Sequence[str] = ()

    @property
    def results(self) -> Sequence[OperatorResult]:
        """The result of each operator; none without a report."""
        return self.report.operators if self.report else ()


def calibration_tokens(
    data: Calibration, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """
    Read the calibration data that the user has chosen, as tokens.

    :param data: the user's choice
    :param tokenizer: the model's tokenizer
    :return: the sequences of tokens
    """
    return calibration_dataset(
        data.dataset,
        tokenizer,
        samples=data.samples,
        seq_len=data.seq_len,
        seed=data.seed,
        text_column=data.text_column,
    )


def check_output(
    folder: Path,
    overwrite: bool,
    others: Iterable[Path | None] = (),
    replaced: Iterable[str] = (),
) -> None:
    """
    Refuse a folder that no checkpoint can be written to. A checkpoint is written beside
    its folder and takes its place in the end.

    :param folder: where a checkpoint is about to be written
    :param overwrite: whether what is there may be replaced
    :param others: what the run reads from or keeps something in; None stands for none
    :param replaced: what the run reads first, which the output may replace: checkpoints
        or ids on the hub
    :raises ValueError: if one of these lies in the folder, which is replaced
    :raises FileExistsError: if the folder is not empty and may not be replaced, or is
        a file
    :raises OSError: if it cannot be replaced, or nothing can be written beside it
    """
    absolute = folder.resolve()
    if os.path.ismount(absolute) or Path.cwd().is_relative_to(absolute):
        raise OSError(
            f"the output folder {folder} is in use as a whole: name one inside it"
        )
    read = [Path(one) for one in replaced if Path(one).resolve() != absolute]
    for other in (*others, *read):
        if other is not None and other.resolve().is_relative_to(absolute):
            raise ValueError(
                f"{other} lies in the output folder {folder}, which is replaced in the "
                "end: name an output folder beside it"
            )
    there = next(parent for parent in absolute.parents if parent.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"the output folder {folder} cannot be written: no permission for {there}"
        )
    if folder.is_file():
        raise FileExistsError(f"the output folder {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"the output folder {folder} is not empty: name another one, or pass "
            "--overwrite to replace it"
        )


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Dataset,
    recipe: str | Path | Recipe | Modifier | Sequence[Modifier],
    *,
    batch_size: int = 1,
) -> PruningRun:
    """
    Apply a recipe with the toolkit's ``oneshot``. It uses the whole calibration set in
    its order, so that the same call gives the same weights. With several ranks, each
    takes its part of the set.

    :param model: changed in place
    :param tokenizer: the model's tokenizer
    :param calibration: ``input_ids`` and ``attention_mask`` of equal lengths
    :param recipe: a recipe, a modifier or several, YAML text, or a YAML file
    :param batch_size: sequences in one forward pass
    :return: the pruned model and what became of each operator
    :raises ValueError: if there are more ranks than sequences, the model cannot be run
        on the sequences or could not be saved, the recipe is not one, or it would have
        no effect
    """
    ranks = current_ranks()
    if ranks.size > len(calibration):
        raise ValueError(
            f"{len(calibration)} calibration sequences are too few for {ranks.size} "
            "ranks: start fewer processes"
        )
    applied = read_recipe(recipe)
    make_generation_config_storable(model)
    check_calibration(model, calibration)
    # oneshot gives all ranks the first part of a set that they share
    calibration = calibration.shard(ranks.size, ranks.rank, contiguous=True)
    # only modifiers of others need the propagation pass, which runs each layer again
    propagate = any(
        modifier.requires_calibration_data
        and not isinstance(modifier, LayerwiseModifier)
        for modifier in applied.modifiers
    )
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=calibration,
        recipe=applied,
        propagate_error=propagate,
        num_calibration_samples=len(calibration),
        max_seq_length=None,
        shuffle_calibration_samples=False,
        batch_size=batch_size,
    )
    unfinished = [
        layer
        for modifier in applied.modifiers
        if isinstance(modifier, LayerwiseModifier)
        for layer in modifier.unfinished
    ]
    return PruningRun(model, report_of(model), unfinished)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    report: PruningReport | None = None,
    storage_format: StorageFormat = "dense",
) -> None:
    """
    Write a checkpoint, its report and its model card, completely or not at all. They
    are written to a folder beside the target, which then takes its place. Tensors get
    the names of the checkpoint that the model came from, and its processors of images
    and sounds are copied; the model stays as it is.

    :param model: what to save
    :param tokenizer: saved with it
    :param folder: the checkpoint's folder; replaced if it exists
    :param report: what was done to the model, saved with it and a model card; if left
        out, what was done to it in this process, or else to the checkpoint that it came
        from
    :param storage_format: the format of the operators in the report
    :raises ValueError: if they cannot have the format; the checkpoint is then dense
    :raises OSError: if the checkpoint cannot be written, for example on a full disk;
        the message names the folder, and what was there stays
    :raises RuntimeError: if it failed so on the first of several ranks
    """
    ranks = current_ranks()
    ranks.wait()  # one may still write scales that another packs

    def save_mine() -> None:
        if ranks.rank == 0:
            _write(model, tokenizer, folder, report, storage_format)
            return
        with native_experts(model):
            model.save_pretrained(folder)  # all take part; only the first rank writes

    ranks.each(save_mine)  # they come back when the checkpoint is there


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    report: PruningReport | None,
    storage_format: StorageFormat,
) -> None:
    """Write a checkpoint as :func:`save` does, in the one process that writes."""
    refused: ValueError | None = None
    report = report or report_of(model) or report_of_checkpoint(model)
    with saved_by_caller(model), whole(folder) as unfinished:
        try:
            with native_experts(model):
                model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            copy_processors(model.name_or_path, unfinished)
            if report:
                operators = [operator.name for operator in report.operators]
                share = 1.0
                try:
                    share = convert(unfinished, operators, storage_format)
                except ValueError as error:  # the work must not be lost for it
                    refused, storage_format = error, "dense"
                report = replace(
                    report, storage_format=storage_format, stored_share=share
                )
                report.save(unfinished)
                write_model_card(unfinished, report)
        except Exception as error:
            raise OSError(
                f"could not write the checkpoint {folder}: {error}"
            ) from error
    if refused is not None:
        raise ValueError(
            f"{refused}. The checkpoint {folder} is whole, with dense weights"
        ) from refused
