"""Work in blocks, where not all fits on a device at once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "COMPUTED",
    "ENTRIES",
    "add_gram",
    "add_product",
    "row_blocks",
    "product",
]

BLOCK = 8192
"""The most columns of a matrix that are on the device of a product at once."""
ENTRIES = 2**25
"""
The most entries of a weight that an iteration works on at once. In float32 they take
134 MB.
"""
SIDE = 4
"""The number of blocks in each row of blocks of a symmetric sum."""
COMPUTED = (SIDE + 1) / (2 * SIDE)
"""
The share of a symmetric sum that is computed. It is that of the blocks on and above the
diagonal.
"""


def row_blocks(weight: Tensor) -> list[slice]:
    """
    Split the rows of a weight into blocks. The rows are independent problems, so what
    an iteration needs beside its result does not have to grow with the weight.

    :param weight: m×n
    :return: slices of the rows, with at most :data:`ENTRIES` entries (or one row) each
    """
    rows, columns = weight.shape
    height = max(ENTRIES // columns, 1)
    return [slice(start, start + height) for start in range(0, rows, height)]


def product(left: Tensor, matrix: Tensor) -> Tensor:
    """
    Multiply two matrices that may lie on different devices.

    :param left: A, m×n
    :param matrix: B, n×k; if it lies on another device, block after block of its
        columns comes to the device of A
    :return: A B, m×k, where A is
    """
    if matrix.shape[1] <= BLOCK:
        return left @ matrix.to(left.device)
    product = left.new_empty(left.shape[0], matrix.shape[1])
    blocks = zip(
        torch.split(product, BLOCK, 1), torch.split(matrix, BLOCK, 1), strict=True
    )
    for result, block in blocks:
        result.copy_(left @ block.to(left.device))
    return product


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """
    Add AᵀB to a sum, for A of tokens×m and B of tokens×n.

    :param total: the sum, m×n, updated in place; it may lie on another device
    :param left: A
    :param right: B
    """
    if total.device == left.device:
        total.addmm_(left.T, right)
        return
    blocks = zip(torch.split(total, BLOCK), torch.split(left, BLOCK, 1), strict=True)
    for sums, block in blocks:
        sums += (block.T @ right).to(total.device)


def add_gram(gram: Tensor, tokens: Tensor) -> None:
    """
    Add the Gram matrix of tokens to a symmetric sum. Only blocks on and above the
    diagonal are computed (:data:`COMPUTED` of the work). The others are their copies.

    :param gram: the sum, float32 n×n, updated in place; it may lie on another device
    :param tokens: Xᵀ, float32 tokens×n
    """
    features = gram.shape[0]
    width = -(-features // SIDE)
    for start in range(0, features, width):
        end = min(start + width, features)
        add_product(gram[start:end, start:], tokens[:, start:end], tokens[:, start:])
        gram[end:, start:end] = gram[start:end, end:].T
