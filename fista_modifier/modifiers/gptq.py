"""GPTQ that keeps pruned weights zero and lets kept ones make up for the rounding."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.utils import patch_attr
from llmcompressor.modifiers.gptq import GPTQModifier, gptq_quantize
from llmcompressor.modifiers.gptq import base as gptq
from llmcompressor.modifiers.gptq.helpers import column_scale_window
from torch import Tensor

from fista_modifier.distributed import current_ranks

__all__ = ["MaskedGPTQModifier", "quantize_kept"]


class MaskedGPTQModifier(GPTQModifier):  # type: ignore[misc]
    """
    The toolkit's ``GPTQModifier``, with all of its fields, for a model that was pruned
    before. Weights that are zero stay zero, while the toolkit 0.13 and later lets
    GPTQ's updates fill them in. The error of keeping a weight at zero is passed on to
    the columns behind it, like that of rounding one, as SparseGPT does (Frantar &
    Alistarh, 2023, section 3.5).

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        FISTAPruningModifier:
          mask_structure: "2:4"
          ignore: ["re:.*lm_head"]
    quantization_stage:
      quantization_modifiers:
        MaskedGPTQModifier:
          targets: ["Linear"]
          scheme: W8A8
          ignore: ["re:.*lm_head"]
    ```

    The lifecycle is that of ``GPTQModifier``.
    """

    def compress_modules(self) -> None:
        """Quantise the modules that have been calibrated; ranks share them out."""
        super().compress_modules()
        current_ranks().wait()  # they share the weights that the next layer runs with

    def compress_module_list(self, module_list: list[torch.nn.Module]) -> None:
        """
        Quantise modules that have been calibrated.

        :param module_list: the modules
        """
        with patch_attr(gptq, "quantize_weight", quantize_kept):
            super().compress_module_list(module_list)


def quantize_kept(
    weights: Tensor,
    hessians: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    global_scale: Tensor | None,
    quant_args: QuantizationArgs,
    blocksize: int = 128,
    percdamp: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Quantise the non-zero entries of weights by the toolkit's ``quantize_weight``. The
    scales are spread out to one for each entry. The scale of a pruned entry is so large
    that the entry can only be rounded to zero, whatever the updates of other columns
    made of it.

    :param weights: batch×m×n; zeros are pruned
    :param hessians: batch×n×n
    :param scale: scales in the layout of ``quant_args.strategy``, batch first
    :param zero_point: zero points in the same layout
    :param global_scale: global scale of each weight of the batch, or None
    :param quant_args: how to quantise
    :param blocksize: columns whose updates are gathered
    :param percdamp: damping, as a fraction of the mean of the Hessian's diagonal
    :return: weights rounded to the grid, batch×m×n, zero where they were zero; the loss
        of each weight; and which of them fell back to rounding to nearest
    """
    pruned = weights == 0
    rows, columns = weights.shape[1:]
    each, each_zero_point = column_scale_window(
        scale,
        zero_point,
        global_scale,
        _groups(quant_args, columns, scale.device).expand(len(weights), -1),
        quant_args,
        rows,
        0,
        columns,
    )
    shape = pruned.shape
    huge = torch.finfo(each.dtype).max
    each = each.expand(shape).masked_fill(pruned.to(each.device), huge)
    if each_zero_point is None:
        each_zero_point = torch.zeros_like(each, dtype=zero_point.dtype)
    quantized, losses, fell_back = gptq_quantize.quantize_weight(
        weights,
        hessians,
        scale=each,
        zero_point=each_zero_point.expand(shape).contiguous(),
        global_scale=None,
        quant_args=quant_args.model_copy(
            update={"strategy": QuantizationStrategy.GROUP, "group_size": 1}
        ),
        blocksize=blocksize,
        percdamp=percdamp,
    )
    return quantized.masked_fill(pruned, 0), losses, fell_back


def _groups(quant_args: QuantizationArgs, columns: int, device: torch.device) -> Tensor:
    """Return the number of each column's group, n entries."""
    size = columns
    if quant_args.strategy == QuantizationStrategy.BLOCK:
        size = quant_args.block_structure[1]
    elif quant_args.group_size and quant_args.group_size > 0:
        size = quant_args.group_size
    return torch.arange(columns, device=device) // size
