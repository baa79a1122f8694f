"""The callback that keeps zeros while a ``Trainer`` trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, no_grad
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module, Parameter
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from fista_modifier.models.masks import masked, masks_of
from fista_modifier.models.operators import Operator
from fista_modifier.models.targets import check_no_adapters
from fista_modifier.recovery.sharding import is_sharded

__all__ = ["KeepZeros", "check_unsharded"]

SHARDED = {
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
    DistributedType.MEGATRON_LM,
}
"""
The ways to spread a model over processes in which none of them has its whole weights.
"""


NO_ADAPTERS = (
    "they leave the weights below them as they are, and fill their zeros when they are "
    "merged. So leave KeepZeros out: masks = masks_of(model) before the adapters are "
    "added, and apply_masks_(merged, masks) once they are merged"
)


class KeepZeros(TrainerCallback):  # type: ignore[misc]
    """
    A callback that keeps the zeros of a pruned model exactly zero in any training by
    transformers' ``Trainer`` and what is made from it, such as TRL's:
    ``callbacks=[KeepZeros()]``.

    Zeros get no gradient, so that they have no part in its norm, nor in what an
    optimizer remembers. After each step they are set to zero again, whatever the
    optimizer made of them. The training may run in one process or in several, on any
    devices. Each process has the whole model or, with PyTorch's ``fully_shard``
    (accelerate's FSDP with ``fsdp_version: 2``) or tensor parallelism, a part of it.

    :param masks: masks as :func:`fista_modifier.masks_of` returns them, such as those
        of another checkpoint; None takes the zeros that the model has when training
        begins
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self._given = masks
        self._kept: list[tuple[Parameter, Tensor]] = []
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_others: Any
    ) -> None:
        """
        Find the zeros, and see to it that they get no gradient.

        :raises ValueError: if the model has no zeros, has adapters, or does not have
            the operators of the masks, or if its weights have lost their shapes in
            DeepSpeed or the first version of FSDP
        """
        check_no_adapters(model, NO_ADAPTERS)
        _check_shapes(model)
        masks = masks_of(model) if self._given is None else self._given
        self._release()
        for found, mask in masked(model, masks):
            weight: Any = found
            if isinstance(found, Operator):
                weight, mask = found.module.weight, found.oriented(mask)
            own = _like(mask, weight)
            self._kept.append((weight, own))
            if weight.requires_grad:
                self._hooks.append(_without_gradient(weight, own))
        self._apply()

    def on_optimizer_step(self, *_arguments: Any, **_others: Any) -> None:
        """Set the zeros to zero again."""
        self._apply()

    def on_train_end(self, *_arguments: Any, **_others: Any) -> None:
        """Remove the hooks, so that the model is as before except for its weights."""
        self._release()

    def _apply(self) -> None:
        with no_grad():
            for weight, mask in self._kept:
                weight.mul_(mask)

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._kept = [], []


def _like(mask: Tensor, weight: Parameter) -> Tensor:
    """
    Bring a mask to where its weight is. Each process keeps the part of the mask that
    belongs to its part of the weight.
    """
    if not isinstance(weight, DTensor):
        return mask.to(weight.device)
    if isinstance(mask, DTensor):
        return mask
    mask = mask.to(weight.device)
    # every process has the whole mask, so that none has to be sent
    return distribute_tensor(
        mask, weight.device_mesh, weight.placements, src_data_rank=None
    )


def _without_gradient(weight: Parameter, mask: Tensor) -> RemovableHandle:
    """
    Set the gradients of a weight's zeros to zero in each backward pass.

    :param weight: the weight
    :param mask: its mask, in its own layout
    :return: the handle that ends this
    """
    if isinstance(weight, DTensor):
        # autograd sees another tensor, the gathered weight, and calls no other hook
        def hide(parameter: Tensor) -> None:
            parameter.grad.mul_(mask)  # type: ignore[union-attr]

        return weight.register_post_accumulate_grad_hook(hide)  # type: ignore[no-any-return, no-untyped-call]
    # the other hook would come after several processes have shared the gradient
    return weight.register_hook(lambda gradient: gradient * mask)  # type: ignore[no-any-return, no-untyped-call]


def check_unsharded(model: Module) -> None:
    """
    Refuse a model whose weights are spread over processes.

    :param model: a model that accelerate has prepared for training
    :raises ValueError: if each process has only a part of the weights
    """
    how = _sharding(model)
    if how is not None:
        raise ValueError(
            f"a model cannot be recovered under {how}, where no process has whole "
            "weights: start the processes with torchrun alone, without FSDP and "
            "DeepSpeed; --shard spreads the weights over them"
        )


def _check_shapes(model: Module) -> None:
    """
    Refuse a model whose weights are spread over processes without their shapes.

    :raises ValueError: if they are
    """
    how = _sharding(model)
    if how is not None and not is_sharded(model):
        raise ValueError(
            f"the zeros of a model cannot be kept under {how}, where the parts of "
            "weights have other shapes: use FSDP with fsdp_version: 2, or let each "
            "process have the whole model"
        )


def _sharding(model: Module) -> str | None:
    """Name the way in which weights are spread; None if each process has them whole."""
    spread = AcceleratorState().distributed_type
    if any(hasattr(one, "ds_id") for one in model.parameters()):
        spread = DistributedType.DEEPSPEED
    if spread in SHARDED:
        return str(spread.value)
    return "sharding" if is_sharded(model) else None
