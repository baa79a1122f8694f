"""
Sparsity patterns: which entries of a weight may be non-zero.

A pattern owns its name: ``str(pattern)`` is what recipes, reports and model cards hold,
and :func:`pattern_of` reads it back. Whatever other modules need to know of a pattern
is a member of :class:`SparsityPattern`. None of them asks for its class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "NofM",
    "Reordered",
    "SparsityPattern",
    "Unstructured",
    "Within",
    "mask_structure_of",
    "meant_by_sparsegpt",
    "parse_pattern",
    "pattern_of",
    "project",
    "register",
    "reported_pattern",
]


class SparsityPattern(Protocol):
    """
    The interface of a sparsity pattern: what the solver, the modifier and the
    checkpoint ask of it.
    """

    def __str__(self) -> str:
        """
        Return the name, from which ``pattern_of`` makes an equal pattern.

        :return: the name
        """
        ...

    @property
    def sparsity(self) -> float:
        """The share of the entries that must be zero, in [0, 1)."""
        ...

    @property
    def group(self) -> tuple[int, int] | None:
        """
        (n, m) if the pattern is n:m, for kernels and file formats that know no other
        pattern. For any other pattern it is None, and they take it for an unstructured
        one.
        """
        ...

    @property
    def tag(self) -> str:
        """The tag of its kind for the hub: letters, digits and hyphens."""
        ...

    @property
    def description(self) -> str:
        """The meaning of its name for the model card: a clause without a full stop."""
        ...

    def check_columns(self, columns: int) -> None:
        """
        Refuse a width that the pattern does not fit.

        :param columns: number of columns of a weight
        :raises ValueError: if a weight with so many columns cannot have the pattern
        """
        ...

    def support(self, scores: Tensor) -> Tensor:
        """
        Choose the entries that the pattern keeps.

        :param scores: importance of each entry, m×n
        :return: bool m×n, True at the most important entries that the pattern keeps
        """
        ...

    def holds(self, weight: Tensor) -> bool:
        """
        Say whether a weight has at least the zeros asked for.

        :param weight: m×n
        :return: whether it has them
        """
        ...


class RegisteredPattern(SparsityPattern, Protocol):
    """A pattern that is known by its name."""

    @classmethod
    def parse(cls, text: str) -> SparsityPattern | None:
        """
        Read the name of a pattern.

        :param text: name of a pattern
        :return: the pattern; None if that is the name of no pattern of this class
        :raises ValueError: if it is such a name, but there can be no such pattern
        """
        ...


Registered = TypeVar("Registered", bound=RegisteredPattern)
_registered: dict[type[RegisteredPattern], str | None] = {}


def register(syntax: str | None) -> Callable[[type[Registered]], type[Registered]]:
    """
    Make the patterns of a class known by their names: in recipes, in reports, and
    wherever else a name is read.

    :param syntax: how such names are written, for messages: "a sparsity such as 0.5";
        None for patterns that reports name and no recipe can ask for
    :return: the decorator of the class
    """

    def add(pattern: type[Registered]) -> type[Registered]:
        _registered[pattern] = syntax
        return pattern

    return add


def pattern_of(text: str) -> SparsityPattern:
    """
    Return the pattern that a name means in a recipe.

    :param text: the name of a pattern: "n:m" (n kept of m), a sparsity such as "0.5" or
        "50 %", or what another registered class reads
    :return: the pattern
    :raises ValueError: if it is none of them, or there can be no such pattern
    """
    return _read(text, {one: how for one, how in _registered.items() if how})


def reported_pattern(text: str) -> SparsityPattern:
    """
    Return the pattern that a name means in a report.

    :param text: the name of a pattern in a report
    :return: the pattern, which may be one that nothing can be pruned to
    :raises ValueError: if it is the name of none
    """
    return _read(text, _registered)


def _read(
    text: str, known: Mapping[type[RegisteredPattern], str | None]
) -> SparsityPattern:
    for one in known:
        pattern = one.parse(text)
        if pattern is not None:
            return pattern
    written = ", or ".join(how for how in known.values() if how)
    raise ValueError(f"a pattern is {written}; got '{text}'")


def project(weight: Tensor, pattern: SparsityPattern) -> Tensor:
    """
    Round a weight to a pattern. This is the operator H of Eq. (6): it returns the
    nearest weight with the pattern, which keeps the largest magnitudes.

    :param weight: m×n
    :param pattern: the pattern
    :return: m×n, zero off the support
    """
    return weight * pattern.support(weight.abs())


@register("n:m such as '2:4'")
@dataclass(frozen=True)
class NofM:
    """
    The pattern n:m: at most n non-zeros in each group of m consecutive entries of a row
    (section 3.3).

    :param n: entries kept in a group
    :param m: size of a group
    :raises ValueError: unless 1 ≤ n ≤ m
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(
                f"'{self}' keeps {self.n} of {self.m} entries, which is impossible; "
                "n:m needs 1 <= n <= m, for example '2:4'"
            )

    @classmethod
    def parse(cls, text: str) -> SparsityPattern | None:
        match = re.fullmatch(r"(\d+):(\d+)", text)
        return None if match is None else cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def group(self) -> tuple[int, int]:
        return self.n, self.m

    @property
    def tag(self) -> str:
        return f"{self.n}of{self.m}"

    @property
    def description(self) -> str:
        return f"{self.n} of every {self.m} weights of a row are kept"

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
        # An entry stays if fewer than n of its group beat it. The first of equals wins.
        # A comparison of each pair is four times faster than topk on groups of four.
        entries = scores.reshape(scores.shape[0], -1, self.m).unbind(-1)
        beaten = [torch.zeros_like(entry, dtype=torch.int16) for entry in entries]
        for second in range(self.m):
            for first in range(second):
                later_wins = entries[second] > entries[first]
                beaten[first] += later_wins
                beaten[second] += ~later_wins
        return torch.stack([count < self.n for count in beaten], -1).view_as(scores)

    def holds(self, weight: Tensor) -> bool:
        groups = weight.reshape(weight.shape[0], -1, self.m)
        return bool(((groups != 0).sum(-1) <= self.n).all())


