"""The files of a checkpoint that say how images and sounds become inputs."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.utils import (
    CHAT_TEMPLATE_FILE,
    IMAGE_PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    cached_file,
)

__all__ = ["copy_processors"]

FILES = (
    IMAGE_PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
)
"""The first is also that of what extracts features from sounds."""


def copy_processors(model: str, folder: Path) -> None:
    """
    Copy what a model's processors are made from. Pruning changes nothing of it, and
    without it the new checkpoint would take text alone.

    :param model: folder of the checkpoint that the model was loaded from, or its id on
        the hub; empty if it was not loaded
    :param folder: the new checkpoint; a file that it has already stays
    """
    has_template = (folder / CHAT_TEMPLATE_FILE).exists()
    for name in FILES:
        if name == LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE and has_template:
            continue  # transformers refuses to have both
        try:
            found = cached_file(
                model, name, _raise_exceptions_for_missing_entries=False
            )
        except (OSError, ValueError):  # neither a folder nor an id of the hub
            return
        if found is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)
