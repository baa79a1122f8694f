"""Mixtures of experts: fused by transformers, and linear operators for the pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import disable_offloading, disable_onloading
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe.gpt_oss import GptOssExpertMLP
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import (
    get_linearized_moes,
    get_non_linearized_moes,
)
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts
from loguru import logger
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from fista_modifier.models.operators import Operator

__all__ = [
    "check_expert_widths",
    "linearize",
    "linearize_weightless",
    "native_experts",
    "note_sizes",
    "routing_real_tokens",
]

BLOCK_BYTES = 16
"""PyTorch's grouped products take rows whose length is a multiple of this."""


def linearize(model: PreTrainedModel) -> None:
    """
    Make each expert's projections linear operators, as ``oneshot()`` does with the
    toolkit's ``linearize_moe``. Unlike that, this takes memory for the experts of one
    layer beside the model, not for all of them.

    :param model: changed in place; one without a mixture stays as it is
    """
    _replace_fused(model, lambda linear, *copied: linear.from_experts_module(*copied))


def linearize_weightless(model: PreTrainedModel) -> None:
    """
    Make each expert's projections linear operators in a model on the meta device, which
    has no weights to copy.

    :param model: changed in place
    """

    def make(
        linear: type[LinearExperts2D], fused: torch.nn.Module, config: Any
    ) -> LinearExperts2D:
        if linear is not Llama4LinearExperts:
            return linear(config)
        sizes = fused.num_experts, fused.hidden_size, fused.expert_dim
        return linear(*sizes, config.text_config)

    with torch.device("meta"):
        _replace_fused(model, make)


def check_expert_widths(model: PreTrainedModel, widths: Mapping[Operator, int]) -> None:
    """
    Refuse numbers of channels with which fused experts could not run: transformers
    multiplies them in groups by a kernel that needs rows of whole blocks.

    :param model: a model whose experts are linear operators
    :param widths: how many channels are to stay, by the operator that reads them, in an
        expert or elsewhere
    :raises ValueError: if rows of an expert would end within a block
    """
    experts = tuple(f"{name}." for name, _ in get_linearized_moes(model))
    with disable_onloading():
        dtypes = {operator: operator.module.weight.dtype for operator in widths}
    for operator, width in widths.items():
        dtype = dtypes[operator]
        unit = BLOCK_BYTES // dtype.itemsize
        if width % unit and operator.name.startswith(experts):
            raise ValueError(
                f"multiple_of: experts of {width} channels would stay, and "
                f"transformers runs those of {dtype} only in multiples of {unit}: let "
                "multiple_of be one"
            )


def _replace_fused(
    model: PreTrainedModel,
    make: Callable[[type[LinearExperts2D], torch.nn.Module, Any], LinearExperts2D],
) -> None:
    """
    Replace the fused experts of a model by linear operators.

    :param model: changed in place
    :param make: makes the linear operators, given their class, the module that they
        replace, and its configuration
    :raises ValueError: if the toolkit fails at some experts; the message names them
    """
    for name, fused in get_non_linearized_moes(model):
        linear = LinearExperts2D.get_linear_experts_cls(type(fused))
        config = getattr(fused, "config", model.config)
        with disable_onloading():
            dtype = fused.down_proj.dtype
        # after save_pretrained the configuration has its dtype as a word; and what is
        # offloaded is onloaded once, not for each expert
        with patch_attr(config, "dtype", dtype), disable_offloading():
            try:
                operators = make(linear, fused, config)
            except (AttributeError, TypeError) as error:
                raise ValueError(
                    "llm-compressor cannot make linear operators of the experts "
                    f"{name} ({type(fused).__name__}): {error}"
                ) from error
            model.set_submodule(name, operators)
        _drop_weights(fused)


def note_sizes(model: PreTrainedModel) -> None:
    """
    Tell the toolkit's experts how large they are, once channels have left them.

    :param model: changed in place
    """
    for _, experts in get_linearized_moes(model):
        for expert in experts.children():
            if hasattr(expert, "intermediate_size"):
                expert.intermediate_size = expert.down_proj.in_features


@contextmanager
def routing_real_tokens(layer: torch.nn.Module, real: Tensor | None) -> Iterator[None]:
    """
    Keep padding away from the experts of a layer: a mixture returns zeros for it. A
    mixture is a module that is given a row for each token, and in another tensor the
    numbers of the experts that each token goes to.

    :param layer: a layer in which mixtures may be
    :param real: which tokens are not padding, bool batch×sequence; None for all
    """
    with ExitStack() as stack:
        if real is not None and not real.all():
            for module in layer.modules():
                if next(module.children(), None) is not None:
                    only_real = _on_rows(module.forward, real.flatten())
                    stack.enter_context(patch_attr(module, "forward", only_real))
        yield


