"""The check that a checkpoint on disk is whole and as sparse as it should be."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from torch import Tensor
from transformers import (
    AutoConfig,
    CompressedTensorsConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion

from fista_modifier.checkpoint.names import disagreements, names_in_memory, unmatched
from fista_modifier.checkpoint.packing import parts_of, stored_twice
from fista_modifier.checkpoint.quantised_experts import (
    are_quantised,
    load_quantised_experts,
)
from fista_modifier.checkpoint.shards import as_value_error, locate, read
from fista_modifier.models.classes import model_class, weightless_model
from fista_modifier.models.experts import linearize, linearize_weightless
from fista_modifier.models.operators import Operator
from fista_modifier.models.targets import find_operators
from fista_modifier.pruning.results import REPORT_NAME, PruningReport
from fista_modifier.solver import SparsityPattern
from fista_modifier.solver.patterns import reported_pattern

__all__ = ["OperatorCheck", "Verification", "verify"]

DEPTH = re.compile(r"n_layers?|num_(\w+_)?layers|(en|de)coder_layers")
"""The names that configurations give to the number of layers."""


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


@dataclass(frozen=True)
class _Expectation:
    """
    The pattern of an operator, and its number of zeros where that is known. The number
    is exact, or the least that a quantised operator may have, since rounding adds some.
    """

    pattern: SparsityPattern
    zeros: int | None = None
    exact: bool = True


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
    config = _described(folder, len(files))
    if _is_quantised(config):
        return _verify_loaded(folder, files, pattern, problems, config)
    model = _skeleton(folder, config, len(files))
    expected = _expectations(folder, model, pattern)
    names = names_in_memory(model, {_dense_name(name) for name in files})
    if names is None or get_non_linearized_moes(model):
        size = sum(file.stat().st_size for file in set(files.values()))
        if model.num_parameters() > size:  # do not load what is not there
            problems.append(f"the files have {size} bytes, too few for config.json")
            return Verification(problems=problems)
        return _verify_loaded(folder, files, pattern, problems, config)
    parameters = model.state_dict(keep_vars=True)
    present = set(names.values())
    problems += stored_twice(files)
    problems += disagreements(model, *unmatched(parameters, present))
    checks = []
    zero_rows = _ZeroRows(_zero_rows(folder, pattern), expected)
    first_of: dict[int, tuple[str, Tensor]] = {}
    sharing = _sharing(parameters)
    for _, stored, tensor in read(files, problems):
        name = names[stored]
        if name not in parameters:
            continue  # it is one of the disagreements
        problems += _faults(name, tensor, parameters[name])
        zero_rows.see(model, name, tensor)
        shared = sharing[id(parameters[name])]
        if len(shared) > 1:
            other, value = first_of.setdefault(id(parameters[name]), (name, tensor))
            if value.dtype != tensor.dtype or not torch.equal(value, tensor):
                problems.append(f"{name} and {other} are tied, and differ")
        for weight in [name, *(one for one in shared if one not in present)]:
            operator = weight.removesuffix(".weight")
            if operator == weight or operator not in expected:
                continue
            oriented = _operator(model, operator).oriented(tensor)
            checks.append(_check(operator, oriented, expected[operator]))
    found = {check.name for check in checks}
    problems += [f"{name}.weight is missing" for name in expected if name not in found]
    problems += zero_rows.problems()
    return Verification(checks, list(dict.fromkeys(problems)))


def _verify_loaded(
    folder: Path,
    files: Mapping[str, Path],
    pattern: SparsityPattern | None,
    problems: list[str],
    config: PretrainedConfig,
) -> Verification:
    """Check a checkpoint that transformers loads as a whole."""
    quantised = _is_quantised(config)
    try:
        with as_value_error(f"{folder} cannot be loaded"):
            if quantised and are_quantised(files):
                loaded = load_quantised_experts(files.values(), config)
            else:
                loaded = _load(folder, config)
            model, missing, unknown = loaded
    except (OSError, ValueError) as error:
        return Verification(problems=[*problems, str(error)])
    problems = problems + disagreements(model, missing, unknown)
    for name, parameter in model.named_parameters():
        problems += _faults(name, parameter, parameter)
    expectations = _expectations(folder, model, pattern)
    zero_rows = _ZeroRows(_zero_rows(folder, pattern), expectations)
    for name, parameter in model.named_parameters():
        zero_rows.see(model, name, parameter)
    problems += zero_rows.problems()
    checks = []
    modules = dict(model.named_modules())
    for name, expected in expectations.items():
        if not hasattr(modules.get(name), "weight"):
            problems.append(f"{name}.weight is missing")
            continue
        weight = Operator(name, modules[name]).weight
        expected = replace(expected, exact=not quantised)
        checks.append(_check(name, weight, expected))
    return Verification(checks, problems)


def _load(
    folder: Path, config: PretrainedConfig
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """
    Load a checkpoint in dense form with transformers, experts as linear operators. Also
    return the names that only the model has, and those that only the files have.
    """
    how: dict[str, Any] = {"config": config}
    if _is_quantised(config):
        how = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    model, loading = model_class(config).from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **how,
    )
    linearize(model)
    return model, sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])


def _described(folder: Path, tensors: int) -> PretrainedConfig:
    """
    Return the configuration in config.json.

    :raises ValueError: if it describes no model, with the reason
    """
    file = folder / "config.json"
    with as_value_error(f"{file} describes no model"):
        _check_depth(json.loads(file.read_text(encoding="utf-8")), tensors)
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )


def _is_quantised(config: PretrainedConfig) -> bool:
    quantization = getattr(config, "quantization_config", None) or {}
    return bool(quantization.get("config_groups"))


def _skeleton(folder: Path, config: PretrainedConfig, tensors: int) -> PreTrainedModel:
    """
    Return the model of config.json, without memory for its weights. The experts of a
    mixture become linear operators if transformers saves them under those names.
    """
    with as_value_error(f"{folder / 'config.json'} describes no model"):
        config.__dict__.pop("quantization_config", None)
        model = weightless_model(config)
        if _stores_operators(model, tensors):
            linearize_weightless(model)
        return model


def _stores_operators(model: PreTrainedModel, tensors: int) -> bool:
    """Say whether transformers saves a mixture under the names of its operators."""
    fused = dict(get_non_linearized_moes(model))
    count = sum(len(experts.down_proj) for experts in fused.values())
    if not 0 < count <= tensors:  # a billion experts would take too long to build
        return False
    named = model.state_dict()
    stored = set(revert_weight_conversion(model, named))
    experts = tuple(f"{name}." for name in fused)
    linear = {f"{name}0.up_proj.weight" for name in experts}
    return linear | {name for name in named if not name.startswith(experts)} <= stored


def _check_depth(config: dict[str, Any], tensors: int) -> None:
    """
    Refuse a configuration with more layers than there are tensors. A model of a billion
    layers would take too long to build.

    :raises ValueError: if there are more layers than tensors, as each layer has some
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _check_depth(value, tensors)
        elif DEPTH.fullmatch(key) and isinstance(value, int) and value > tensors:
            raise ValueError(f"{key} is {value}, and there are {tensors} tensors")


