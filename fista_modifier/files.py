"""Files and folders that are written as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole", "write_whole"]


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """
    Write a file or a folder completely or not at all, even if the process is killed.
    The new content is written beside the target and takes its place in the end. A file
    does so only once the disk has it.

    :param target: replaced if it exists; its folder is made. A link stays, and what it
        leads to is replaced
    :return: the path to write to; nothing exists there yet
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}-", dir=target.parent, ignore_cleanup_errors=True
    ) as temporary:
        unfinished = Path(temporary) / target.name
        yield unfinished
        if unfinished.is_file():
            with unfinished.open("rb+") as written:
                os.fsync(written.fileno())
        elif target.exists():
            # deleting a folder takes long, and a kill would leave half of it
            before = unfinished.with_name(f"{target.name}-before")
            os.replace(target, before)
            try:
                os.replace(unfinished, target)
            except OSError:
                os.replace(before, target)
                raise
            return
        os.replace(unfinished, target)


def write_whole(file: Path, text: str) -> None:
    """
    Write a text file completely or not at all, by :func:`whole`.

    :param file: replaced if it exists
    :param text: the new content
    """
    with whole(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
