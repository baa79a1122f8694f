"""The operators that share an input, and which of them must be pruned before others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from fista_modifier.calibration.calls import LayerCall
from fista_modifier.calibration.tensors import first_tensor, same_memory
from fista_modifier.distributed import Ranks
from fista_modifier.models.operators import Operator, blocks_of, trainable

__all__ = ["Stage", "agreed", "find_stages", "used_without_a_call", "waves"]


@dataclass
class Stage:
    """
    Operators that are given the same tensor, such as q/k/v or gate/up: they share all
    Gram matrices, and none of them can disturb the input of another.

    :param operators: the operators, in the order of their calls
    :param calls: how often they are called in one run of the layer
    :param wave: 0 if their input depends on no other operator of the layer, otherwise
        one more than the highest wave of the operators whose output it depends on
    :param follows: names of the operators whose output their input depends on, also
        through others; the producers whose channels it is made of directly are those of
        the channel groups (``channels/groups.py``)
    :param routed: whether they are given only some of the tokens, as an expert is
    :param returned: whether there is one operator, called once, whose output is what
        its block (a child of the layer, such as the MLP) returns
    """

    operators: list[Operator]
    calls: int = 1
    wave: int = 0
    follows: frozenset[str] = frozenset()
    routed: bool = False
    returned: bool = False

    @property
    def names(self) -> str:
        """Names of the operators, for messages."""
        return ", ".join(operator.name for operator in self.operators)


def waves(stages: Sequence[Stage]) -> Iterator[list[Stage]]:
    """
    Yield stages that can be pruned at the same time, wave by wave. Such stages are the
    gate and up projections of all experts of a mixture: none of them can disturb the
    input of another.

    :param stages: stages of one layer
    :return: the stages of each wave
    """
    for _, wave in groupby(
        sorted(stages, key=lambda stage: stage.wave), key=lambda stage: stage.wave
    ):
        yield list(wave)


def find_stages(
    operators: Sequence[Operator], calls: Iterable[LayerCall]
) -> list[Stage]:
    """
    Find the stages of a layer by watching it run. No names are needed: a stage is what
    receives one and the same tensor, and autograd's graph of the run says whose output
    that tensor depends on. One batch is enough, unless some operators (experts of a
    mixture) have not been given a token by then.

    :param operators: operators of one decoder layer
    :param calls: batches to watch, until all operators have been seen
    :return: stages in the order of execution; operators that no token reaches are in
        none of them
    """
    stages: list[Stage] = []
    unseen = list(operators)
    for call in calls:
        seen: set[Operator] = set()
        for stage in _Watched(operators, call).stages():
            seen.update(stage.operators)
            stage.operators = [one for one in stage.operators if one in unseen]
            if stage.operators:
                stages.append(stage)
        unseen = [operator for operator in unseen if operator not in seen]
        if not unseen:
            break
    return stages


def agreed(
    stages: Sequence[Stage], operators: Sequence[Operator], ranks: Ranks
) -> list[Stage]:
    """
    Agree on the stages of a layer with all ranks.

    :param stages: stages that this rank found in its batches
    :param operators: operators of the layer
    :param ranks: the ranks, which may have found other stages, as experts get different
        tokens
    :return: the stages of all ranks, the same on each
    """
    if ranks.size == 1:
        return list(stages)
    left = {operator.name: operator for operator in operators}
    described = [
        ([operator.name for operator in stage.operators], replace(stage, operators=[]))
        for stage in stages
    ]
    common: list[Stage] = []
    for names, stage in chain(*ranks.all(described)):
        new = [left.pop(name) for name in names if name in left]
        if new:
            common.append(replace(stage, operators=new))
    return common


@dataclass
class _Inputs:
    """
    The inputs of one operator in a run of its layer.

    :param tensors: the input at each call; the tensors are kept, so that no address
        recurs
    :param origins: what autograd says they were computed by
    """

    tensors: list[Tensor] = field(default_factory=list)
    origins: list[Node | None] = field(default_factory=list)


class _Watched:
    """
    A run of a layer with what its operators were given and returned.

    :param operators: operators of the layer
    :param call: the call of the layer that is run
    """

    def __init__(self, operators: Sequence[Operator], call: LayerCall) -> None:
        self.operators = operators
        self.call = call
        self.inputs: defaultdict[Operator, _Inputs] = defaultdict(_Inputs)
        """In the order of execution, without operators that were given no token."""
        self.outputs: defaultdict[Operator, list[Tensor]] = defaultdict(list)
        self.returned: list[Tensor] = []
        """What the blocks of the layer returned."""
        with ExitStack() as hooks:
            hooks.enter_context(trainable(call.layer, operators))
            hooks.enter_context(torch.enable_grad())
            for operator in operators:
                for handle in self._hooked(operator):
                    hooks.enter_context(handle)
            for block in blocks_of(call.layer, operators):
                hooks.enter_context(
                    block.register_forward_hook(
                        lambda _module, _args, output: self.returned.append(
                            first_tensor(output)
                        )
                    )
                )
            self.output = call.run()

    def _hooked(self, operator: Operator) -> Iterator[RemovableHandle]:
        def before(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            if args[0].numel():  # an expert may be called without a token
                self.inputs[operator].tensors.append(args[0])
                self.inputs[operator].origins.append(args[0].grad_fn)

        yield operator.module.register_forward_pre_hook(before)
        yield operator.module.register_forward_hook(
            lambda _module, _args, output: self.outputs[operator].append(output)
        )

    def stages(self) -> list[Stage]:
        """
        Return the stages that the run shows.

        :return: stages in the order of execution
        """
        stages: list[Stage] = []
        for operator, inputs in self.inputs.items():
            for stage in stages:
                first = self.inputs[stage.operators[0]]
                if _same(first.tensors, inputs.tensors):
                    stage.operators.append(operator)
                    break
            else:
                stages.append(self._opened_by(operator, stages))
        self._mark_routed(stages)
        for stage in stages:
            if len(stage.operators) == 1:
                outputs = self.outputs[stage.operators[0]]
                stage.returned = any(_same([one], outputs) for one in self.returned)
        return stages

    def _opened_by(self, operator: Operator, stages: Sequence[Stage]) -> Stage:
        """Return the stage of an operator that has the input of none before it."""
        inputs = self.inputs[operator]
        wave_of = {one: stage.wave for stage in stages for one in stage.operators}
        # what is called again later depends on operators that come after it
        before = [
            source
            for source in sources(inputs.origins, self.operators)
            if source in wave_of
        ]
        wave = 1 + max((wave_of[one] for one in before), default=-1)
        if not self.output.requires_grad:
            # the layer keeps autograd out, so the stages follow one another
            before = list(wave_of)
            wave = len(stages)
        follows = frozenset(one.name for one in before)
        return Stage([operator], len(inputs.tensors), wave, follows)

    def _mark_routed(self, stages: Sequence[Stage]) -> None:
        # neighbouring tokens may be joined, as at the end of a vision tower
        sizes = {self.call.hidden_states.numel()}
        for stage in stages:
            value = self.inputs[stage.operators[0]].tensors[0]
            stage.routed = _is_choice(value, self.call) and value.numel() not in sizes
            if not stage.routed:
                sizes.add(value.numel())


def _is_choice(value: Tensor, call: LayerCall) -> bool:
    """
    Say whether an operator is given only some of the tokens that the layer is given.
    """
    # a layer may be given several hidden states of each token, and context
    width = value.shape[-1]
    whole = {call.tokens, call.hidden_states.shape[:-1].numel()} | {
        one.shape[:-1].numel() for one in call.context if one.shape[-1] == width
    }
    return value.shape[:-1].numel() not in whole


def used_without_a_call(
    operators: Sequence[Operator], call: LayerCall
) -> list[Operator]:
    """
    Find the operators that are not called, but whose weights another module reads.

    :param operators: operators that are given no token when the layer runs
    :param call: a call of the layer
    :return: the operators that were found
    """
    called: set[torch.nn.Module] = set()
    with ExitStack() as hooks:
        hooks.enter_context(trainable(call.layer, operators))
        hooks.enter_context(torch.enable_grad())
        for operator in operators:
            hooks.enter_context(
                operator.module.register_forward_pre_hook(
                    lambda module, _args: called.add(module)
                )
            )
        output = call.run()
    found = set(sources([output.grad_fn], operators))
    return [one for one in operators if one in found and one.module not in called]


def sources(
    origins: Iterable[Node | None], operators: Sequence[Operator]
) -> Iterator[Operator]:
    """
    Yield the operators on whose weights some tensors depend.

    :param origins: what autograd says these tensors were computed by
    :param operators: operators of the layer
    :return: the operators
    """
    of_weight = {id(operator.module.weight): operator for operator in operators}
    nodes = [origin for origin in origins if origin is not None]
    visited = set(nodes)
    while nodes:
        node = nodes.pop()
        source = of_weight.get(id(getattr(node, "variable", None)))
        if source is not None:
            yield source
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                nodes.append(following)


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Say whether two operators were called with the same memory, every time."""
    return len(one) == len(other) and all(map(same_memory, one, other))
