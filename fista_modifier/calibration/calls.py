"""What a decoder layer or a part of it was called with, batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from transformers import Cache

from fista_modifier.calibration.activations import MAIN_MEMORY, ActivationStorage
from fista_modifier.calibration.tensors import first_tensor, same_memory
from fista_modifier.distributed import Ranks

__all__ = ["EndOfRun", "LayerCall", "LayerInputs"]


class EndOfRun(Exception):
    """
    The exception with which a hook ends a run once it has seen everything that was
    asked for.
    """


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""


@dataclass(frozen=True)
class LayerCall:
    """
    One batch of a layer's calibration inputs.

    :param layer: the layer
    :param args: positional arguments of its forward, the hidden states first
    :param kwargs: keyword arguments of its forward
    """

    layer: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Tensor:
        """
        Run the layer.

        :return: the layer's output hidden states
        """
        args, kwargs = _own_copy((self.args, self.kwargs))
        return first_tensor(self.layer(*args, **kwargs))

    @property
    def hidden_states(self) -> Tensor:
        """The layer's input, batch×sequence×features."""
        return first_tensor(self.args)

    @property
    def tokens(self) -> int:
        """
        The number of tokens, padding included. A token that has several hidden states
        counts once.
        """
        return self.hidden_states.shape[-3:-1].numel()

    @property
    def context(self) -> list[Tensor]:
        """Other states that the layer is given, such as the encoder's for a decoder."""
        given = tree_leaves((self.args[1:], self.kwargs))
        return [
            one
            for one in given
            if isinstance(one, Tensor) and one.is_floating_point() and one.ndim > 2
        ]

    def is_context(self, value: Tensor) -> bool:
        """
        Say whether an operator is given the context, as for keys and values of
        cross-attention.

        :param value: the input of an operator in the layer
        :return: whether it is one of the states in ``context``
        """
        return any(same_memory(value, one) for one in self.context)


