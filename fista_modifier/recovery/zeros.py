"""The callback that keeps zeros while a ``Trainer`` trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback

from fista_modifier.models.masks import (
    apply_masks_,
    fused_experts,
    masks_of,
    missing_operator,
)
from fista_modifier.models.operators import Operator

__all__ = ["KeepZeros", "check_unsharded"]

SHARDED = {
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
    DistributedType.MEGATRON_LM,
}
"""ways to spread a model in which no process has its whole weights"""


class KeepZeros(TrainerCallback):  # type: ignore[misc]
    """
    A callback that keeps the zeros of a pruned model exactly zero in any training by
    transformers' ``Trainer`` and what is made from it, such as TRL's:
    ``callbacks=[KeepZeros()]``.

    Zeros get no gradient, so that they have no part in its norm, nor in what an
    optimizer remembers. After each step they are set to zero again, whatever the
    optimizer made of them. The training may run in one process, or in several that have
    the whole model each, on any devices.

    :param masks: masks as :func:`fista_modifier.masks_of` returns them, such as those
        of another checkpoint; None takes the zeros that the model has when training
        begins
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self._given = masks
        self._masks: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_others: Any
    ) -> None:
        """
        Find the zeros, and see to it that they get no gradient.

        :raises ValueError: if the model has no zeros, has adapters, or does not have
            the operators of the masks, or if its weights are spread over several
            processes
        """
        _check_adapters(model)
        check_unsharded(model)
        masks = masks_of(model) if self._given is None else self._given
        self._release()
        for name, mask in masks.items():
            weight, own = _weight_of(model, name, mask)
            self._masks[name] = mask.to(weight.device)
            if weight.requires_grad:
                masked = _Masked(own.to(weight.device))
                hook = weight.register_hook(masked)  # type: ignore[no-untyped-call]
                self._hooks.append(hook)
        apply_masks_(model, self._masks)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_others: Any
    ) -> None:
        """Set the zeros to zero again."""
        apply_masks_(model, self._masks)

    def on_train_end(self, *_arguments: Any, **_others: Any) -> None:
        """Remove the hooks, so that the model is as before except for its weights."""
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._masks = [], {}


class _Masked:
    """
    A hook that sets the gradients of zeros to zero.

    :param mask: the mask of a weight, in the weight's own layout
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self._mask


def check_unsharded(model: Module) -> None:
    """
    Refuse a model whose weights are spread over processes.

    :param model: a model that accelerate has prepared for training
    :raises ValueError: if each process has only a part of the weights
    """
    spread = AcceleratorState().distributed_type
    if spread not in SHARDED and not any(map(_is_shard, model.parameters())):
        return
    how = spread.value if spread in SHARDED else "sharding"
    raise ValueError(
        f"the zeros of a model cannot be kept under {how}, where no process has whole "
        "weights: train it in one process, or in several with the whole model each "
        "(torchrun without FSDP and DeepSpeed)"
    )


def _is_shard(parameter: Parameter) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def _check_adapters(model: Module) -> None:
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError(
            "adapters leave the weights below them as they are, and fill their zeros "
            "when they are merged. So leave KeepZeros out: masks = masks_of(model) "
            "before the adapters are added, and apply_masks_(merged, masks) once they "
            "are merged"
        )


def _weight_of(
    model: PreTrainedModel, name: str, mask: Tensor
) -> tuple[Parameter, Tensor]:
    """
    Find the weight that a mask belongs to.

    :param name: name of an operator, or of the weight of a layer's fused experts
    :param mask: the mask, as :func:`masks_of` returns it
    :return: the weight, and its mask in the weight's own layout
    :raises ValueError: if the model has no such weight
    """
    experts = fused_experts(model)
    if name in experts and experts[name].shape == mask.shape:
        return experts[name], mask
    module: Any = dict(model.named_modules()).get(name)
    if module is None or Operator(name, module).weight.shape != mask.shape:
        raise missing_operator(name, mask)
    return module.weight, Operator(name, module).oriented(mask)
