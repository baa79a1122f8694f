"""The record of what a dense layer does in the toolkit's own pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from copy import copy
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from fista_modifier.calibration.activations import MAIN_MEMORY, ActivationStorage
from fista_modifier.calibration.calls import LayerInputs
from fista_modifier.calibration.padding import RealTokens
from fista_modifier.calibration.stages import Stage
from fista_modifier.calibration.sums import SumsInPass
from fista_modifier.calibration.tensors import first_tensor
from fista_modifier.distributed import Ranks
from fista_modifier.models.operators import Operator, blocks_of

__all__ = ["Hook", "Recorded", "Recording"]

Hook = tuple[torch.nn.Module, Callable[..., None], Literal["forward_pre", "forward"]]


@dataclass(frozen=True)
class Recorded:
    """
    What is recorded of a dense layer, beside what it is called with.

    :param outputs: whether to record what the layer returns
    :param block_outputs: whether to record what its blocks return
    :param sums: operators over whose inputs the pass itself sums, where it can, so that
        no replay is needed for them; their X* is X, and they read no context
    """

    outputs: bool = False
    block_outputs: bool = False
    sums: Sequence[Operator] = ()


class Recording:
    """
    What a decoder layer and its blocks are called with and return in the toolkit's
    pass.

    A block is a child of the layer with operators in it (attention, MLP). A replay of a
    stage needs no more than the stage's own block. For the first block the layer's
    input does as well, so that the block's own input is not kept. Where a block returns
    the output of an operator, the dense layer need not be replayed for that operator at
    all.

    ``real_tokens`` says for each batch which tokens are not padding. ``tokens`` is the
    number of these tokens, and ``storage`` is where tensors wait.

    For each token, a recording holds a hidden state for the layer's input, one for its
    output, one for the output of each block, and one for the input of each block but
    the first.

    :param layer: the decoder layer, or a lone operator outside all of them
    :param operators: operators of the layer
    :param wanted: what is recorded beside what the layer is called with
    :param storage: where tensors wait between the passes
    :param padding: given the layer's hidden states in the batch that runs now, says
        which of its tokens are real
    :param others_sum: says whether another layer has sums that its pass took
    :param offload: whether to keep the n×n matrices of sums in main memory
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        operators: Sequence[Operator],
        wanted: Recorded = Recorded(),
        storage: ActivationStorage = MAIN_MEMORY,
        padding: Callable[[Tensor], RealTokens] = lambda _: RealTokens(),
        others_sum: Callable[[], bool] = lambda: False,
        offload: bool = False,
    ) -> None:
        self.inputs = LayerInputs(layer, storage)
        self.outputs: list[Tensor] = []
        self.real_tokens: list[RealTokens] = []
        self.tokens = 0
        self._padding = padding
        self._with_outputs = wanted.outputs
        self.sums = SumsInPass(wanted.sums, offload, others_sum)
        blocks = blocks_of(layer, operators)
        self._blocks = {block: LayerInputs(block, storage) for block in blocks}
        # the block that runs first, and whether the layer has only just been entered
        self._first: torch.nn.Module | None = None
        self._entered = False
        self._block_outputs: dict[torch.nn.Module, list[Tensor]] = {
            block: []
            for block, inside in blocks.items()
            if wanted.block_outputs and any(one.narrows for one in inside)
        }
        self.storage = storage

    def hooks(self) -> Iterator[Hook]:
        """
        Yield the hooks that record the layer.

        :return: module, hook and kind of hook for all that is to be recorded; hooks
            before a forward take keyword arguments
        """
        yield self.inputs.layer, self._remember, "forward_pre"
        for block in self._blocks:
            yield block, self._remember_block, "forward_pre"
        for block, outputs in self._block_outputs.items():
            yield block, self._append_to(outputs, copied=True), "forward"
        for module, add in self.sums.hooks(lambda: self.real_tokens[-1]):
            yield module, add, "forward_pre"
        if self._with_outputs:
            yield self.inputs.layer, self._append_to(self.outputs), "forward"
        elif self.storage.folder is not None:
            yield self.inputs.layer, self._move_to_disk, "forward"

    def _remember(
        self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        hidden_states = self.inputs.append(args, kwargs)
        real = self._padding(hidden_states)
        self.real_tokens.append(real)
        all_tokens = hidden_states.shape[-3:-1].numel()
        self.tokens += all_tokens if real.own is None else int(real.own.sum())
        self._entered = True
        self.sums.start()

    def _remember_block(
        self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """
        Remember what a block is called with, unless it runs first. Blocks need not run
        in the order in which they are registered.
        """
        if self._entered and self._first is None:
            self._first = block
        self._entered = False
        if block is not self._first:
            self._blocks[block].append(args, kwargs)

    def _append_to(
        self, outputs: list[Tensor], *, copied: bool = False
    ) -> Callable[..., None]:
        """
        Return a hook that appends a module's output to a list. It appends a copy if
        later modules may add to the output in place, as Falcon's do.
        """

        def append(_module: torch.nn.Module, _args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            outputs.append(self.storage.keep(tensor.clone() if copied else tensor))

        return append

    def _move_to_disk(self, _module: torch.nn.Module, _args: Any, output: Any) -> None:
        """
        Move the layer's output to disk. The toolkit keeps this output for the next
        layer, and finds it there.
        """
        self.storage.keep(first_tensor(output))

    def gathered(self, ranks: Ranks, to: int) -> Recording:
        """
        Bring the recordings of all ranks together on one of them.

        :param ranks: the ranks, each of which recorded the same layer, with batches of
            its own
        :param to: the rank that is to have all of it
        :return: on that rank, one recording of all batches in the order of the ranks;
            on the others, this recording
        """
        if ranks.size == 1:
            return self
        whole = copy(self)
        whole.inputs = self.inputs.gathered(ranks, to)
        whole._blocks = {
            block: inputs.gathered(ranks, to) for block, inputs in self._blocks.items()
        }
        parts = ranks.gather(self.real_tokens, to)
        whole.real_tokens = self.real_tokens if parts is None else list(chain(*parts))
        whole.outputs = _gathered(self.outputs, ranks, to)
        whole._block_outputs = {
            block: _gathered(outputs, ranks, to)
            for block, outputs in self._block_outputs.items()
        }
        return whole

    def block_of(self, stage: Stage) -> torch.nn.Module:
        """
        Return the module that must run to show a stage's inputs.

        :param stage: a stage of the layer
        :return: the block that the stage is in, or the layer if there is no such block
        """
        block = self._around(stage, self._blocks)
        return self.inputs.layer if block is None else block

    def inputs_of(self, block: torch.nn.Module) -> LayerInputs:
        """
        Return what a block was called with.

        :param block: a block of the layer, or the layer itself
        :return: its inputs
        """
        return self._blocks.get(block, self.inputs)

    def take_outputs(self, stage: Stage) -> list[Tensor] | None:
        """
        Return the recorded outputs of a stage's operator, and keep them no longer.

        :param stage: a stage of the layer
        :return: the outputs, one tensor a batch; None if they were not recorded
        """
        block = self._around(stage, self._block_outputs) if stage.returned else None
        if block is None:
            return None
        outputs = self._block_outputs[block]
        taken = list(outputs)
        outputs.clear()
        return taken

    def _around(
        self, stage: Stage, recorded: Mapping[torch.nn.Module, Sized]
    ) -> torch.nn.Module | None:
        """
        Return the block that a stage is in, if it was recorded once a batch; otherwise
        None.
        """
        module = stage.operators[0].module
        for block, batches in recorded.items():
            if len(batches) == len(self.inputs) and module in block.modules():
                return block
        return None


def _gathered(outputs: list[Tensor], ranks: Ranks, to: int) -> list[Tensor]:
    """
    Bring the tensors of all ranks together on one of them; return the rank's own on
    others.
    """
    parts = ranks.gather([output.cpu() for output in outputs], to)
    return outputs if parts is None else list(chain(*parts))
