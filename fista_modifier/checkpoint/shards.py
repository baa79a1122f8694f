"""The files of a checkpoint's weights, which are found, read and written one by one."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fista_modifier.checkpoint.packing import parts_of, unpack

__all__ = ["as_value_error", "locate", "read", "rewrite"]

UNREADABLE = (SafetensorError, RuntimeError, TypeError, ValueError, MemoryError)
"""
The errors that safetensors and torch raise for a file that is not as its header says.
"""


def locate(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """
    Find the file of each tensor of a checkpoint.

    :param folder: a checkpoint
    :return: the file of each tensor, and a sentence for each disagreement between the
        index and the shards
    :raises FileNotFoundError: if there is neither an index nor a file of weights
    :raises ValueError: if the index or a file cannot be read
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        single = folder / SAFE_WEIGHTS_NAME
        if not single.is_file():
            raise FileNotFoundError(f"{folder} has no {SAFE_WEIGHTS_NAME}")
        return dict.fromkeys(_keys(single), single), []
    with as_value_error(f"{index} is not an index of shards"):
        listed: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        if any(Path(shard).name != shard for shard in listed.values()):
            raise ValueError("a shard lies outside the folder")
    problems = []
    held: dict[str, Path] = {}
    for shard in sorted(set(listed.values())):
        if (folder / shard).is_file():
            held |= dict.fromkeys(_keys(folder / shard), folder / shard)
        else:
            problems.append(f"the shard {shard} is missing")
    for name in sorted(set(listed) | set(held)):
        indexed = listed.get(name, "no file")
        actual = held[name].name if name in held else "no file"
        if indexed != actual:
            problems.append(f"{name} is in {actual}, but indexed in {indexed}")
    return held, problems


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (*UNREADABLE, OSError) as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from error


def read(
    files: dict[str, Path], problems: list[str]
) -> Iterator[tuple[Path, str, Tensor]]:
    """
    Read each tensor of a checkpoint, and unpack the packed weights.

    :param files: the file of each tensor
    :param problems: gets a sentence for each tensor that cannot be read
    :return: file, name and tensor, file by file
    """
    packed: defaultdict[str, list[str]] = defaultdict(list)
    for name in files:
        if found := parts_of(name):
            packed[found[0]].append(found[1])
    names: defaultdict[Path, list[str]] = defaultdict(list)
    for name, file in files.items():
        names[file].append(name)
    for file, held in sorted(names.items()):
        with safe_open(file, "pt") as opened:  # opened once: its header may be long
            tensor = partial(_tensor, files, file, opened)
            for name in held:
                operator, part = parts_of(name) or (None, None)
                try:
                    if operator is None:
                        yield file, name, tensor(name)
                    elif part == packed[operator][0]:
                        parts = packed[operator]
                        whole = {part: tensor(f"{operator}.{part}") for part in parts}
                        yield file, f"{operator}.weight", unpack(whole)
                except UNREADABLE as error:
                    problems.append(f"{name} cannot be read: {error}")


def _tensor(files: dict[str, Path], here: Path, opened: Any, name: str) -> Tensor:
    """Read a tensor from the open file, or from the other file that has it."""
    if files[name] == here:
        return cast(Tensor, opened.get_tensor(name))
    with safe_open(files[name], "pt") as elsewhere:
        return cast(Tensor, elsewhere.get_tensor(name))


def rewrite(
    tensors: Iterable[tuple[Path, str, Tensor]],
    folder: Path,
    change: Callable[[str, Tensor], dict[str, Tensor]] = lambda name, tensor: {
        name: tensor
    },
) -> None:
    """
    Write tensors to files of the same names, one file at a time, and their index.

    :param tensors: what :func:`read` yields
    :param folder: where to write; not the folder of the files that they come from
    :param change: returns the tensors, by their names, that take the place of a tensor
    """
    weight_map: dict[str, str] = {}
    total = 0
    for file, group in groupby(tensors, key=itemgetter(0)):
        changed: dict[str, Tensor] = {}
        for _, name, tensor in group:
            changed |= change(name, tensor)
        total += sum(tensor.nbytes for tensor in changed.values())
        weight_map |= dict.fromkeys(changed, file.name)
        save_file(changed, folder / file.name, metadata={"format": "pt"})
    if set(weight_map.values()) != {SAFE_WEIGHTS_NAME}:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2))


@contextmanager
def as_value_error(message: str) -> Iterator[None]:
    """Turn any error that a malformed file causes in its reader into a ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{message}: {error}") from error
