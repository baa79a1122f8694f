"""The sparsity of a model in compressed-tensors' vocabulary, in its ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from compressed_tensors.config import SparsityCompressionConfig, SparsityStructure

from fista_modifier.pruning.results import OperatorResult
from fista_modifier.solver.patterns import reported_pattern

__all__ = [
    "restore_sparsity",
    "write_legacy_sparsity",
    "write_sizes",
    "write_sparsity",
]

KEY, QUANTIZATION = "sparsity_config", "quantization_config"
UNSTRUCTURED = SparsityStructure.UNSTRUCTURED.value


def write_sparsity(
    folder: Path,
    operators: Sequence[OperatorResult],
    entries: int,
    share_of_layers: float | None = None,
) -> None:
    """
    Write ``sparsity_config`` into ``config.json``. At the top level, only a program
    that looks for it reads it. If it were inside ``quantization_config``, transformers
    would insist on compressed-tensors. If it had targets, vLLM (since 0.22) would
    insist on a format that it no longer has.

    :param folder: the checkpoint's folder
    :param operators: the results of the pruned operators
    :param entries: number of entries of all parameters of the model
    :param share_of_layers: share of the decoder layers' matrices that the pruned
        operators hold; if it is less than half, the model is said to have no structure
    """
    groups = {reported_pattern(operator.pattern).group for operator in operators}
    group = groups.pop() if len(groups) == 1 else None
    if share_of_layers is not None and share_of_layers < 0.5:
        group = None
    file, content = _read(folder)
    content[KEY] = SparsityCompressionConfig(
        format="dense",
        targets=[],
        ignore=[],
        global_sparsity=round(sum(one.zeros for one in operators) / entries, 6),
        sparsity_structure=f"{group[0]}:{group[1]}" if group else UNSTRUCTURED,
    ).model_dump()
    _write(file, content)


def write_sizes(folder: Path, sizes: Mapping[str, Any]) -> None:
    """
    Write the sizes of a model that channels have left into ``config.json``, where the
    toolkit writes those of the dense model.

    :param folder: the checkpoint's folder
    :param sizes: the sizes by their names in the configuration; dots separate the names
        of nested configurations, which some files have in one
    """
    if not sizes:
        return
    file, content = _read(folder)
    for name, value in sizes.items():
        *path, last = name.split(".")
        reduce(lambda inner, key: inner.get(key, inner), path, content)[last] = value
    _write(file, content)


def write_legacy_sparsity(
    folder: Path, operators: Sequence[str], storage_format: str = "dense"
) -> None:
    """
    Move ``sparsity_config`` to where compressed-tensors up to 0.14 and vLLM up to 0.18
    look for it, with the operators as targets. Current vLLM refuses such a checkpoint.

    :param folder: the folder of a checkpoint that is not quantised
    :param operators: names of the pruned operators
    :param storage_format: "dense", or how the operators' weights are packed
    :raises ValueError: if the checkpoint has no sparsity, or is quantised
    """
    file, content = _read(folder)
    if QUANTIZATION in content:
        raise ValueError(
            f"{folder} is quantised: only plain weights have another format than dense"
        )
    if KEY not in content:
        raise ValueError(f"{file} has no '{KEY}': the checkpoint was not pruned here")
    sparsity = content.pop(KEY)
    content[QUANTIZATION] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        KEY: sparsity | {"format": storage_format, "targets": list(operators)},
    }
    _write(file, content)


def restore_sparsity(folder: Path) -> None:
    """
    Undo :func:`write_legacy_sparsity`, for a checkpoint whose weights are now dense.

    :param folder: the checkpoint's folder
    :raises ValueError: if ``quantization_config`` has no sparsity, or the checkpoint is
        quantised as well
    """
    file, content = _read(folder)
    quantization = content.pop(QUANTIZATION, None)
    if not isinstance(quantization, dict) or not isinstance(
        quantization.get(KEY), dict
    ):
        raise ValueError(f"{file} does not say how its weights are packed")
    if quantization.get("config_groups"):
        raise ValueError(f"{folder} is quantised as well: only plain weights unpack")
    content[KEY] = quantization[KEY] | {"format": "dense", "targets": []}
    _write(file, content)


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} describes no model")
    return file, content


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
