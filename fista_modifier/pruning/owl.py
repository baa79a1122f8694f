"""
Outlier weighed layerwise sparsity (Yin et al., "Outlier Weighed Layerwise Sparsity
(OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity", ICML 2024), with the
numbers of the toolkit's ``SparseGPTModifier``.

The toolkit's own functions are methods of its modifier. They run a calibration whose
events reach the other modifiers of a recipe, keep |W|·‖x‖ of the whole model at once,
and know neither GPT-2's Conv1D nor experts that no token reaches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device, set_onload_device
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pytorch.utils.helpers import tensors_to_device
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.calibration.contexts import forward_context
from fista_modifier.distributed import ALONE, Ranks
from fista_modifier.models.layers import DecoderLayer
from fista_modifier.models.operators import Operator, operators_in

__all__ = ["Owl"]

DIGITS = 6
"""
The decimal places to which a layer's sparsity is rounded, because it is a part of the
pattern's name.
"""


@dataclass(frozen=True)
class Owl:
    """
    The choice of a sparsity for each layer by OWL. A layer keeps more weights the more
    outliers it has. These are weights whose |W_ij|·‖x_j‖ is far above the layer's mean.

    :param m: M: an outlier is more than M times the mean
    :param lmbda: λ, half of the range of the layers' sparsities
    """

    m: float
    lmbda: float

    def sparsities(
        self,
        mean: float,
        model: PreTrainedModel,
        layers: Sequence[DecoderLayer],
        data: Iterable[dict[str, Any]],
        ranks: Ranks = ALONE,
    ) -> dict[str, float]:
        """
        Choose the sparsity of each layer.

        :param mean: the mean of the sparsities
        :param model: the dense model; it is run once over the data
        :param layers: decoder layers that are to be pruned
        :param data: calibration batches
        :param ranks: the processes of the run, each with batches of its own
        :return: the sparsity of each layer, by its name
        :raises ValueError: if the layers do not differ, or a sparsity is outside [0, 1)
        """
        operators = {
            layer.name: operators_in(layer.module, layer.name) for layer in layers
        }
        logger.info(f"OWL: running the dense model for {len(layers)} sparsities")
        norms = _input_norms(
            model, [one for group in operators.values() for one in group], data, ranks
        )
        shares = {
            name: self._share_of_outliers(group, norms)
            for name, group in operators.items()
        }
        sparsities = self._spread(mean, shares)
        for name, sparsity in sparsities.items():
            logger.info(f"OWL: {name} has the sparsity {sparsity}")
            if not 0 <= sparsity < 1:
                raise ValueError(
                    f"owl_lmbda {self.lmbda} around sparsity {mean} gives {name} the "
                    f"sparsity {sparsity}, outside [0, 1): choose a smaller owl_lmbda"
                )
        return sparsities

    def _spread(self, mean: float, shares: dict[str, float]) -> dict[str, float]:
        """
        Map the layers' shares of outliers to sparsities, in an interval of length 2λ
        around the mean. The layer with the most outliers gets the lowest sparsity.

        :raises ValueError: if all shares are the same
        """
        least, most = min(shares.values()), max(shares.values())
        if least == most:
            raise ValueError(
                f"sparsity_profile: owl finds the same share of outliers, {least}, in "
                f"all {len(shares)} layers: choose another owl_m, or leave it out"
            )
        scale = 2 * self.lmbda / (most - least)
        middle = fmean(shares.values())
        return {
            name: round(mean - scale * (share - middle), DIGITS)
            for name, share in shares.items()
        }

    def _share_of_outliers(
        self, operators: Sequence[Operator], norms: dict[Operator, Tensor]
    ) -> float:
        def scores(operator: Operator) -> Tensor:
            weight = operator.weight
            return weight.abs() * norms[operator].to(weight.device)

        entries = sum(math.prod(operator.shape) for operator in operators)
        sums = (float(scores(one).sum(dtype=torch.float64)) for one in operators)
        threshold = self.m * math.fsum(sums) / entries
        outliers = sum(int((scores(one) > threshold).sum()) for one in operators)
        return outliers / entries


def _input_norms(
    model: PreTrainedModel,
    operators: Sequence[Operator],
    data: Iterable[dict[str, Any]],
    ranks: Ranks,
) -> dict[Operator, Tensor]:
    """
    Return, for each feature of an operator's inputs, the sum over batches of its norm
    in a batch. The toolkit's sums are these divided by 128; nothing depends on that.
    """
    norms = {one: torch.zeros(one.shape[1], dtype=torch.float32) for one in operators}

    def add(
        operator: Operator, _module: torch.nn.Module, args: tuple[Tensor, ...]
    ) -> None:
        square = args[0].detach().float().flatten(0, -2).square().sum(0)
        norms[operator] += square.sqrt().cpu()

    handles = [
        operator.module.register_forward_pre_hook(partial(add, operator))
        for operator in operators
    ]
    # the pipeline does so later, and the whole model is to run where layers will
    set_onload_device(model, get_main_device())
    device = get_execution_device(model)
    try:
        with forward_context(model), HooksMixin.disable_hooks():
            for batch in data:
                model(**tensors_to_device(batch, device))
    finally:
        for handle in handles:
            handle.remove()
    for norm in norms.values():
        ranks.sum(norm)
    return norms
