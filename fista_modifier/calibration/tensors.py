"""Tensors that modules are given and return: which of them are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["first_tensor", "same_memory", "same_output"]

ROUNDING = 1e-4
"""
The relative difference up to which two outputs of a module in float32 count as the
same. Kernels differ by no more, because they add in different orders.
"""
ROUNDINGS = 4
"""
The same in 16 bits, in units of the dtype's precision. Attention rounds the scores, the
probabilities and the result, and kernels do so in different places. In layers of
SmolLM2-135M in bfloat16 they differ by 0.3 to 1.0 of this unit.
"""


def first_tensor(value: Any) -> Tensor:
    """
    Return the hidden states among what a layer was given or returned.

    :param value: a tensor, or a tuple with the hidden states first
    :return: the hidden states
    """
    return value if isinstance(value, Tensor) else value[0]


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors have the same entries in the same places of memory."""
    return one is other or (
        one.data_ptr() == other.data_ptr() != 0
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def same_output(one: Tensor, other: Tensor) -> bool:
    """
    Say whether two outputs of a module are the same up to rounding.

    :param one: an output of a module
    :param other: its output in another run
    :return: whether they have one shape and differ by no more than kernels do, in the
        dtype of ``other``
    """
    if one.shape != other.shape:
        return False
    tolerance = max(ROUNDING, ROUNDINGS * torch.finfo(other.dtype).eps)
    difference = one.float() - other.float()
    return bool(difference.norm() <= tolerance * other.float().norm())
