"""The zeros of a pruned model, which must stay zeros when it is trained further."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.models.operators import Operator, operators_in
from fista_modifier.models.targets import ZEROS, check_no_adapters

__all__ = ["apply_masks_", "fused_experts", "masked", "masks_of"]


def masks_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """
    Return the masks of what is not zero in a pruned model. Call this before the model
    is trained, or an adapter is merged into it.

    :param model: a model with pruned linear operators
    :return: bool out×in of each linear operator that has zeros, also of an output
        embedding, by its name: True where an entry is not zero. For a mixture whose
        experts transformers has fused, also experts×…×… of each such weight, by the
        weight's name
    :raises ValueError: if no operator or weight of the model has more than 5 % zeros,
        or if the model has adapters
    """
    check_no_adapters(model, "take the masks before they are added")
    masks = {one.name: one.weight != 0 for one in operators_in(model, "")}
    for name, weight in fused_experts(model).items():
        masks[name] = weight.data != 0
    zeros = {name: float((~mask).float().mean()) for name, mask in masks.items()}
    if max(zeros.values(), default=0) <= ZEROS:
        raise ValueError(
            f"{type(model).__name__} has no sparse operator: take its masks before it "
            "is trained"
        )
    return {name: masks[name] for name, share in zeros.items() if share}


def apply_masks_(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
    """
    Set the entries that were zero to zero again, such as after each step of an
    optimizer or once an adapter is merged.

    :param model: changed in place
    :param masks: the masks that :func:`masks_of` returned
    :raises ValueError: if an operator is missing or has another shape
    """
    for found, mask in masked(model, masks):
        with torch.no_grad():
            if isinstance(found, Operator):
                found.save(found.weight * mask.to(found.weight.device))
            else:
                found.mul_(mask.to(found.device))


def masked(
    model: PreTrainedModel, masks: Mapping[str, Tensor]
) -> Iterator[tuple[Operator | torch.nn.Parameter, Tensor]]:
    """
    Find what masks belong to.

    :param model: a model
    :param masks: masks as :func:`masks_of` returns them
    :return: each operator, or weight of a layer's fused experts, and its mask
    :raises ValueError: if the model does not have one of them
    """
    experts, modules = fused_experts(model), dict(model.named_modules())
    for name, mask in masks.items():
        if name in experts and experts[name].shape == mask.shape:
            yield experts[name], mask
            continue
        module = modules.get(name)
        operator = Operator(name, module) if module is not None else None
        if operator is None or operator.weight.shape != mask.shape:
            raise ValueError(
                f"the masks have a {tuple(mask.shape)} operator '{name}', and the "
                "model does not: merge its adapters first, or take other masks"
            )
        yield operator, mask


def fused_experts(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """
    Return the weights that hold all experts of a layer.

    :param model: any model
    :return: the weights, experts×…×…, by their names
    """
    return {
        f"{name}.{inner}": weight
        for name, module in get_non_linearized_moes(model)
        for inner, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3
    }
