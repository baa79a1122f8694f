"""The zeros of a pruned model, to be kept when it is trained further."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.models.operators import Operator
from fista_modifier.models.targets import ZEROS, find_operators

__all__ = ["apply_masks_", "masks_of"]


def masks_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """
    To be asked before a pruned model is trained, or an adapter is merged into it.

    :param model: with pruned linear operators
    :return: bool out×in of each operator of which more than 5 % are zeros, by its
        name: True where an entry is not zero
    :raises ValueError: if the model has none
    """
    masks = {
        operator.name: operator.weight != 0
        for operator in find_operators(model, ["Linear"], [])
    }
    sparse = {
        name: mask
        for name, mask in masks.items()
        if float((~mask).float().mean()) > ZEROS
    }
    if not sparse:
        raise ValueError(
            f"{type(model).__name__} has no sparse operator: take its masks before it "
            "is trained"
        )
    return sparse


def apply_masks_(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
    """
    Set the entries that were zero to zero again, such as after each step of an
    optimizer or once an adapter is merged.

    :param model: changed in place
    :param masks: of :func:`masks_of`
    :raises ValueError: if an operator is missing or has another shape
    """
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        module = modules.get(name)
        operator = Operator(name, module) if module is not None else None
        if operator is None or operator.weight.shape != mask.shape:
            raise ValueError(
                f"the masks have a {tuple(mask.shape)} operator '{name}', and the "
                "model does not: merge its adapters first, or take other masks"
            )
        with torch.no_grad():
            operator.save(operator.weight * mask.to(operator.weight.device))
