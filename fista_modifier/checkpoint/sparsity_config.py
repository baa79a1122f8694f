"""The sparsity of a model in compressed-tensors' vocabulary, in its ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from compressed_tensors.config import SparsityCompressionConfig, SparsityStructure
from loguru import logger
from transformers import AutoConfig

from fista_modifier.models.resizing import settings_in
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
    toolkit writes those of the dense model. A setting that transformers would derive
    from them, such as the size of a head, is written, too, as it was.

    :param folder: the checkpoint's folder
    :param sizes: the sizes by their names in the configuration; dots separate the names
        of nested configurations, which some files have in one
    """
    if not sizes:
        return
    file, content = _read(folder)
    dense = _settings(folder)
    _put(content, sizes)
    _write(file, content)
    wanted: dict[str, Any] = {**dense, **sizes}
    changed = _differing(wanted, _settings(folder))
    if not changed:
        return
    _put(content, changed)
    for name, value in changed.items():  # older names of a setting go before it
        owner, last = _owner(content, name)
        prefix = name.removesuffix(last)
        for key, old in owner.items():
            if prefix + key not in dense and type(old) is int and old == dense[name]:
                owner[key] = value
    _write(file, content)
    if left := _differing(wanted, _settings(folder)):
        logger.error(
            f"{file} does not describe the smaller model, whose sizes are {left}: "
            "transformers reads other values from it. Correct it by hand"
        )


def _put(content: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        owner, last = _owner(content, name)
        owner[last] = value


def _owner(content: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """Return the part of a file that has a setting, and the setting's own name."""
    *path, last = name.split(".")
    return reduce(lambda inner, key: inner.get(key, inner), path, content), last


def _settings(folder: Path) -> dict[str, int]:
    """
    Return the numbers in a checkpoint's configuration as transformers reads them, by
    their names. There are none if it cannot, as of a model with its own code.
    """
    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # configurations may raise anything
        return {}
    return {
        ".".join(path): value
        for path, value in settings_in(config)
        if isinstance(value, int)
    }


def _differing(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is wanted where something else was found."""
    return {
        name: value
        for name, value in wanted.items()
        if name in found and found[name] != value
    }


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
