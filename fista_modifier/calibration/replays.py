"""The runs that show what the stages of a layer are given, dense and partly pruned."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from fista_modifier.calibration.calls import LayerInputs
from fista_modifier.calibration.recording import Recording
from fista_modifier.calibration.stages import Stage, waves
from fista_modifier.models.operators import UNCHANGED, Operator, replaced_weights

__all__ = ["Replays", "replays_of"]


@dataclass(frozen=True)
class Replays:
    """
    The runs of a layer, or of one of its blocks, that show X and X* of some stages.

    :param dense: what the layer or block is called with in the dense model, for X
    :param pruned: what it is called with in the model pruned so far, for X*
    :param weights: weights of the operators that are pruned already, out×in in the
        model's dtype; the runs for X* use them
    :param differ: whether X* may differ from X; otherwise one run shows both
    :param outputs: outputs of the only operator of the stages in the dense model, one
        tensor a batch, from which drift is summed in place of X; None if X must be run
    :param biases: biases of the operators that have got another bias; the runs for X*
        use them
    """

    dense: LayerInputs
    pruned: LayerInputs
    weights: Mapping[Operator, Tensor]
    differ: bool
    outputs: Sequence[Tensor] | None = None
    biases: Mapping[Operator, Tensor] = field(default_factory=dict)

    def of_dense(self) -> Replays:
        """Return runs in which X* is X."""
        return Replays(self.dense, self.dense, {}, False)


def replays_of(
    stages: Sequence[Stage],
    recording: Recording,
    pruned_inputs: LayerInputs | None,
    pruned: Mapping[Operator, Tensor],
    biases: Mapping[Operator, Tensor] = UNCHANGED,
) -> Iterator[tuple[list[Stage], Replays]]:
    """
    Yield the stages of each wave, block by block, with the smallest runs that show
    their inputs. The inputs of a block in the partly pruned layer are kept from wave to
    wave, until an operator before the block is pruned that they depend on.

    A block that routes its tokens (a mixture of experts) is always run from its inputs
    in the dense model. From those of the pruned model, other experts would get the
    tokens, and X and X* would be those of different tokens. Inside an expert, X* still
    follows from what was pruned before.

    What a block was called with is forgotten when its last wave is done.

    :param stages: stages of the layer
    :param recording: recording of the dense layer
    :param pruned_inputs: what the layer is called with for X*; None if it is called as
        for X
    :param pruned: weights of what is pruned already; the caller adds to them between
        the steps, or leaves them empty if X* does not depend on them
    :param biases: biases of what is pruned already, if they changed
    :return: the stages of one wave in one block, and their runs
    """
    layer = recording.inputs.layer
    groups = [
        (block, list(group))
        for wave in waves(stages)
        for block, group in groupby(wave, recording.block_of)
    ]
    left = Counter(block for block, _ in groups)
    routing = {block for block, group in groups if any(one.routed for one in group)}
    before = _operators_before(groups)
    of_block: dict[torch.nn.Module, tuple[int, LayerInputs]] = {}
    of_layer = recording.inputs if pruned_inputs is None else pruned_inputs
    for block, group in groups:
        dense = recording.inputs_of(block)
        inside = block is not layer
        inputs = of_layer
        if any(one.routed for one in group) or (inside and block in routing):
            inputs = dense
        elif not pruned and pruned_inputs is None:
            inputs = dense
        elif inside and (left[block] > 1 or block in of_block):
            done = sum(operator.name in before[block] for operator in pruned)
            if of_block.get(block, (-1,))[0] != done:
                with replaced_weights(pruned, biases):
                    inputs = of_layer.of_block(block)
                of_block[block] = done, inputs
            inputs = of_block[block][1]
        yield group, _replays(group, recording, dense, inputs, pruned, biases)
        left[block] -= 1
        if not left[block] and inside:
            for used in (dense, inputs):
                if used is not of_layer:
                    used.clear()


def _replays(
    group: Sequence[Stage],
    recording: Recording,
    dense: LayerInputs,
    pruned: LayerInputs,
    weights: Mapping[Operator, Tensor],
    biases: Mapping[Operator, Tensor],
) -> Replays:
    modules = set(dense.layer.modules())
    disturbed = any(operator.module in modules for operator in weights)
    differ = pruned is not dense or disturbed
    outputs = recording.take_outputs(group[0]) if len(group) == 1 else None
    if not (differ and group[0].operators[0].narrows):
        outputs = None
    return Replays(dense, pruned, weights, differ, outputs, biases)


def _operators_before(
    groups: Sequence[tuple[torch.nn.Module, list[Stage]]],
) -> dict[torch.nn.Module, set[str]]:
    """
    Return, for each block, the names of the operators outside it on which its stages
    depend.
    """
    inside: defaultdict[torch.nn.Module, set[str]] = defaultdict(set)
    follows: defaultdict[torch.nn.Module, set[str]] = defaultdict(set)
    for block, group in groups:
        for stage in group:
            inside[block] |= {operator.name for operator in stage.operators}
            follows[block] |= stage.follows
    return {block: follows[block] - inside[block] for block in follows}
