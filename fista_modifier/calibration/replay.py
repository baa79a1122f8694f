"""
What a decoder layer or a part of it was called with, and runs of it over these calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from compressed_tensors.offload import (
    disable_offloading,
    disable_onloading,
    get_execution_device,
)
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe import context as moe
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.utils.helpers import calibration_forward_context
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from transformers import Cache, PreTrainedModel

from fista_modifier.calibration.activations import MAIN_MEMORY, ActivationStorage
from fista_modifier.distributed import Ranks
from fista_modifier.models.experts import routing_real_tokens

__all__ = [
    "EndOfRun",
    "LayerCall",
    "LayerInputs",
    "RealTokens",
    "calibration_runs",
    "first_tensor",
    "forward_context",
    "inputs_of",
    "outputs_of_parts",
    "plain_forward",
    "real_inputs_of",
    "real_rows",
    "same_memory",
    "same_output",
]


ROUNDING = 1e-4
"""
The relative difference up to which two outputs of a module in float32 count as the
same. Kernels differ by no more, because they add in different orders.
"""
ROUNDINGS = 4
"""
The same in 16 bits, in units of the dtype's precision. Attention rounds the scores, the
probabilities and the result, and kernels do so in different places. In layers of
SmolLM2-135M in bfloat16 they differ by 0.3 to 1.0 of this unit.
"""


@contextmanager
def calibration_runs(model: PreTrainedModel) -> Iterator[None]:
    """
    Prepare for runs of a layer outside the toolkit's own passes: no gradients, no KV
    cache, evaluation mode, eager attention (unless
    :class:`~fista_modifier.calibration.attention.FusedAttention` sets another), weights
    that stay onloaded, no hooks of other modifiers, weights and inputs that are not
    rounded for a quantisation to come, and experts that see only the tokens that are
    routed to them. This is the context of every such run.

    :param model: the model being calibrated
    """
    with (
        forward_context(model),
        disable_offloading(),
        plain_forward(model),
    ):
        yield


@contextmanager
def forward_context(model: PreTrainedModel) -> Iterator[None]:
    """
    Enter the toolkit's context of calibration. It asks for the shape of the output
    embedding by way of a copy on the device, where the copy would stay as long as
    layers are onloaded.

    :param model: the model being calibrated
    """
    with ExitStack() as stack:
        with disable_onloading():
            stack.enter_context(calibration_forward_context(model))
        yield


@contextmanager
def plain_forward(model: PreTrainedModel) -> Iterator[None]:
    """
    Let a model compute what it computes outside the toolkit: no hooks of modifiers, no
    rounding for a quantisation to come, and experts that see only the tokens that are
    routed to them.

    :param model: the model being calibrated
    """
    with ExitStack() as stack:
        stack.enter_context(HooksMixin.disable_hooks())
        # The toolkit enables a quantisation to come after each modifier's pass, though
        # its scales are not known yet.
        for module in model.modules():
            if getattr(module, "quantization_enabled", False):
                stack.enter_context(patch_attr(module, "quantization_enabled", False))
        # oneshot may let all experts of a mixture see all tokens in its own passes
        stack.enter_context(patch_attr(moe, "_CALIBRATE_ALL_EXPERTS", False))
        yield


class EndOfRun(Exception):
    """
    The exception with which a hook ends a run once it has seen everything that was
    asked for.
    """


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


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""


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


@dataclass(frozen=True)
class RealTokens:
    """
    The tokens of one batch that are not padding, bool batch×sequence; None if all are.

    :param own: those of the layer's input
    :param context: those of other states that the layer is given, such as the encoder's
        output in a decoder
    """

    own: Tensor | None = None
    context: Tensor | None = None

    def rows(
        self, value: Tensor, call: LayerCall, source: Tensor | None = None
    ) -> Tensor:
        """
        Return an operator's input or output for the tokens that are not padding.

        :param value: input or output of an operator, … × features, an entry a token
        :param call: the call of the layer or block in which the operator runs
        :param source: the operator's input, if ``value`` is its output
        :return: real tokens × features
        """
        reads_context = call.is_context(value if source is None else source)
        return real_rows(value, self.context if reads_context else self.own)


def inputs_of(
    calls: Mapping[torch.nn.Module, int], call: LayerCall
) -> dict[torch.nn.Module, list[Tensor]]:
    """
    Run a layer only as far as the inputs of some modules.

    :param calls: the modules, which are the layer or inside it, and how often each is
        called in one run of the layer
    :param call: the call of the layer for one batch
    :return: each module's input at each of its calls
    """
    seen: dict[torch.nn.Module, list[Tensor]] = {module: [] for module in calls}
    missing = sum(calls.values())

    def watch(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal missing
        seen[module].append(args[0])
        missing -= 1
        if not missing:
            raise EndOfRun

    with ExitStack() as stack:
        for module in calls:
            stack.enter_context(module.register_forward_pre_hook(watch))
        stack.enter_context(suppress(EndOfRun))
        call.run()
    return seen


def real_inputs_of(
    calls: Mapping[torch.nn.Module, int], call: LayerCall, real: RealTokens
) -> dict[torch.nn.Module, list[Tensor]]:
    """
    Run a layer as :func:`inputs_of` does, with padding left out everywhere: experts are
    not called with it, and it is in none of the inputs.

    :param calls: the modules, which are the layer or inside it, and how often each is
        called in one run of the layer
    :param call: the call of the layer for one batch
    :param real: what is not padding in the batch
    :return: each module's input at each of its calls, real tokens × features
    """
    with routing_real_tokens(call.layer, real.own):
        seen = inputs_of(calls, call)
    return {
        module: [real.rows(value, call) for value in values]
        for module, values in seen.items()
    }


def outputs_of_parts(call: LayerCall) -> list[Tensor]:
    """
    Run a layer and return the outputs of its parts.

    :param call: a call of the layer
    :return: the output of each of its children, in the order in which they run, and of
        the layer itself
    """
    seen: list[Tensor] = []

    def watch(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        seen.append(first_tensor(output))

    with ExitStack() as stack:
        for child in call.layer.children():
            stack.enter_context(child.register_forward_hook(watch))
        seen.append(call.run())
    return seen


def real_rows(value: Tensor, real: Tensor | None) -> Tensor:
    """
    Return the rows of the tokens that are not padding.

    :param value: … × features, an entry a token
    :param real: which tokens are not padding, batch×sequence; None for all. It is
        ignored for a module that is not given the whole batch (an expert)
    :return: real tokens × features
    """
    if real is not None and value.shape[-3:-1] == real.shape:
        value = value[..., real.to(value.device), :]
    flat = value.reshape(-1, value.shape[-1])
    if real is None or real.numel() != flat.shape[0]:
        return flat
    return flat[real.flatten().to(flat.device)]


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors have the same entries in the same places of memory."""
    return one is other or (
        one.data_ptr() == other.data_ptr() != 0
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def same_output(one: Tensor, other: Tensor) -> bool:
    """
    Say whether two outputs of a module are the same up to rounding.

    :param one: an output of a module
    :param other: its output in another run
    :return: whether they have one shape and differ by no more than kernels do, in the
        dtype of ``other``
    """
    if one.shape != other.shape:
        return False
    tolerance = max(ROUNDING, ROUNDINGS * torch.finfo(other.dtype).eps)
    difference = one.float() - other.float()
    return bool(difference.norm() <= tolerance * other.float().norm())


def first_tensor(value: Any) -> Tensor:
    """
    Return the hidden states among what a layer was given or returned.

    :param value: a tensor, or a tuple with the hidden states first
    :return: the hidden states
    """
    return value if isinstance(value, Tensor) else value[0]
