"""Which run a folder of unfinished work belongs to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization.utils import is_module_quantized
from torch import Tensor
from transformers import PretrainedConfig

from fista_modifier.calibration.digest import TensorDigest
from fista_modifier.files import write_whole
from fista_modifier.host import package_versions
from fista_modifier.pruning.results import PACKAGES

__all__ = [
    "RUN_FILE",
    "Fingerprint",
    "begin_run",
    "check_run",
    "fingerprint",
]

RUN_FILE = "run.json"
UNIMPORTANT = {
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "transformers_version",
    "use_cache",
}
"""The names in a configuration on which no output depends."""
SHOWN = 3
"""The most differences that a message names."""

Fingerprint = dict[str, dict[str, Any]]
"""What the result of a run depends on: plain JSON values, in sections."""


def fingerprint(model: torch.nn.Module, recipe: dict[str, Any]) -> Fingerprint:
    """
    Describe what the result of a run depends on, apart from the calibration data.

    :param model: the dense model; every parameter is read once
    :param recipe: fields of the modifier
    :return: plain JSON values in sections: "recipe", "versions", "config" and "model",
        the last with a digest of each parameter and of each buffer that is saved.
        Scales of a later quantisation, which are allocated and not filled yet, are left
        out
    """
    with disable_onloading():  # torch keeps all that it has named
        parameters = [name for name, _ in model.named_parameters()]
        buffers = [name for name, _ in model.named_buffers() if _is_saved(model, name)]
    names = [name for name in parameters + buffers if _is_own(model, name)]
    return {
        "recipe": recipe,
        "versions": package_versions(*PACKAGES),
        "config": _config(model),
        "model": {name: _digest(attrgetter(name)(model)) for name in names},
    }


def _config(model: torch.nn.Module) -> dict[str, Any]:
    """Return what a model's configuration says of what the model computes."""

    def plain(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: plain(value) if isinstance(value, dict) else value
            for name, value in values.items()
            if name not in UNIMPORTANT
        }

    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return {}
    return plain(json.loads(config.to_json_string(use_diff=False)))


def _is_saved(model: torch.nn.Module, name: str) -> bool:
    """Say whether a buffer is saved, as one is that nothing else tells."""
    module, _, own = name.rpartition(".")
    return own not in model.get_submodule(module)._non_persistent_buffers_set


def _is_own(model: torch.nn.Module, name: str) -> bool:
    """Say whether a parameter is the model's, and not one of its quantisation."""
    module, _, own = name.rpartition(".")
    quantised = is_module_quantized(model.get_submodule(module))
    return not quantised or own in ("weight", "bias")


def _digest(tensor: Tensor) -> str:
    digest = TensorDigest()
    digest.update(tensor)
    return digest.hex()[:16]


def begin_run(folder: Path, run: Fingerprint, contents: str) -> None:
    """
    Note in a folder which run it belongs to, or refuse the folder of another run.

    :param folder: a folder
    :param run: fingerprint of this run
    :param contents: what the folder holds, for the message
    :raises ValueError: as :func:`check_run`
    :raises OSError: if nothing can be written there
    """
    file = folder / RUN_FILE
    if not file.exists():
        write_whole(file, json.dumps(run, indent=2))
    check_run(folder, run, contents)


def check_run(folder: Path, run: Fingerprint, contents: str) -> None:
    """
    Refuse the folder of another run. One that belongs to none yet is accepted.

    :param folder: a folder
    :param run: fingerprint of this run; sections that it does not have yet are not
        compared
    :param contents: what the folder holds, for the message
    :raises ValueError: if the folder belongs to another run, naming what differs, or
        its file is damaged
    """
    file = folder / RUN_FILE
    if not file.exists():
        return
    try:
        stored: Fingerprint = dict(json.loads(file.read_text(encoding="utf-8")))
        changes = [
            difference
            for section, now in json.loads(json.dumps(run)).items()
            for difference in _differences(section, stored.get(section, {}), now)
        ]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}): delete {folder} or name another folder"
        ) from error
    if changes:
        more = len(changes) - SHOWN
        shown = [*changes[:SHOWN], *([f"{more} more"] if more > 0 else [])]
        raise ValueError(
            f"{folder} holds {contents} of another run: {'; '.join(shown)}. Name "
            "another folder, or delete this one to start anew"
        )


def _differences(
    section: str, stored: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[str]:
    """
    Yield a phrase for each value of a fingerprint's section that is another than
    before.

    :param section: name of the section
    :param stored: values of the section in the run before
    :param now: values of the section in this run
    :return: the phrases
    """
    for name in [*now, *(name for name in stored if name not in now)]:
        if stored.get(name) != now.get(name):
            yield f"{section}: {name} was {stored.get(name)} and is {now.get(name)}"
