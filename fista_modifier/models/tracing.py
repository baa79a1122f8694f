"""Repairs of what the toolkit's tracer does to a model's masks and to memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from compressed_tensors.utils import patch_attr
from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["configs_of", "traced_with_masks", "traces_forgotten"]


@contextmanager
def traced_with_masks(model: PreTrainedModel) -> Iterator[None]:
    """
    Make the toolkit's tracer keep the attention implementation of a model's config.

    The tracer rebuilds configs from ``to_dict()``, which leaves the attention
    implementation out. Families that choose their mask function in a branch (Mistral,
    Phi-3, Mixtral and others in the toolkit 0.14) then get no mask at all, and
    eager attention, which calibration forces, looks at future tokens and padding. An
    extra attribute of the config is written by ``to_dict()`` and understood by the
    config's constructor.

    :param model: the model that will be traced
    """
    configs = configs_of(model)
    with ExitStack() as stack:
        for config in configs:
            stack.enter_context(patch_attr(config, "attn_implementation", "eager"))
        yield


@contextmanager
def traces_forgotten() -> Iterator[None]:
    """
    Let go of the model after it was traced. The tracer of the toolkit 0.14 puts the
    functions that it wraps into a table of torch.fx. The table keeps them, and all that
    they refer to, as long as the process lives. So each run of ``oneshot()`` would keep
    its whole model.
    """
    table = torch.fx._symbolic_trace._wrapped_fns_to_patch
    before = set(table)
    try:
        yield
    finally:
        for name in set(table) - before:
            del table[name]


def configs_of(module: torch.nn.Module) -> list[PretrainedConfig]:
    """
    Return the configurations of all models and attention modules in a module.

    :param module: a model, or a part of one
    :return: the configurations, each once
    """
    configs = (getattr(part, "config", None) for part in module.modules())
    found = {id(one): one for one in configs if isinstance(one, PretrainedConfig)}
    return list(found.values())
