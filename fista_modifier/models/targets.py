"""The operators that a recipe asks for, and whether they can be pruned."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import match_name, match_named_modules
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.utils.pytorch.module import expand_special_targets
from llmcompressor.utils.transformers import get_embeddings
from loguru import logger
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fista_modifier.models.operators import Operator
from fista_modifier.solver.patterns import SparsityPattern

__all__ = [
    "IGNORE",
    "TARGETS",
    "ZEROS",
    "check_no_adapters",
    "check_prunable",
    "check_quantisable",
    "find_operators",
    "names_matched",
    "share_of_zeros",
    "warn_of_zeros",
]

TARGETS, IGNORE = ["Linear"], ["re:.*lm_head"]
"""What is pruned without a recipe: linear operators, but for the output embedding."""
ZEROS = 0.05
"""
The share of zeros above which an operator counts as sparse. Few dense operators have
more zeros, such as some that once had 4 bits.
"""
SHOWN = 4
"""The most operators that a warning names."""


def find_operators(
    model: PreTrainedModel, targets: list[str], ignore: list[str]
) -> list[Operator]:
    """
    Find the operators that a recipe asks to prune. As in the toolkit, a target is a
    class name, a module name or "re:" and a pattern; a target module that is not a
    linear operator itself (a decoder layer) stands for all those inside it. "Linear"
    includes GPT-2's Conv1D. The output embedding, the head of a classifier or reward
    model and the router of a mixture of experts are pruned only if a target names them.

    :param model: model to search
    :param targets: what to prune
    :param ignore: what to leave dense
    :return: operators in the order of ``model.named_modules()``
    :raises ValueError: if a target matches nothing, if nothing is left to prune, or if
        a target names an output embedding that is tied to the input embedding, or the
        model has adapters
    """
    check_no_adapters(
        model,
        "merge them first, model = model.merge_and_unload(), and prune what that "
        "returns",
    )
    found = _matched(model, targets)

    def is_named(name: str) -> bool:
        return any(match_name(name, target) for target in targets)

    ignored = names_matched(model, ignore, found)
    embedding, head = get_embeddings(model)
    operators = []
    for name, module in found.items():
        if name in ignored or (_is_router(model, name) and not is_named(name)):
            continue
        if module is head:
            if not is_named(name):
                continue
            if _share_weight(module, embedding):
                raise ValueError(
                    f"'{name}' shares its weight with the input embedding, which "
                    "would be pruned too; load the model with untied embeddings "
                    "(oneshot(tie_word_embeddings=False)) or do not target it"
                )
            logger.warning(f"Pruning the output embedding '{name}', as targeted")
        operators.append(Operator(name, module))
    operators = [
        operator
        for operator in _without_shared(model, operators)
        if is_named(operator.name) or not _is_head(model, operator.name)
    ]
    if not operators:
        raise ValueError(
            f"targets {targets} minus ignore {ignore} leave no linear operator of "
            f"{type(model).__name__} to prune"
        )
    return operators


def _matched(
    model: PreTrainedModel, targets: list[str]
) -> dict[str, torch.nn.Linear | Conv1D]:
    """
    Find the linear operators that targets match, or that are inside what they match.

    :return: the operators by their names, in the order of the model
    :raises ValueError: if a target matches nothing
    """
    asked, targets = set(targets), expand_special_targets(targets)
    if "Linear" in targets:
        targets = [*targets, "Conv1D"]
    # one word may stand for several classes, and not every model has each
    optional = {"Linear", "Conv1D", *targets} - (asked - {"Linear", "Conv1D"})
    found: dict[str, torch.nn.Linear | Conv1D] = {}
    for target in targets:
        matches = list(match_named_modules(model, [target]))
        if not matches and target not in optional:
            raise ValueError(
                f"target '{target}' matches no module of {type(model).__name__}; use a "
                "class name ('Linear'), a module name, or 're:' and a pattern"
            )
        for name, module in matches:
            for inner, child in module.named_modules(prefix=name):
                if isinstance(child, torch.nn.Linear | Conv1D):
                    found[inner] = child
    order = [name for name, _ in model.named_modules() if name in found]
    return {name: found[name] for name in order}


def names_matched(
    model: PreTrainedModel, targets: list[str], operators: Iterable[str]
) -> set[str]:
    """
    Find the operators that targets match.

    :param model: the model
    :param targets: class names, module names or "re:" patterns
    :param operators: names of operators
    :return: the names of those that a target matches, or that are inside a module that
        one matches
    """
    modules = {name for name, _ in match_named_modules(model, targets)}
    return {
        name
        for name in operators
        if any(part in modules for part in accumulate(name.split("."), "{}.{}".format))
    }


def check_no_adapters(model: torch.nn.Module, fix: str) -> None:
    """
    Refuse adapters of PEFT: once they are merged, other weights run.

    :param model: any model
    :param fix: what the user is to do about them
    :raises ValueError: if the model has adapters
    """
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError(f"the {type(model).__name__} has adapters: {fix}")


def _is_head(model: PreTrainedModel, name: str) -> bool:
    """
    Say whether an operator is beside the model's body, such as a reward's ``score``.
    """
    return model.base_model is not model and "." not in name


def _without_shared(
    model: PreTrainedModel, operators: list[Operator]
) -> list[Operator]:
    """
    Return the operators that run at one place of the model only, and warn of the
    others. An operator at several places has no single input, and to prune it for the
    first place would change the dense model behind it.
    """
    modules = Counter(id(one) for _, one in model.named_modules(remove_duplicate=False))
    with disable_onloading():
        weights = Counter(id(operator.module.weight) for operator in operators)
        shared = [
            operator
            for operator in operators
            if modules[id(operator.module)] > 1
            or weights[id(operator.module.weight)] > 1
        ]
    if shared:
        logger.warning(
            f"{len(shared)} operators stay dense, as several layers share their "
            f"weights: {', '.join(operator.name for operator in shared[:SHOWN])}"
            + (" and others" if len(shared) > SHOWN else "")
        )
    return [operator for operator in operators if operator not in shared]


def _share_weight(one: torch.nn.Module, other: torch.nn.Module | None) -> bool:
    """
    Say whether two modules share a weight, even if each access to it gives another
    tensor.
    """
    with disable_onloading():
        weight = getattr(one, "weight", None)
        return weight is not None and weight is getattr(other, "weight", None)


def _is_router(model: PreTrainedModel, name: str) -> bool:
    """
    Say whether an operator is a mixture's router. A router gives a score to each expert
    beside it, or one score to all of them together. It may also do so within a module
    that is beside the experts, or within one whose class has router or gating in its
    name.
    """
    module = model.get_submodule(name)
    parent, _, _ = name.rpartition(".")
    grandparent, _, _ = parent.rpartition(".")
    block = type(model.get_submodule(parent)).__name__.lower()
    if "router" in block or "gating" in block:
        return True
    counts = {
        # a linearised mixture has its activation function in the list
        getattr(child, "num_experts", len(child))
        for child in model.get_submodule(parent).children()
        if isinstance(child, torch.nn.ModuleList)
    }
    around = {
        child.num_experts
        for child in model.get_submodule(grandparent).children()
        if isinstance(child, LinearExperts2D)
    }
    scores, _ = Operator(name, module).shape
    return scores in counts | around or (bool(counts) and scores == 1)


def check_prunable(operator: Operator, pattern: SparsityPattern) -> None:
    """
    Refuse an operator that cannot be pruned.

    :param operator: an operator about to be pruned
    :param pattern: sparsity asked for
    :raises ValueError: if the operator is or is about to be quantised, if its width
        does not suit the pattern, or its weight is not floating point or not finite
        (which cannot be seen of a weight on the meta device)
    """
    if is_module_quantized(operator.module):
        raise ValueError(
            f"{operator.name} is quantised: prune first and quantise afterwards. In a "
            "recipe the pruning modifier comes before those that quantise; of a "
            "quantised checkpoint, prune the full-precision original"
        )
    weight = operator.weight
    if not weight.is_floating_point():
        raise ValueError(
            f"the weight of {operator.name} is {weight.dtype}: prune the "
            "full-precision model first and quantise it afterwards"
        )
    try:
        pattern.check_columns(weight.shape[1])
    except ValueError as error:
        raise ValueError(f"{operator.name}: {error}") from None
    if not (weight.is_meta or bool(weight.isfinite().all())):
        raise ValueError(
            f"the weight of {operator.name} contains NaN or infinity; the checkpoint "
            "is damaged, or it was loaded in a dtype that cannot hold it"
        )


def check_quantisable(operator: Operator, columns: int) -> None:
    """
    Refuse a number of columns that a later modifier of the recipe could not quantise.

    :param operator: an operator that the later modifier may quantise
    :param columns: the number of columns that it is to have by then
    :raises ValueError: if its scheme quantises weights or inputs in groups of columns,
        or weights in blocks, into which these cannot be divided
    """
    scheme = getattr(operator.module, "quantization_scheme", None)
    if scheme is None:
        return
    quantised = filter(None, (scheme.weights, scheme.input_activations))
    group = math.lcm(*(_group_of_columns(one) for one in quantised))
    if columns % group:
        raise ValueError(
            f"{operator.name} would have {columns} columns, which cannot be quantised "
            f"in groups of {group}: set multiple_of: {group}"
        )


def _group_of_columns(quantised: QuantizationArgs) -> int:
    """Return the number of columns that are quantised together; 1 for any number."""
    if quantised.block_structure is not None:
        return int(quantised.block_structure[1])
    return max(quantised.group_size or 1, 1)  # -1 stands for all columns


def share_of_zeros(operators: Sequence[Operator]) -> tuple[str, float]:
    """
    Return the share of zeros of the sparsest of some operators. Each is looked at, as a
    model may be sparse in a few of them only. An operator without weights has no zeros.

    :param operators: operators of a model
    :return: the name of the sparsest, and its share of zeros
    """
    zeros = {
        one.name: int((one.weight == 0).sum()) / max(math.prod(one.shape), 1)
        for one in operators
    }
    return max(zeros.items(), key=lambda one: one[1])


def warn_of_zeros(operators: Sequence[Operator]) -> None:
    """
    Warn that zeros of a model that is sparse already may get values again.

    :param operators: operators about to be pruned
    """
    name, share = share_of_zeros(operators)
    if share > ZEROS:
        logger.warning(
            f"The model is sparse already ({100 * share:.0f} % of {name} are zeros), "
            "and zeros may get values again: set preserve_sparsity_mask: true to keep "
            "them"
        )
