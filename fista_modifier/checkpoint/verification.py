"""The check that a checkpoint on disk is whole and as sparse as it should be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fista_modifier.checkpoint.described import (
    described_config,
    is_quantised,
    load_dense,
    skeleton,
)
from fista_modifier.checkpoint.expectations import (
    Expectation,
    OperatorCheck,
    ZeroRows,
    expectations,
)
from fista_modifier.checkpoint.names import disagreements, names_in_memory, unmatched
from fista_modifier.checkpoint.packing import parts_of, stored_twice
from fista_modifier.checkpoint.shards import locate, read
from fista_modifier.solver import SparsityPattern

__all__ = ["OperatorCheck", "Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """
    The outcome of the check of a checkpoint.

    :param operators: the outcomes for the operators that must be sparse
    :param problems: what is wrong with the checkpoint as a whole
    """

    operators: list[OperatorCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems and not self.failures

    @property
    def failures(self) -> list[OperatorCheck]:
        """The operators with a problem."""
        return [check for check in self.operators if check.problem]


def verify(folder: Path, pattern: SparsityPattern | None = None) -> Verification:
    """
    Check a checkpoint tensor by tensor. Memory for the largest tensor is enough.
    The check passes if shards and their index agree, names and shapes are those of the
    model that config.json describes, no value is NaN or infinite, tied weights are
    equal, and the pruned operators have their zeros. Only safetensors files are read,
    never a pickle. Tensors in the files may have other names than in memory, as
    transformers defines them. A weight that several operators share may be stored once
    for all of them.

    A quantised checkpoint is loaded as a whole, in dense form, by transformers and
    compressed-tensors. It may have more zeros than pruning chose, but not fewer. A
    checkpoint is also loaded as a whole if transformers joins or splits its tensors,
    such as Mixtral's experts.

    :param folder: the checkpoint
    :param pattern: the pattern that every linear operator but the output embedding must
        have; None for the pattern that ``pruning_report.json`` has for each
    :return: what was found
    :raises FileNotFoundError: if there is no such folder, no config.json in it, or
        neither a pattern nor a report
    :raises ValueError: if config.json or the report cannot be read
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no config.json")
    try:
        files, problems = locate(folder)
    except (OSError, ValueError) as error:
        return Verification(problems=[str(error)])
    config = described_config(folder, len(files))
    if is_quantised(config):
        return _verify_loaded(folder, files, pattern, problems, config)
    model = skeleton(folder, config, len(files))
    expected = expectations(folder, model, pattern, exact=True)
    names = names_in_memory(model, {_dense_name(name) for name in files})
    if names is None or get_non_linearized_moes(model):
        size = sum(file.stat().st_size for file in set(files.values()))
        if model.num_parameters() > size:  # do not load what is not there
            problems.append(f"the files have {size} bytes, too few for config.json")
            return Verification(problems=problems)
        return _verify_loaded(folder, files, pattern, problems, config)
    present = set(names.values())
    problems += stored_twice(files)
    problems += disagreements(model, *unmatched(_parameters(model), present))
    inspection = _Inspection(model, *expected)
    for _, stored, tensor in read(files, problems):
        inspection.see(names[stored], tensor)
    return inspection.result(problems)


def _verify_loaded(
    folder: Path,
    files: Mapping[str, Path],
    pattern: SparsityPattern | None,
    problems: list[str],
    config: PretrainedConfig,
) -> Verification:
    """Check a checkpoint that transformers loads as a whole."""
    exact = not is_quantised(config)
    try:
        model, missing, unknown = load_dense(folder, files, config)
    except (OSError, ValueError) as error:
        return Verification(problems=[*problems, str(error)])
    inspection = _Inspection(model, *expectations(folder, model, pattern, exact))
    for name, parameter in model.named_parameters():
        inspection.see(name, parameter)
    return inspection.result([*problems, *disagreements(model, missing, unknown)])


class _Inspection:
    """
    The check of a model's tensors, one after the other.

    :param model: the model, which may be without weights
    :param expected: what each pruned operator must have
    :param zero_rows: the check of output channels that are zeros in place
    """

    def __init__(
        self,
        model: PreTrainedModel,
        expected: Mapping[str, Expectation],
        zero_rows: ZeroRows,
    ) -> None:
        self._model = model
        self._expected = expected
        self._zero_rows = zero_rows
        self._parameters = _parameters(model)
        self._names: defaultdict[int, list[str]] = defaultdict(list)
        for name, parameter in self._parameters.items():
            self._names[id(parameter)].append(name)
        self._first: dict[int, tuple[str, Tensor]] = {}
        self._checks: dict[str, OperatorCheck] = {}
        self._problems: list[str] = []

    def see(self, name: str, tensor: Tensor) -> None:
        """
        Check a tensor. If it has several names in the model, it stands for all of them.

        :param name: one of its names in the model; a tensor that is no part of the
            model is left out
        :param tensor: its values
        """
        if name not in self._parameters:
            return
        described = self._parameters[name]
        self._problems += _faults(name, tensor, described)
        self._zero_rows.see(self._model, name, tensor)
        shared = self._names[id(described)]
        if len(shared) > 1:
            other, value = self._first.setdefault(id(described), (name, tensor))
            if value.dtype != tensor.dtype or not torch.equal(value, tensor):
                self._problems.append(f"{name} and {other} are tied, and differ")
        for weight in shared:
            operator = weight.removesuffix(".weight")
            if operator != weight and operator in self._expected:
                # what is stored under its own name goes before what stands for it
                if weight == name or operator not in self._checks:
                    expected = self._expected[operator]
                    self._checks[operator] = expected.check(
                        self._model, operator, tensor
                    )

    def result(self, problems: list[str]) -> Verification:
        """
        Return what was found, when all tensors have been seen.

        :param problems: what is wrong beside
        :return: all of it
        """
        lost = self._expected.keys() - self._checks.keys()
        all_problems = [
            *problems,
            *self._problems,
            *(f"{name}.weight is missing" for name in self._expected if name in lost),
            *self._zero_rows.problems(),
        ]
        return Verification(
            list(self._checks.values()), list(dict.fromkeys(all_problems))
        )


def _parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return parameters and buffers by all of their names, the tied ones as one."""
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return tensors


def _dense_name(name: str) -> str:
    """Return the name of the weight that a part belongs to, or the name itself."""
    found = parts_of(name)
    return f"{found[0]}.weight" if found else name


def _faults(name: str, tensor: Tensor, described: Tensor) -> list[str]:
    if tensor.shape != described.shape:
        return [
            f"{name} has shape {tuple(tensor.shape)}; by config.json it is "
            f"{tuple(described.shape)}"
        ]
    if tensor.is_floating_point() and not tensor.isfinite().all():
        return [f"{name} contains NaN or infinity"]
    return []
