"""Sparse weights without their zeros: compressed-tensors' two bitmask formats."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fista_modifier.solver import NofM

__all__ = [
    "LOAD_FORMAT",
    "PackedFormat",
    "is_complete",
    "pack",
    "parts_of",
    "stored_twice",
    "unpack",
]

PackedFormat = Literal["sparse-bitmask", "sparse-24-bitmask"]
LOAD_FORMAT = "sparse-bitmask"
"""
The name that ``vllm serve --load-format`` takes for both packed formats, where this
package is installed beside vLLM.
"""
PARTS = ("compressed", "bitmask", "shape", "row_offsets")
TWO_OF_FOUR = NofM(2, 4)


def _check_packable(weight: Tensor, packed_format: str) -> None:
    """
    Refuse a format or a weight that cannot be packed.

    :raises ValueError: if there is no such format, or the weight cannot have it
    """
    if packed_format not in get_args(PackedFormat):
        known = ", ".join(get_args(PackedFormat))
        raise ValueError(f"format '{packed_format}' is none of {known}")
    if weight.ndim != 2:
        raise ValueError(f"only a matrix can be packed, not {tuple(weight.shape)}")
    if packed_format == "sparse-24-bitmask":
        TWO_OF_FOUR.check_columns(weight.shape[1])
        if not TWO_OF_FOUR.holds(weight):
            raise ValueError("sparse-24-bitmask is for 2:4; use sparse-bitmask")


def pack(weight: Tensor, packed_format: PackedFormat) -> dict[str, Tensor]:
    """
    Pack a weight without its zeros. The layouts are those of compressed-tensors up to
    0.14, which has since dropped them. They have the kept values in the order of the
    rows, and a bit for each entry, the lowest first. Each row of bits is filled up to
    whole bytes. The 2:4 format keeps two values of every four, even if one is zero, so
    that ``compressed`` is a matrix. The other format also has the index of each row's
    first value.

    :param weight: m×n
    :param packed_format: which of the two formats
    :return: the tensors that stand for the weight, by the last part of their names
    :raises ValueError: if the weight cannot have the format
    """
    _check_packable(weight, packed_format)
    rows, columns = weight.shape
    if packed_format == "sparse-24-bitmask":
        kept = TWO_OF_FOUR.support(weight.abs())
        return {
            "compressed": weight[kept].view(rows, columns // 2),
            "bitmask": _bits(kept),
            "shape": torch.tensor([[rows], [columns]]),
        }
    kept = weight != 0
    counts = kept.sum(1)
    return {
        "compressed": weight[kept],
        "bitmask": _bits(kept),
        "shape": torch.tensor([rows, columns]),
        "row_offsets": counts.cumsum(0) - counts,
    }


def unpack(parts: dict[str, Tensor]) -> Tensor:
    """
    Restore a weight that :func:`pack` has packed.

    :param parts: what :func:`pack` returns, of either format
    :return: the weight, m×n
    :raises ValueError: if the parts do not belong together
    """
    missing = {"compressed", "bitmask", "shape"} - parts.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} is missing")
    size, bitmask, values = parts["shape"], parts["bitmask"], parts["compressed"]
    if size.numel() != 2 or size.is_floating_point() or bool((size < 0).any()):
        raise ValueError("shape is not that of a matrix")
    rows, columns = size.flatten().tolist()
    if bitmask.dtype != torch.uint8 or bitmask.shape != (rows, -(-columns // 8)):
        raise ValueError(
            f"bitmask is {bitmask.dtype} {tuple(bitmask.shape)}, which is not that of "
            f"a {rows}×{columns} matrix"
        )
    bits = np.unpackbits(bitmask.cpu().numpy(), axis=1, bitorder="little")
    kept = torch.from_numpy(bits[:, :columns].astype(bool))
    if int(kept.sum()) != values.numel() or bits[:, columns:].any():
        raise ValueError(
            f"bitmask marks {int(bits.sum())} entries, and there are {values.numel()}"
        )
    weight = torch.zeros(rows, columns, dtype=values.dtype)
    weight[kept] = values.flatten().cpu()
    return weight


def parts_of(name: str) -> tuple[str, str] | None:
    """
    Split the name of a part of a packed weight.

    :param name: the name of a tensor in a checkpoint
    :return: the operator's name and the part's; None if the tensor is no such part
    """
    operator, _, part = name.rpartition(".")
    return (operator, part) if operator and part in PARTS else None


def stored_twice(names: Collection[str]) -> list[str]:
    """
    Find weights that a checkpoint stores both packed and dense.

    :param names: the names of the checkpoint's tensors
    :return: a complaint for each such weight
    """
    packed = {found[0] for name in names if (found := parts_of(name))}
    return [
        f"{operator}.weight is stored both packed and dense"
        for operator in sorted(packed)
        if f"{operator}.weight" in names
    ]


def is_complete(parts: dict[str, Tensor]) -> bool:
    """
    Say whether all parts of a packed weight are there.

    :param parts: parts of one packed weight
    :return: whether these are all parts that its format has
    """
    if not {"compressed", "bitmask", "shape"} <= parts.keys():
        return False
    return "row_offsets" in parts or parts["compressed"].ndim == 2


def _bits(kept: Tensor) -> Tensor:
    packed = np.packbits(kept.cpu().numpy(), axis=1, bitorder="little")
    return torch.from_numpy(packed)
