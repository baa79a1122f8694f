"""Runs of a layer in which modules inside it are observed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

from fista_modifier.calibration.calls import EndOfRun, LayerCall
from fista_modifier.calibration.padding import RealTokens
from fista_modifier.calibration.tensors import first_tensor
from fista_modifier.models.experts import routing_real_tokens

__all__ = ["inputs_of", "outputs_of_parts", "real_inputs_of"]


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
