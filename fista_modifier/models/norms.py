"""
Norms that scale by 1 + w, as Gemma's. During ``oneshot()`` the toolkit puts norms that
scale by 1 + w as a weight in their place, for modifiers that scale norms.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.offload import update_offload_parameter
from llmcompressor.modeling.offset_norm import (
    CalibrationOffsetNorm,
    NormCalibrationModule,
)
from torch import Tensor

__all__ = ["keep_norms_exact", "replaced_norms"]


def keep_norms_exact() -> None:
    """
    Mend the toolkit's norms. In 0.14 they round 1 + w to the model's dtype, and end
    with w rounded so, even where no modifier has changed it: in bfloat16 that changes
    almost every w. And what a modifier has changed is lost where weights are offloaded.
    """
    make = CalibrationOffsetNorm.__init__

    def __init__(  # noqa: N807
        self: CalibrationOffsetNorm, original: torch.nn.Module, config: Any
    ) -> None:
        make(self, original, config)
        self.weight = torch.nn.Parameter(_one_more(original))

    def restore(
        self: CalibrationOffsetNorm, original: torch.nn.Module
    ) -> torch.nn.Module:
        weight = self.weight.data.to(original.weight.device)
        if not torch.equal(weight, _one_more(original)):
            update_offload_parameter(
                original, "weight", (weight - 1).to(original.weight.dtype)
            )
        return original

    CalibrationOffsetNorm.__init__ = __init__
    CalibrationOffsetNorm.restore = restore


def replaced_norms(model: torch.nn.Module) -> set[str]:
    """
    Find the parameters that are not the model's own, but of norms that the toolkit has
    put there.

    :param model: any model
    :return: the names of these parameters
    """
    return {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, NormCalibrationModule)
        for own, _ in module.named_parameters(recurse=False)
    }


def _one_more(norm: torch.nn.Module) -> Tensor:
    weight = norm.get_parameter("weight")
    return 1 + weight.data.float()
