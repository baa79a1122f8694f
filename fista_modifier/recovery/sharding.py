"""Models of which each of several processes holds a part."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Module
from transformers import PreTrainedModel

__all__ = ["check_shardable", "is_sharded", "shard", "whole"]


def check_shardable(model: Module, resume: Path | None) -> None:
    """
    Refuse to spread a model over processes where that cannot be.

    :param model: the model, with or without weights
    :param resume: the folder that is to keep the state of the training
    :raises ValueError: if there is one process, or such a folder, or if the model has
        linear experts, of which each process would run others
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError(
            "--shard spreads the weights over several processes, and there is one: "
            "start them with torchrun --nproc-per-node N -m fista_modifier.cli …"
        )
    if resume is not None:
        raise ValueError(
            "--resume keeps whole weights, and with --shard no process has them: leave "
            "one of them out"
        )
    if any(isinstance(one, LinearExperts2D) for one in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has experts, and each process would have "
            "gradients of others: leave --shard out"
        )


def shard(model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """
    Spread a model over all processes by PyTorch's ``fully_shard``. The weights of a
    layer are gathered while it runs.

    :param model: changed in place; it cannot be put together again
    :param dtype: what to multiply in; None for the weights' own
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    # accelerate would wrap it once more, to share gradients that are shared already
    model._is_accelerate_prepared = True


def is_sharded(model: Module) -> bool:
    """
    Say whether each process has a part of a model.

    :param model: any model
    :return: whether its parameters are spread
    """
    return any(isinstance(one, DTensor) for one in model.parameters())


def whole(weight: Tensor) -> Tensor:
    """
    Gather a weight. If it is spread, all processes have to call this together.

    :param weight: a weight, or a part of one
    :return: the whole weight
    """
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
