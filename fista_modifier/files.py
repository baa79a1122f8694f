"""Files and folders that are written as a whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["scratch", "whole", "write_whole"]

LOCK = ".in-use"
"""The file in a scratch folder that is locked as long as its process lives."""
BEFORE = ".before"
"""
The name of what a new folder replaces, until it is deleted. A process that was killed
as one took the place of the other has left both, and both are whole.
"""
TO_SYNC = "rb+" if os.name == "nt" else "rb"
"""The mode in which a file is opened to be put on the disk. It may be read-only."""
NEW = 60
"""The seconds in which a scratch folder may not be locked yet."""


@contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """
    Make an empty folder inside another one, and delete it in the end. Those that killed
    processes have left there are deleted first, as they may be as large as a model.

    :param parent: the folder around it, which exists
    :param prefix: what its name begins with
    :return: the new folder
    """
    for left in parent.glob(f"{glob.escape(prefix)}*"):
        _delete_if_left(left)
    with tempfile.TemporaryDirectory(
        prefix=prefix, dir=parent, ignore_cleanup_errors=True
    ) as folder:
        with _in_use(Path(folder)):
            yield Path(folder)


@contextmanager
def _in_use(folder: Path) -> Iterator[None]:
    """
    Lock a scratch folder, and empty it in the end. Where a file system has no locks,
    the file is not there, and the folder will not be taken for one that was left.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except (OSError, NotImplementedError):
        (folder / LOCK).unlink(missing_ok=True)
    try:
        yield
    finally:
        _empty(folder)
        lock.release()


def _delete_if_left(folder: Path) -> None:
    """
    Delete a scratch folder that no process uses any more, unless it holds both what was
    to be replaced and what was to replace it.
    """
    lock = folder / LOCK
    with suppress(OSError, Timeout):  # another process may delete it at this moment
        is_new = time.time() - lock.stat().st_mtime < NEW
        inside = {one.name for one in folder.iterdir()} - {LOCK}
        if is_new or (BEFORE in inside and len(inside) > 1):
            return
        with FileLock(lock, blocking=False):
            _empty(folder)
        shutil.rmtree(folder)


def _empty(folder: Path) -> None:
    """Delete what is in a scratch folder, but its lock, as this may be interrupted."""
    for one in folder.iterdir():
        if one.is_dir() and not one.is_symlink():
            shutil.rmtree(one, ignore_errors=True)
        elif one.name != LOCK:
            one.unlink(missing_ok=True)


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """
    Write a file or a folder completely or not at all, even if the process is killed.
    The new content is written beside the target and takes its place in the end, once
    the disk has it.

    :param target: replaced if it exists; its folder is made. A link stays, and what it
        leads to is replaced
    :return: the path to write to; nothing exists there yet
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch(target.parent, f".{target.name}-") as temporary:
        unfinished = temporary / target.name
        yield unfinished
        for file in (unfinished, *unfinished.rglob("*")):
            if file.is_file():
                with file.open(TO_SYNC) as written:
                    os.fsync(written.fileno())
        if unfinished.is_dir() and target.exists():
            # deleting a folder takes long, and a kill would leave half of it
            before = unfinished.with_name(BEFORE)
            try:
                os.replace(target, before)
                os.replace(unfinished, target)
            except BaseException:
                if before.exists() and not target.exists():
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
