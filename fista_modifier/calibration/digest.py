"""Digests of tensors, by which one run knows the data and the model of another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["TensorDigest", "batch_digest"]


class TensorDigest:
    """A running SHA-256 of tensors: of their dtypes, shapes and bits, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, tensor: Tensor) -> None:
        """
        Add a tensor to the digest.

        :param tensor: a tensor of any dtype, on any device
        """
        tensor = tensor.detach().cpu().contiguous()
        self._hash.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        self._hash.update(tensor.flatten().view(torch.uint8).numpy())

    def hex(self) -> str:
        """
        Return the digest of all tensors so far.

        :return: hexadecimal digits
        """
        return self._hash.hexdigest()


def batch_digest(batch: Mapping[str, Any]) -> str:
    """
    Return the digest of all tensors of a batch: of its tokens, masks, images and
    sounds.

    :param batch: arguments of the model by their names
    :return: hexadecimal digits
    """
    digest = TensorDigest()
    for name in sorted(batch):
        for leaf in tree_leaves(batch[name]):
            if isinstance(leaf, Tensor):
                digest.update(leaf)
    return digest.hex()
