"""The folder with the state of a training, from which an interrupted one goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fista_modifier.pruning.runs import (
    RUN_FILE,
    Fingerprint,
    begin_run,
    check_run,
)

__all__ = ["begin", "check", "forget", "last_state"]

CONTENTS = "the training"


def begin(folder: Path, run: Fingerprint) -> None:
    """
    Note in a folder which run it belongs to, or refuse the folder of another run.

    :param folder: created if it is missing
    :param run: what the result depends on, in sections
    :raises ValueError: as :func:`check`
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_own(folder)
    begin_run(folder, run, CONTENTS)


def check(folder: Path, run: Fingerprint) -> None:
    """
    Refuse the folder of another run.

    :param folder: a folder, or a name that is free
    :param run: what the result depends on, in sections; some may be missing
    :raises ValueError: if the folder belongs to another run; the message names what
        differs; or if it holds states of some other training
    """
    _check_own(folder)
    check_run(folder, run, CONTENTS)


def _check_own(folder: Path) -> None:
    """
    Refuse a folder with states of some other training, which has no fingerprint.

    :raises ValueError: if there are such states
    """
    foreign = next(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), None)
    if foreign is not None and not (folder / RUN_FILE).exists():
        raise ValueError(
            f"{folder} holds {foreign.name} of some other training, which would be "
            "deleted in the end: name another folder"
        )


def last_state(folder: Path) -> Path | None:
    """
    Find the last state of a training.

    :param folder: folder of the training
    :return: the last of its states that is there as a whole; None if there is none
    """
    steps: dict[int, Path] = {}
    for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:  # this file is written last, so that the state is whole if it is there
            found = TrainerState.load_from_json(str(state / TRAINER_STATE_NAME))
        except (OSError, ValueError, TypeError):
            continue
        steps[found.global_step] = state
    return steps[max(steps)] if steps else None


def forget(folder: Path) -> None:
    """
    Delete what a finished training left.

    :param folder: folder of the training; what others have put there stays
    """
    for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(state)
    (folder / RUN_FILE).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
