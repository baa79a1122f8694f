"""The places where activations wait between the passes: main memory, or files."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from llmcompressor.pipelines.cache import IntermediatesCache, OverrideEqMode
from torch import Tensor

__all__ = ["MAIN_MEMORY", "ActivationStorage"]

SMALLEST = 16 * mmap.PAGESIZE
"""
The least size in bytes of a tensor that goes to disk. A smaller one stays in main
memory, because each mapping costs something itself.
"""


@dataclass(frozen=True)
class ActivationStorage:
    """
    A place off the device where tensors wait: main memory, or files.

    A tensor in a file is mapped into memory. It is read from there when it is used, and
    the system takes its memory back when it needs it. A file loses its name as soon as
    it is mapped. So its space is free again when its tensor is forgotten, or the
    process dies.

    :param folder: the folder of the files; None for main memory
    """

    folder: Path | None = None

    def keep(self, tensor: Tensor) -> Tensor:
        """
        Copy a tensor off the device: to a file if there is a folder and the tensor is
        not small, otherwise to main memory.

        :param tensor: a tensor on any device
        :return: the same values on the CPU; always one object for one tensor, in the
            toolkit's caches too
        :raises OSError: if the file cannot be written, as on a full disk; the message
            names the folder
        """
        folder = self.folder if tensor.nbytes >= SMALLEST else None
        if tensor.device.type == "cpu" and (folder is None or _is_mapped(tensor)):
            return tensor
        known = IntermediatesCache.offload_values
        with OverrideEqMode():
            if tensor not in known:
                known[tensor] = _mapped(tensor, folder) if folder else tensor.to("cpu")
            kept: Tensor = known[tensor]
        return kept


MAIN_MEMORY = ActivationStorage()


def _is_mapped(tensor: Tensor) -> bool:
    return tensor.untyped_storage().filename is not None


def _mapped(tensor: Tensor, folder: Path) -> Tensor:
    values = tensor.detach().to("cpu").contiguous()
    try:
        with NamedTemporaryFile(dir=folder) as file:
            file.write(values.view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(
                file.name, shared=True, size=values.numel(), dtype=values.dtype
            )
    except OSError as error:
        raise OSError(
            f"could not keep activations in {folder}: {error}; free space there, or "
            "name another activations_dir"
        ) from error
    return mapped.view(values.shape)
