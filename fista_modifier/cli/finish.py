"""The end of a pruning run of the command line: write, verify and print the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from fista_modifier import pipeline
from fista_modifier.checkpoint.storage import StorageFormat
from fista_modifier.checkpoint.verification import verify as verify_checkpoint
from fista_modifier.cli.console import console
from fista_modifier.cli.tables import (
    layer_table,
    operator_table,
    removal_sentence,
    removal_table,
    trained_sentence,
)
from fista_modifier.cli.verify import check
from fista_modifier.data.records import recorded_name
from fista_modifier.distributed import leave_ranks
from fista_modifier.pruning.results import REPORT_NAME, Calibration

__all__ = ["finish"]


def finish(
    run: pipeline.PruningRun,
    tokenizer: PreTrainedTokenizerBase,
    data: Calibration,
    folder: Path,
    storage_format: StorageFormat = "dense",
) -> None:
    """
    Write the checkpoint of a run, verify it, and print what was done.

    :param run: the pruned model
    :param tokenizer: the model's tokenizer
    :param data: the data that the model was calibrated on
    :param folder: the checkpoint's folder
    :param storage_format: the format of the pruned weights
    :raises RuntimeError: if the checkpoint on disk is not what it should be
    """
    named = replace(data, dataset=recorded_name(data.dataset))
    report = run.report and replace(run.report, calibration=named)
    pipeline.save(run.model, tokenizer, folder, report, storage_format)
    if leave_ranks().rank:
        return
    wrote = f"Wrote [bold]{escape(str(folder))}[/]"
    if report is None:
        if (folder / REPORT_NAME).is_file():  # the model was pruned before
            check(verify_checkpoint(folder), folder)
        console.print(f"{wrote}.")
        return
    if report.smaller:
        console.print(removal_table(report.smaller))
    if report.removed_share is not None:
        console.print(removal_sentence(report))
    if report.sparse:
        console.print(operator_table(report.sparse))
    if report.layers:
        console.print(layer_table(report.layers))
    for recovery in report.recovery:
        console.print(trained_sentence(recovery))
    check(verify_checkpoint(folder), folder)
    console.print(f"{wrote} after {report.seconds:.0f} s of calibration and pruning.")