@register("a sparsity such as 0.5")
@dataclass(frozen=True)
class Unstructured:
    """
    The pattern without a structure: any entry of the m×n weight may be zero, and
    exactly round(s·m·n) of them are.

    :param sparsity: s in [0, 1)
    :raises ValueError: for a sparsity outside [0, 1)
    """

    sparsity: float

    group = None
    tag = "unstructured-sparsity"
    description = "that share of a matrix is zero, anywhere in it"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            per_cent = 1 < self.sparsity < 100
            raise ValueError(
                f"sparsity must be in [0, 1), the share of zeros, got {self.sparsity}"
                + (f"; write {self.sparsity / 100:g}" if per_cent else "")
            )

    @classmethod
    def parse(cls, text: str) -> SparsityPattern | None:
        number = text.removesuffix("%")
        try:
            value = Decimal(number.strip())
        except InvalidOperation:
            return None
        return cls(float(value if number == text else value.scaleb(-2)))

    def __str__(self) -> str:
        # The number is decimal, as 100 times a float is rounded: 0.07 would not come
        # back.
        per_cent = Decimal(repr(float(self.sparsity))).scaleb(2).normalize()
        return f"{per_cent:f} %"

    def check_columns(self, columns: int) -> None:
        """Do nothing, as any width will do."""

    def support(self, scores: Tensor) -> Tensor:
        flat = scores.flatten()
        zeros = round(self.sparsity * flat.numel())
        if zeros == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        threshold = _smallest(flat, zeros)
        keep = flat > threshold
        missing = flat.numel() - zeros - keep.sum()
        # Equal scores share the threshold. The first of them take the places left.
        equal = flat == threshold
        keep |= equal & (equal.cumsum(0, dtype=torch.int32) <= missing)
        return keep.view_as(scores)

    def holds(self, weight: Tensor) -> bool:
        return int((weight == 0).sum()) >= round(self.sparsity * weight.numel())


def _smallest(values: Tensor, rank: int) -> Tensor:
    """
    Return the rank-th smallest entry of a vector. On the CPU this is ten times faster
    than kthvalue, which has one thread block for a vector on a GPU.
    """
    if values.device.type == "cpu" and values.dtype == torch.float32:
        partitioned = np.partition(values.numpy(), rank - 1)
        return torch.from_numpy(partitioned)[rank - 1]
    return values.topk(rank, largest=False, sorted=False).values.amax()


