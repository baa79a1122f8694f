"""What a dense layer does in the toolkit's own pass, so that it need not run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from fista_modifier.calibration.operators import Operator
from fista_modifier.calibration.replay import LayerInputs, first_tensor
from fista_modifier.calibration.stages import Stage
from fista_modifier.distributed import Ranks

__all__ = ["Recording"]

Hook = tuple[torch.nn.Module, Callable[..., None], Literal["forward_pre", "forward"]]


class Recording:
    """
    What a decoder layer and its blocks are called with, and what the layer returns. A
    block is a direct child with operators in it (attention, MLP). Replays of a stage
    need no more than the stage's own block; for the first block the layer's input does
    as well, and its own is not kept.

    Per token this holds the hidden state once for the layer, once for each block but
    the first, and once for the output, on the offload device.

    :param layer: the decoder layer, or a lone operator outside all of them
    :param operators: its operators
    :param offload_device: where tensors wait between the passes
    :param with_outputs: whether to record what the layer returns
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        operators: Sequence[Operator],
        offload_device: torch.device,
        *,
        with_outputs: bool,
    ) -> None:
        self.inputs = LayerInputs(layer, offload_device)
        self.outputs: list[Tensor] = []
        self._with_outputs = with_outputs
        modules = {operator.module for operator in operators}
        blocks = [child for child in layer.children() if modules & set(child.modules())]
        self._blocks = {
            block: LayerInputs(block, offload_device) for block in blocks[1:]
        }
        self._offload_device = offload_device

    def hooks(self) -> Iterator[Hook]:
        """
        :return: module, hook and kind of hook for all that is to be recorded; those
            before a forward take keyword arguments
        """
        for inputs in (self.inputs, *self._blocks.values()):
            yield inputs.layer, inputs.remember, "forward_pre"
        if self._with_outputs:
            yield self.inputs.layer, self._append_output, "forward"

    def _append_output(self, _module: torch.nn.Module, _args: Any, output: Any) -> None:
        self.outputs.append(first_tensor(output).to(self._offload_device))

    @cached_property
    def real_tokens(self) -> list[Tensor | None]:
        """of each batch, what is not padding; to be asked when all are recorded"""
        return [call.real_tokens() for call in self.inputs]

    def gathered(self, ranks: Ranks, to: int) -> Recording:
        """
        :param ranks: that each recorded the same layer, with batches of their own
        :param to: the rank that is to have all of it
        :return: there, one recording of all batches in the order of the ranks;
            elsewhere this one
        """
        if ranks.size == 1:
            return self
        whole = copy(self)
        whole.__dict__.pop("real_tokens", None)  # those of this rank's batches
        whole.inputs = self.inputs.gathered(ranks, to)
        whole._blocks = {
            block: inputs.gathered(ranks, to) for block, inputs in self._blocks.items()
        }
        outputs = ranks.gather([output.cpu() for output in self.outputs], to)
        whole.outputs = self.outputs if outputs is None else list(chain(*outputs))
        return whole

    def of_stage(self, stage: Stage) -> LayerInputs:
        """
        :param stage: a stage of the layer
        :return: the inputs of the block that it is in, or of the layer: what to run,
            and with what, to see the stage's inputs
        """
        module = stage.operators[0].module
        for block, inputs in self._blocks.items():
            called_once_a_batch = len(inputs) == len(self.inputs)
            if called_once_a_batch and module in block.modules():
                return inputs
        return self.inputs