class LayerInputs:
    """
    What a decoder layer was called with, one entry a batch.

    :param layer: the decoder layer, one of its blocks (attention, MLP), or a lone
        operator outside all layers
    :param storage: where tensors wait between the passes
    """

    def __init__(
        self, layer: torch.nn.Module, storage: ActivationStorage = MAIN_MEMORY
    ) -> None:
        self.layer = layer
        self._storage = storage
        self._waiting: list[_WaitingCall] = []
        self._hidden_states: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def clear(self) -> None:
        """Forget all calls."""
        self._waiting = []

    def append(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """
        Remember one call of the layer. Its arguments are put in the order of the
        layer's forward.

        :param args: positional arguments of the call
        :param kwargs: keyword arguments of the call
        :return: its hidden states
        """
        signature = inspect.signature(self.layer.forward)
        bound = signature.bind(*args, **_renamed(signature, args, kwargs))
        call = LayerCall(self.layer, *_own_copy((bound.args, bound.kwargs)))
        self._waiting.append(_WaitingCall.of(call, self._storage))
        return call.hidden_states

    def remember(
        self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """
        Remember one call of the layer. This is a forward pre-hook of the layer, with
        keyword arguments.
        """
        self.append(args, kwargs)

    def __getitem__(self, batch: int) -> LayerCall:
        return self.fetch(batch, lambda call: call)

    def fetch(self, batch: int, cut: Callable[[LayerCall], LayerCall]) -> LayerCall:
        """
        Bring a part of a call to the devices that its tensors came from, and no more.

        :param batch: the number of the batch
        :param cut: cuts the tensors of a call, which are off the device
        :return: the call for that part
        """
        waiting = self._waiting[batch]
        if self._hidden_states is not None:
            waiting = waiting.with_hidden_states(self._hidden_states[batch])
        return waiting.fetched(cut)

    def __iter__(self) -> Iterator[LayerCall]:
        return (self[batch] for batch in range(len(self)))

    def gathered(self, ranks: Ranks, to: int) -> LayerInputs:
        """
        Bring the calls of all ranks together on one of them.

        :param ranks: the ranks, each of which has inputs of the same layer
        :param to: the rank that is to have them
        :return: on that rank, the calls of all ranks, in the order of the ranks; on the
            others, these inputs
        """
        if ranks.size == 1:
            return self
        mine = [
            tree_map_only(Tensor, Tensor.cpu, (call.args, call.kwargs)) for call in self
        ]
        parts = ranks.gather(mine, to)
        if parts is None:
            return self
        device = get_execution_device(self.layer)
        whole = LayerInputs(self.layer, self._storage)
        for args, kwargs in chain(*parts):
            moved = tree_map_only(Tensor, lambda one: one.to(device), (args, kwargs))
            whole.append(*moved)
        return whole

    def of_block(self, block: torch.nn.Module) -> LayerInputs:
        """
        Run the layer as far as one of its blocks, and record what the block is called
        with.

        :param block: a module inside the layer, called once in each run
        :return: the inputs of the block
        """
        inputs = LayerInputs(block, self._storage)
        for call in self:
            inputs.follow(call)
        return inputs

    def follow(self, call: LayerCall) -> None:
        """
        Run a module around this layer as far as the layer, and remember how the layer
        is called. If it is not called, nothing is remembered.

        :param call: a call of the module around the layer
        """

        def watch(*arguments: Any) -> None:
            self.remember(*arguments)
            raise EndOfRun

        with (
            self.layer.register_forward_pre_hook(watch, with_kwargs=True),
            suppress(EndOfRun),
        ):
            call.run()

    def with_hidden_states(self, hidden_states: list[Tensor]) -> LayerInputs:
        """
        Return the same calls with other hidden states.

        :param hidden_states: another input tensor for each batch
        :return: the calls with that tensor in the place of the first argument; all
            other arguments are kept once, for both
        """
        assert len(hidden_states) == len(self), "one for each batch"
        other = copy(self)
        other._hidden_states = hidden_states
        return other


@dataclass(frozen=True)
class _WaitingCall:
    """
    A call whose tensors wait off the device.

    :param call: the call, with tensors on the CPU
    :param devices: the device that each of its arguments came from, in the same
        containers; None for what is no tensor
    """

    call: LayerCall
    devices: Arguments

    @classmethod
    def of(cls, call: LayerCall, storage: ActivationStorage) -> _WaitingCall:
        """Bring the tensors of a call off the device."""
        arguments = call.args, call.kwargs
        devices = tree_map(lambda one: getattr(one, "device", None), arguments)
        kept = tree_map_only(Tensor, storage.keep, arguments)
        return cls(LayerCall(call.layer, *kept), devices)

    def with_hidden_states(self, hidden_states: Tensor) -> _WaitingCall:
        """Return the same call with another first argument, off the device."""
        args = (hidden_states, *self.call.args[1:])
        return replace(self, call=replace(self.call, args=args))

    def fetched(self, cut: Callable[[LayerCall], LayerCall]) -> LayerCall:
        """Bring a part of the call to the devices that its tensors came from."""

        def fetch(value: Any, device: torch.device | None) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        part = cut(self.call)
        return LayerCall(
            part.layer, *tree_map(fetch, (part.args, part.kwargs), self.devices)
        )


def _renamed(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """
    Return keyword arguments in which the first argument has the name that the layer's
    forward gives it. Some layers are called with an older name of it (Mllama).
    """
    first = next(iter(signature.parameters))
    unknown = [name for name in kwargs if name not in signature.parameters]
    if args or first in kwargs or not unknown:
        return kwargs
    old, *_ = unknown
    return {first if name == old else name: value for name, value in kwargs.items()}


def _own_copy(values: Arguments) -> Arguments:
    """
    Copy the containers of a call's arguments, and not the tensors, because a layer may
    write into a dictionary that it is given, for layers behind it. A cache of keys and
    values, which each run would add to, is replaced by None: a run has all of its
    tokens.
    """

    def is_cache(value: Any) -> bool:
        return isinstance(value, Cache)

    copied: Arguments = tree_map(
        lambda value: None if is_cache(value) else value, values, is_leaf=is_cache
    )
    return copied
