"""Sparsity patterns: which entries of a weight may be non-zero."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "NofM",
    "SparsityPattern",
    "Unstructured",
    "Within",
    "mask_structure_of",
    "parse_pattern",
    "pattern_of",
]


class SparsityPattern(Protocol):
    """What the solver and the modifier ask of a sparsity pattern."""

    @property
    def sparsity(self) -> float:
        """share of the entries that must be zero, in [0, 1)"""
        ...

    def check_columns(self, columns: int) -> None:
        """:raises ValueError: where a weight with so many columns cannot have it"""
        ...

    def support(self, scores: Tensor) -> Tensor:
        """
        :param scores: importance of each entry, m×n
        :return: bool m×n, True at the most important entries that the pattern keeps
        """
        ...

    def holds(self, weight: Tensor) -> bool:
        """:return: whether ``weight`` (m×n) has at least the zeros asked for"""
        ...


def project(weight: Tensor, pattern: SparsityPattern) -> Tensor:
    """
    The rounding operator H of Eq. (6): the nearest weight with the pattern, which
    keeps the largest magnitudes.

    :param weight: m×n
    :return: m×n, zero off the support
    """
    return weight * pattern.support(weight.abs())


@dataclass(frozen=True)
class Unstructured:
    """
    Any entry of the m×n weight may be zero; exactly round(s·m·n) of them are.

    :param sparsity: s in [0, 1)
    :raises ValueError: for a sparsity outside [0, 1)
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            per_cent = 1 < self.sparsity < 100
            raise ValueError(
                f"sparsity must be in [0, 1), the share of zeros, got {self.sparsity}"
                + (f"; write {self.sparsity / 100:g}" if per_cent else "")
            )

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g} %"

    def check_columns(self, columns: int) -> None:
        """Any width will do."""

    def support(self, scores: Tensor) -> Tensor:
        flat = scores.flatten()
        zeros = round(self.sparsity * flat.numel())
        if zeros == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        threshold = _smallest(flat, zeros)
        keep = flat > threshold
        missing = flat.numel() - zeros - keep.sum()
        # equal scores share the threshold: the first of them fill it up
        equal = flat == threshold
        keep |= equal & (equal.cumsum(0, dtype=torch.int32) <= missing)
        return keep.view_as(scores)

    def holds(self, weight: Tensor) -> bool:
        return int((weight == 0).sum()) >= round(self.sparsity * weight.numel())


def _smallest(values: Tensor, rank: int) -> Tensor:
    """The rank-th smallest of a vector; on the CPU ten times faster than kthvalue."""
    if values.device.type == "cpu" and values.dtype == torch.float32:
        partitioned = np.partition(values.numpy(), rank - 1)
        return torch.from_numpy(partitioned)[rank - 1]
    return values.kthvalue(rank).values


@dataclass(frozen=True)
class NofM:
    """
    At most n non-zeros in each group of m consecutive entries of a row (section 3.3).

    :param n: entries kept in a group
    :param m: size of a group
    :raises ValueError: unless 1 ≤ n ≤ m
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(
                f"mask_structure '{self}' keeps {self.n} of {self.m} entries, which is "
                "impossible; n:m needs 1 <= n <= m, for example '2:4'"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def check_columns(self, columns: int) -> None:
        if columns % self.m:
            raise ValueError(
                f"'{self}' needs an input width divisible by {self.m}, got {columns}; "
                "choose another pattern or put the operator on the ignore list"
            )

    def support(self, scores: Tensor) -> Tensor:
        # an entry stays if fewer than n of its group beat it; of equals, the first do:
        # a comparison of each pair is four times faster than topk on groups of four
        entries = scores.reshape(scores.shape[0], -1, self.m).unbind(-1)
        beaten = [torch.zeros_like(entry, dtype=torch.int16) for entry in entries]
        for second in range(self.m):
            for first in range(second):
                later_wins = entries[second] > entries[first]
                beaten[first] += later_wins
                beaten[second] += ~later_wins
        return torch.stack([times < self.n for times in beaten], -1).view_as(scores)

    def holds(self, weight: Tensor) -> bool:
        groups = weight.reshape(weight.shape[0], -1, self.m)
        return bool(((groups != 0).sum(-1) <= self.n).all())


@dataclass(frozen=True, eq=False)
class Within:
    """
    A pattern on the support of a weight that is sparse already: its zeros stay.

    :param pattern: sparsity asked for
    :param allowed: bool m×n, the entries that may be non-zero
    """

    pattern: SparsityPattern
    allowed: Tensor

    def __str__(self) -> str:
        return str(self.pattern)

    @property
    def sparsity(self) -> float:
        return self.pattern.sparsity

    def check_columns(self, columns: int) -> None:
        self.pattern.check_columns(columns)

    def support(self, scores: Tensor) -> Tensor:
        allowed = self.allowed.to(scores.device)
        chosen = self.pattern.support(torch.where(allowed, scores, -torch.inf))
        return chosen & allowed

    def holds(self, weight: Tensor) -> bool:
        outside = weight[~self.allowed.to(weight.device)]
        return self.pattern.holds(weight) and not bool(outside.any())


def pattern_of(text: str) -> SparsityPattern:
    """
    :param text: "n:m" (n kept of m), or a sparsity such as "0.5"
    :raises ValueError: if it is neither, or no pattern
    """
    if ":" in text:
        return parse_pattern(text, None)
    try:
        sparsity = float(text)
    except ValueError:
        raise ValueError(
            f"a pattern is n:m such as 2:4, or a sparsity such as 0.5; got '{text}'"
        ) from None
    return Unstructured(sparsity)


def mask_structure_of(number: int) -> str:
    """
    :param number: what YAML 1.1 makes of n:m without quotes, 60·n + m
    :return: "n:m", or "0:0"
    :raises ValueError: if it is that of no pattern
    """
    n, m = divmod(number, 60)
    if number == 0 or 1 <= n <= m:
        return f"{n}:{m}"
    raise ValueError(
        f"mask_structure is the number {number}: quote n:m, as in mask_structure: "
        '"2:4", because YAML takes it for a number of base 60'
    )


def parse_pattern(mask_structure: str, sparsity: float | None) -> SparsityPattern:
    """
    :param mask_structure: "n:m" (n kept of m), or "0:0" for unstructured
    :param sparsity: share of zeros in [0, 1); may be left out for n:m, which fixes it
    :raises ValueError: for a malformed or impossible n:m, a sparsity outside [0, 1),
        none at all, or one that contradicts n:m
    """
    match = re.fullmatch(r"(\d+):(\d+)", mask_structure)
    if match is None:
        raise ValueError(
            f"mask_structure must look like '2:4' or '0:0', got '{mask_structure}'"
        )
    n, m = int(match[1]), int(match[2])
    if (n, m) == (0, 0):
        if sparsity is None:
            raise ValueError(
                "sparsity is missing: unstructured pruning ('0:0') needs the share of "
                "zeros, for example sparsity: 0.5"
            )
        return Unstructured(sparsity)
    pattern = NofM(n, m)
    if sparsity is not None and abs(sparsity - pattern.sparsity) > 1e-6:
        hint = f"drop sparsity, or write {pattern.sparsity:g}"
        if abs(sparsity - n / m) <= 1e-6 and n < m:
            hint += (
                f"; '{m - n}:{m}' prunes {n} of {m} (llm-compressor's SparseGPT counts "
                "the pruned entries in n, this project the kept ones)"
            )
        raise ValueError(
            f"sparsity {sparsity} contradicts mask_structure '{pattern}', which keeps "
            f"{n} of every {m} entries: {hint}"
        )
    return pattern
