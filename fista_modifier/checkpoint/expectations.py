"""The zeros that the operators of a checkpoint must have, and the check of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.models.operators import Operator
from fista_modifier.models.targets import IGNORE, TARGETS, find_operators
from fista_modifier.pruning.results import REPORT_NAME, PruningReport
from fista_modifier.solver import SparsityPattern
from fista_modifier.solver.patterns import reported_pattern

__all__ = ["Expectation", "OperatorCheck", "ZeroRows", "expectations"]


@dataclass(frozen=True)
class OperatorCheck:
    """
    The outcome of the check of one operator.

    :param name: the operator's name
    :param pattern: what its weight must have
    :param zeros: zero entries that were found
    :param entries: entries in all
    :param problem: what is wrong with it, or None
    """

    name: str
    pattern: str
    zeros: int
    entries: int
    problem: str | None = None


@dataclass(frozen=True)
class Expectation:
    """
    What an operator must have.

    :param pattern: its pattern
    :param zeros: its number of zeros; None where that is not known
    :param exact: False if there may be more, as rounding to a grid adds some
    """

    pattern: SparsityPattern
    zeros: int | None = None
    exact: bool = True

    def check(self, model: PreTrainedModel, name: str, tensor: Tensor) -> OperatorCheck:
        """
        Check an operator.

        :param model: its model, which may be without weights
        :param name: its name
        :param tensor: its weight, as the module has it
        :return: what was found
        """
        weight = _oriented(model, name, tensor)
        zeros = int((weight == 0).sum())
        problem = self._problem(weight, zeros)
        return OperatorCheck(name, str(self.pattern), zeros, weight.numel(), problem)

    def _problem(self, weight: Tensor, zeros: int) -> str | None:
        if weight.ndim != 2:
            return f"is no matrix: its shape is {tuple(weight.shape)}"
        try:
            self.pattern.check_columns(weight.shape[1])
        except ValueError as error:
            return str(error)
        if not self.pattern.holds(weight):
            return f"is not {self.pattern}"
        if self.zeros is not None and (
            zeros < self.zeros or (self.exact and zeros > self.zeros)
        ):
            return f"has {zeros} zeros; the report counts {self.zeros}"
        return None


def expectations(
    folder: Path, model: PreTrainedModel, pattern: SparsityPattern | None, exact: bool
) -> tuple[dict[str, Expectation], ZeroRows]:
    """
    Find out what the operators of a checkpoint must have.

    :param folder: the checkpoint
    :param model: its model, which may be without weights
    :param pattern: the pattern that every linear operator but the output embedding must
        have; None for what the report has
    :param exact: whether the report's numbers of zeros are exact
    :return: what each pruned operator must have, by the operators' names; and the check
        of output channels that are zeros in place, of which only a report tells
    :raises FileNotFoundError: if there is neither a pattern nor a report
    """
    if pattern is not None:
        expected = {
            operator.name: Expectation(pattern)
            for operator in find_operators(model, TARGETS, IGNORE)
        }
        return expected, ZeroRows({}, expected)
    if not (folder / REPORT_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} has no {REPORT_NAME}; name the pattern: --pattern 2:4"
        )
    report = PruningReport.load(folder)
    expected = {
        operator.name: Expectation(
            reported_pattern(operator.pattern), operator.zeros, exact
        )
        for operator in report.operators
    }
    return expected, ZeroRows(report.zero_rows, expected)


class ZeroRows:
    """
    The check of output channels that are zeros in place, in weights and biases.

    :param expected: the number of such channels, by the operators' names
    :param pruned: names of operators that also have a pattern, which may add some
    """

    def __init__(self, expected: Mapping[str, int], pruned: Collection[str]) -> None:
        self._expected = expected
        self._pruned = pruned
        self._weights: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor] = {}

    def see(self, model: PreTrainedModel, name: str, tensor: Tensor) -> None:
        """
        Note which rows of a parameter are zero, if its operator is to be checked.

        :param model: the model, which may be without weights
        :param name: the parameter's name
        :param tensor: its values
        """
        operator, _, kind = name.rpartition(".")
        if operator not in self._expected:
            return
        if kind == "bias":
            self._biases[operator] = tensor == 0
        elif tensor.ndim == 2:
            oriented = _oriented(model, operator, tensor)
            self._weights[operator] = (oriented == 0).all(1)

    def problems(self) -> list[str]:
        """
        Describe what is wrong with the operators, also with those not seen.

        :return: a sentence for each of these operators
        """
        return [
            problem
            for name, count in self._expected.items()
            if (problem := self._problem(name, count))
        ]

    def _problem(self, name: str, count: int) -> str | None:
        rows = self._weights.get(name)
        if rows is None:
            return f"{name}.weight is missing"
        found = int(rows.sum())
        if found < count or (found > count and name not in self._pruned):
            return f"{name} has {found} rows of zeros; the report counts {count}"
        bias = self._biases.get(name)
        if bias is not None and int((rows & bias).sum()) < count:
            return f"{name} has biases in rows of zeros"
        return None


def _oriented(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """Return the weight of an operator out×in."""
    module: Any = model.get_submodule(name)
    return Operator(name, module).oriented(tensor)
