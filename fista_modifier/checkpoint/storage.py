"""The formats of a checkpoint: dense, or without the zeros of its pruned operators."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Container, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from fista_modifier.checkpoint.model_card import (
    stated_perplexities,
    update_model_card,
)
from fista_modifier.checkpoint.packing import (
    PackedFormat,
    pack,
    parts_of,
    stored_twice,
)
from fista_modifier.checkpoint.shards import locate, read, rewrite
from fista_modifier.checkpoint.sparsity_config import (
    restore_sparsity,
    write_legacy_sparsity,
)
from fista_modifier.files import whole
from fista_modifier.pruning.results import REPORT_NAME, PruningReport

__all__ = ["StorageFormat", "check_storable", "convert", "unpack_checkpoint"]

StorageFormat = Literal["dense", "dense-legacy", PackedFormat]
"""
The format in which weights are stored. "dense-legacy" differs from "dense" only in
config.json.
"""


def convert(
    folder: Path, operators: Iterable[str], storage_format: StorageFormat
) -> float:
    """
    Give a dense checkpoint another format, in place. On any error it stays dense.

    :param folder: the checkpoint, not quantised
    :param operators: names of its pruned operators
    :param storage_format: the format
    :return: bytes of the pruned operators, as a share of their bytes before
    :raises ValueError: if the checkpoint is quantised, or an operator's weight cannot
        have the format or has another name in the files; the message names the operator
    """
    names = sorted(operators)
    if storage_format == "dense":
        return 1.0
    write_legacy_sparsity(folder, names, storage_format.removesuffix("-legacy"))
    if storage_format == "dense-legacy":
        return 1.0
    try:
        return _pack_operators(folder, set(names), storage_format)
    except BaseException:
        restore_sparsity(folder)
        raise


def check_storable(
    operator: str, stored: Container[str], packed_format: StorageFormat
) -> None:
    """
    Refuse an operator whose weight has another name in a checkpoint than in the model.

    :param operator: name of the operator
    :param stored: names of the checkpoint's tensors
    :param packed_format: the format that it is to have
    :raises ValueError: if its weight is not among them under its own name
    """
    if f"{operator}.weight" not in stored:
        raise ValueError(
            f"{packed_format} is for tensors with the names of their operators, and "
            f"the files have {operator} under another name: use --format dense"
        )


def _pack_operators(
    folder: Path, operators: set[str], packed_format: PackedFormat
) -> float:
    files, problems = locate(folder)
    for operator in sorted(operators):
        check_storable(operator, files, packed_format)
    before = after = 0

    def packed(name: str, tensor: Tensor) -> dict[str, Tensor]:
        nonlocal before, after
        operator = name.removesuffix(".weight")
        if operator == name or operator not in operators:
            return {name: tensor}
        try:
            parts = pack(tensor, packed_format)
        except ValueError as error:
            raise ValueError(f"{operator}: {error}") from None
        before += tensor.nbytes
        after += sum(part.nbytes for part in parts.values())
        return {f"{operator}.{part}": value for part, value in parts.items()}

    with tempfile.TemporaryDirectory(prefix=".packed-", dir=folder) as temporary:
        rewrite(read(files, problems), Path(temporary), packed)
        _check(folder, problems)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)
    return after / before if before else 1.0


def unpack_checkpoint(folder: Path, output: Path) -> int:
    """
    Write a packed checkpoint as a dense one. Its weights are bit for bit those that
    were packed.

    :param folder: the packed checkpoint; the parts of a weight may be in any shards
    :param output: an empty folder, or one that does not exist yet
    :return: number of weights that were unpacked
    :raises FileNotFoundError: if there is no checkpoint
    :raises FileExistsError: if there is something in the output folder
    :raises ValueError: if nothing is packed, or the checkpoint is damaged; the message
        names what is damaged
    """
    files, problems = locate(folder)
    _check(folder, problems)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"the output folder {output} is not empty")
    operators = {found[0] for name in files if (found := parts_of(name))}
    if not operators:
        raise ValueError(f"{folder} has no packed weights")
    _check(folder, stored_twice(files))
    weights = set(files.values())
    with whole(output) as unfinished:
        unfinished.mkdir()
        for file in folder.iterdir():
            if file.is_dir():  # such as further chat templates
                shutil.copytree(file, unfinished / file.name)
            elif file.is_file() and file not in weights:
                shutil.copy2(file, unfinished)
        restore_sparsity(unfinished)
        if (unfinished / REPORT_NAME).is_file():
            report = PruningReport.load(unfinished)
            report = replace(report, storage_format="dense", stored_share=1.0)
            report.save(unfinished)
            update_model_card(unfinished, report, stated_perplexities(folder))
        rewrite(read(files, problems), unfinished)
        _check(folder, problems)
    return len(operators)


def _check(folder: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{folder} is damaged: " + "; ".join(problems))