def _on_rows(forward: Callable[..., Any], rows: Tensor) -> Callable[..., Any]:
    """
    Return a forward that runs a mixture on some of its tokens, and returns zeros for
    the others. It runs any other module as before.

    :param forward: the module's own forward
    :param rows: bool, True for the tokens to run on
    :return: the new forward
    """

    def of_each_token(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim == 2 and len(value) == len(rows)

    def taken(value: Any) -> Any:
        return value[rows.to(value.device)] if of_each_token(value) else value

    def put_back(value: Any, count: int) -> Any:
        if not isinstance(value, Tensor) or value.ndim != 2 or len(value) != count:
            return value
        whole = value.new_zeros(len(rows), value.shape[1])
        whole[rows.to(value.device)] = value
        return whole

    def run(*args: Any, **kwargs: Any) -> Any:
        given = [one for one in tree_leaves((args, kwargs)) if of_each_token(one)]
        kinds = {one.is_floating_point() for one in given}
        if kinds != {True, False}:
            return forward(*args, **kwargs)
        args, kwargs = tree_map(taken, (args, kwargs))
        widened = partial(put_back, count=int(rows.sum()))
        return tree_map(widened, forward(*args, **kwargs))

    return run


@contextmanager
def native_experts(model: PreTrainedModel) -> Iterator[None]:
    """
    Fuse the experts as in transformers until the context ends. ``save_pretrained`` then
    gives tensors the names of the checkpoint that the model came from. Afterwards the
    experts are linear operators of the same names as before, in new modules. This takes
    memory for the experts of one layer beside the model: the old modules are left
    without weights, because others may still refer to them (the toolkit's session
    does).

    If experts are quantised, all stay as they are. So do those that the toolkit cannot
    fuse. There is a warning of both, but not if ``load_quantizable_moe`` loaded them,
    which gives them the names of the checkpoint itself.

    :param model: may be one without a mixture
    """
    linear = dict(get_linearized_moes(model))
    if any(is_module_quantized(one) for it in linear.values() for one in it.modules()):
        if any(hasattr(experts, "_source_experts_cls") for experts in linear.values()):
            logger.bind(log_once=True).warning(
                "Quantised experts are saved one by one, under names that transformers "
                "cannot load"
            )
        linear = {}
    try:
        with _gpt_oss_fused():
            for name, experts in linear.items():
                if _can_be_fused(experts):
                    model.set_submodule(name, experts.to_experts_module())
                    _drop_weights(experts)
        yield
    finally:
        if any(model.get_submodule(name) is not linear[name] for name in linear):
            linearize(model)


@contextmanager
def _gpt_oss_fused() -> Iterator[None]:
    """
    Let the toolkit fuse GPT-OSS's experts, in which gate and up alternate. In 0.14 the
    toolkit inherits the inverse of another order for them.
    """
    own = "copy_to_experts_module"
    if own in vars(GptOssExpertMLP):
        yield
        return
    setattr(GptOssExpertMLP, own, _copy_to_gpt_oss)
    try:
        yield
    finally:
        delattr(GptOssExpertMLP, own)


def _copy_to_gpt_oss(expert: GptOssExpertMLP, experts: Any, index: int) -> None:
    """
    Copy a linear expert into fused ones: the inverse of
    ``GptOssExpertMLP.copy_from_experts_module``.
    """
    for start, part in enumerate((expert.gate_proj, expert.up_proj)):
        experts.gate_up_proj[index, :, start::2] = part.weight.T
        experts.gate_up_proj_bias[index, start::2] = part.bias
    experts.down_proj[index] = expert.down_proj.weight.T
    experts.down_proj_bias[index] = expert.down_proj.bias


def _can_be_fused(experts: LinearExperts2D) -> bool:
    if not hasattr(experts, "_source_experts_cls"):
        return False
    copies = type(experts[0]).__mro__
    # a class with its own way to copy may inherit the inverse of another way
    source = next(one for one in copies if "copy_from_experts_module" in vars(one))
    if "copy_to_experts_module" in vars(source):
        return True
    logger.bind(log_once=True).warning(
        f"llm-compressor cannot fuse {source.__name__} again: experts are saved under "
        "the names of linear operators, which transformers does not know"
    )
    return False


def _drop_weights(module: torch.nn.Module) -> None:
    """Forget the weights of a module, also where they are offloaded to."""
    for part in module.modules():
        with disable_onloading():
            names = [name for name, _ in part.named_parameters(recurse=False)]
        for name in names:
            delattr(part, name)