def _expectations(
    folder: Path, model: PreTrainedModel, pattern: SparsityPattern | None
) -> dict[str, _Expectation]:
    """
    Return what each pruned operator must have, by the operators' names.

    :raises FileNotFoundError: if there is neither a pattern nor a report
    """
    if pattern is not None:
        return {
            operator.name: _Expectation(pattern)
            for operator in find_operators(model, ["Linear"], ["re:.*lm_head"])
        }
    if not (folder / REPORT_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} has no {REPORT_NAME}; name the pattern: --pattern 2:4"
        )
    report = PruningReport.load(folder)
    return {
        operator.name: _Expectation(reported_pattern(operator.pattern), operator.zeros)
        for operator in report.operators
    }


def _zero_rows(folder: Path, pattern: SparsityPattern | None) -> dict[str, int]:
    """
    Return the number of output channels that are zeros in place, for each operator that
    the report lists with some. The result is empty if a pattern is given.
    """
    return {} if pattern is not None else PruningReport.load(folder).zero_rows


class _ZeroRows:
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
        """Note which rows of a parameter are zero, if its operator is to be checked."""
        operator, _, kind = name.rpartition(".")
        if operator not in self._expected:
            return
        if kind == "bias":
            self._biases[operator] = tensor == 0
        elif tensor.ndim == 2:
            oriented = _operator(model, operator).oriented(tensor)
            self._weights[operator] = (oriented == 0).all(1)

    def problems(self) -> list[str]:
        """Describe what is wrong with the operators, also with those not seen."""
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


def _operator(model: PreTrainedModel, name: str) -> Operator:
    module: Any = model.get_submodule(name)
    return Operator(name, module)


def _sharing(parameters: dict[str, Tensor]) -> dict[int, list[str]]:
    """Return all names of each parameter, by the parameter's ``id``."""
    names: dict[int, list[str]] = {}
    for name, value in parameters.items():
        names.setdefault(id(value), []).append(name)
    return names


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


def _check(name: str, weight: Tensor, expected: _Expectation) -> OperatorCheck:
    zeros = int((weight == 0).sum())
    problem = _problem(weight, zeros, expected)
    return OperatorCheck(name, str(expected.pattern), zeros, weight.numel(), problem)


def _problem(weight: Tensor, zeros: int, expected: _Expectation) -> str | None:
    if weight.ndim != 2:
        return f"is no matrix: its shape is {tuple(weight.shape)}"
    try:
        expected.pattern.check_columns(weight.shape[1])
    except ValueError as error:
        return str(error)
    if not expected.pattern.holds(weight):
        return f"is not {expected.pattern}"
    if expected.zeros is not None and (
        zeros < expected.zeros or (expected.exact and zeros > expected.zeros)
    ):
        return f"has {zeros} zeros; the report counts {expected.zeros}"
    return None
