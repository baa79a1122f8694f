"""The linear operators of a model, whatever their class: weights as out×in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from compressed_tensors.offload import (
    OffloadCache,
    disable_onloading,
    update_offload_parameter,
)
from compressed_tensors.quantization import initialize_module_for_quantization
from compressed_tensors.quantization.utils import is_module_quantized
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fista_modifier.solver.drift import narrows

UNCHANGED: Mapping[Operator, Tensor] = MappingProxyType({})
"""The empty mapping of new weights or biases. It says that all are the model's own."""

__all__ = [
    "UNCHANGED",
    "Operator",
    "blocks_of",
    "mean_kept",
    "operators_in",
    "replaced_weights",
    "trainable",
]


@dataclass(frozen=True, eq=False)
class Operator:
    """
    One linear operator y = W x (+ b).

    :param name: the module's name in the model
    :param module: a ``torch.nn.Linear`` or GPT-2's ``Conv1D``, whose weight is in×out
    """

    name: str
    module: torch.nn.Linear | Conv1D

    @property
    def weight(self) -> Tensor:
        """W, out×in, a view of the module's (onloaded) weight."""
        return self.oriented(self.module.weight.data)

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of out and in features, which are known without onloading."""
        if isinstance(self.module, Conv1D):
            return self.module.nf, self.module.nx
        return self.module.out_features, self.module.in_features

    @property
    def narrows(self) -> bool:
        """
        True if the operator, alone in its stage, would have an ``OutputDrift``. This is
        known without onloading.
        """
        return narrows(*self.shape)

    def oriented(self, weight: Tensor) -> Tensor:
        """
        Turn a weight from the module's own layout into out×in, or back.

        :param weight: a weight in the module's own layout, or out×in
        :return: the weight in the other layout; for a Linear, both are the same
        """
        return weight.T if isinstance(self.module, Conv1D) else weight

    def is_resized_by(self, weight: Tensor) -> bool:
        """
        Say whether a weight has another shape than the operator's.

        :param weight: out×in
        :return: whether the shapes differ
        """
        return self.shape != tuple(weight.shape)

    def save(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """
        Write the weight where it is stored, also on an offload device. If it is of
        another shape, all ranks of a distributed run have to call this together.

        :param weight: out×in, of another shape if the operator becomes smaller
        :param bias: the new bias, one entry for each out feature; None leaves the old
            one
        """
        _write(self.module, "weight", self.oriented(weight).contiguous())
        if bias is not None:
            _write(self.module, "bias", bias)
        resized = self.is_resized_by(weight)
        _set_sizes(self.module, weight.shape)
        if resized and is_module_quantized(self.module):
            # a later modifier of the recipe has made scales for the old sizes
            initialize_module_for_quantization(self.module)


def _set_sizes(module: torch.nn.Linear | Conv1D, sizes: Sequence[int]) -> None:
    """Set out and in features. GPT-2's Conv1D shapes its output by them."""
    if isinstance(module, Conv1D):
        module.nf, module.nx = sizes
    else:
        module.out_features, module.in_features = sizes


def _write(module: torch.nn.Module, name: str, value: Tensor) -> None:
    with disable_onloading():
        stored = getattr(module, name)
    if stored.shape == value.shape:
        update_offload_parameter(module, name, value)
        return
    offloaded = isinstance(module._parameters, OffloadCache)
    value = value.to(stored.dtype) if offloaded else value.to(stored)
    module._parameters[name] = torch.nn.Parameter(value, stored.requires_grad)


def operators_in(module: torch.nn.Module, name: str) -> list[Operator]:
    """
    Return the linear operators in a module, whether they are to be pruned or not.

    :param module: a module, such as a decoder layer
    :param name: the module's name in the model
    :return: all of its linear operators
    """
    return [
        Operator(inner, child)
        for inner, child in module.named_modules(prefix=name)
        if isinstance(child, torch.nn.Linear | Conv1D)
    ]


def blocks_of(
    layer: torch.nn.Module, operators: Iterable[Operator]
) -> dict[torch.nn.Module, list[Operator]]:
    """
    Find the blocks of a decoder layer: its children with operators in them (attention,
    MLP). Where the children are in a list, as in T5's layers, the blocks are those of
    the list.

    :param layer: a decoder layer
    :param operators: operators of the layer
    :return: the operators of each block
    """
    blocks = {}
    for child in _called_children(layer):
        inside = set(child.modules())
        if found := [one for one in operators if one.module in inside]:
            blocks[child] = found
    return blocks


def _called_children(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for child in module.children():
        # the toolkit's mixtures are lists, too, which are called
        if type(child) is torch.nn.ModuleList:
            yield from _called_children(child)
        else:
            yield child


@contextmanager
def replaced_weights(
    weights: Mapping[Operator, Tensor], biases: Mapping[Operator, Tensor] = UNCHANGED
) -> Iterator[None]:
    """
    Run modules with other weights, without a copy and without touching what is stored.
    The modules must be onloaded.

    :param weights: out×in weight of each operator to replace, of its shape or smaller
    :param biases: biases of those operators that get another bias, too
    """
    own = {operator: operator.module.weight.data for operator in weights}
    own_biases = {operator: operator.module.bias.data for operator in biases}
    own_sizes = {operator: operator.shape for operator in weights}
    try:
        for operator, weight in weights.items():
            operator.module.weight.data = operator.oriented(weight)
            _set_sizes(operator.module, weight.shape)
        for operator, bias in biases.items():
            operator.module.bias.data = bias
        yield
    finally:
        for operator, weight in own.items():
            operator.module.weight.data = weight
            _set_sizes(operator.module, own_sizes[operator])
        for operator, bias in own_biases.items():
            operator.module.bias.data = bias


@contextmanager
def trainable(layer: torch.nn.Module, operators: Iterable[Operator]) -> Iterator[None]:
    """
    Make the operators' weights the only parameters of a layer that require a gradient.

    :param layer: the layer, or a whole model
    :param operators: some of its operators
    """
    flags = {parameter: parameter.requires_grad for parameter in layer.parameters()}
    try:
        layer.requires_grad_(False)
        for operator in operators:
            operator.module.weight.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def mean_kept(weight: Tensor) -> float:
    """
    Return the mean absolute value of what is not zero in a weight.

    :param weight: a tensor of any shape and floating dtype
    :return: the mean; 0 if all is zero
    """
    kept = weight.abs().float()
    return float(kept.sum()) / max(int(kept.count_nonzero()), 1)