@dataclass(frozen=True, eq=False)
class _OfOneWeight:
    """
    A pattern with what is particular to one weight. Its name and all else are those of
    the pattern asked for.

    :param pattern: the sparsity asked for
    """

    pattern: SparsityPattern

    def __str__(self) -> str:
        return str(self.pattern)

    @property
    def sparsity(self) -> float:
        return self.pattern.sparsity

    @property
    def group(self) -> tuple[int, int] | None:
        return self.pattern.group

    @property
    def tag(self) -> str:
        return self.pattern.tag

    @property
    def description(self) -> str:
        return self.pattern.description

    def check_columns(self, columns: int) -> None:
        self.pattern.check_columns(columns)


@dataclass(frozen=True, eq=False)
class Within(_OfOneWeight):
    """
    A pattern on the support of a weight that is sparse already: its zeros stay.

    :param allowed: bool m×n, the entries that may be non-zero
    """

    allowed: Tensor

    def support(self, scores: Tensor) -> Tensor:
        allowed = self.allowed.to(scores.device)
        chosen = self.pattern.support(torch.where(allowed, scores, -torch.inf))
        return chosen & allowed

    def holds(self, weight: Tensor) -> bool:
        outside = weight[~self.allowed.to(weight.device)]
        return self.pattern.holds(weight) and not bool(outside.any())


@dataclass(frozen=True, eq=False)
class Reordered(_OfOneWeight):
    """
    A pattern that a weight is to have once its columns are in another order.

    :param order: long n, a permutation: column j will be the one that is order[j] now
    """

    order: Tensor

    @property
    def group(self) -> None:
        """None, as no kernel knows the pattern before the columns are in that order."""

    def support(self, scores: Tensor) -> Tensor:
        order = self.order.to(scores.device)
        return self.pattern.support(scores[:, order])[:, order.argsort()]

    def holds(self, weight: Tensor) -> bool:
        return self.pattern.holds(weight[:, self.order.to(weight.device)])


def mask_structure_of(number: int) -> str:
    """
    Return the n:m that a number stands for.

    :param number: what YAML 1.1 makes of n:m without quotes, 60·n + m
    :return: "n:m", or "0:0"
    :raises ValueError: if it is the number of no pattern
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
    Return the pattern that the two fields of the toolkit's recipes describe.

    :param mask_structure: the name of a pattern, or "0:0" for unstructured
    :param sparsity: share of zeros in [0, 1); may be None where the name fixes it
    :return: the pattern
    :raises ValueError: if there is no such pattern, no sparsity at all, or one that
        contradicts the name
    """
    if mask_structure == "0:0":
        if sparsity is None:
            raise ValueError(
                "sparsity is missing: unstructured pruning ('0:0') needs the share of "
                "zeros, for example sparsity: 0.5"
            )
        return Unstructured(sparsity)
    try:
        pattern = pattern_of(mask_structure)
    except ValueError as error:
        raise ValueError(f"mask_structure: {error}") from None
    if sparsity is not None and abs(sparsity - pattern.sparsity) > 1e-6:
        raise ValueError(
            f"sparsity {sparsity} contradicts mask_structure '{pattern}', by "
            f"which {pattern.description}: {_hint(pattern, sparsity)}"
        )
    return pattern


def meant_by_sparsegpt(pattern: SparsityPattern) -> NofM | None:
    """
    Return the pattern that llm-compressor's SparseGPTModifier means by the name of this
    one. It counts the pruned entries in n.

    :param pattern: a pattern of a recipe
    :return: m-n:m for n:m; None if that is the same, is dense, or there is no n:m
    """
    n, m = pattern.group or (0, 0)
    return NofM(m - n, m) if n < m and 2 * n != m else None


def _hint(pattern: SparsityPattern, sparsity: float) -> str:
    """Say what to write in place of a sparsity that the pattern does not have."""
    hint = f"drop sparsity, or write {pattern.sparsity:g}"
    other = meant_by_sparsegpt(pattern)
    if other is not None:
        n, m = other.m - other.n, other.m
        hint += (
            f"; '{other}' prunes {n} of {m} (llm-compressor's SparseGPT counts "
            "the pruned entries in n, this project the kept ones)"
        )
    return hint
