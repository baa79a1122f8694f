"""``fista-prune plan``: what a run will do to a model, and what it takes."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from fista_modifier.cli.console import console, errors_as_messages
from fista_modifier.cli.method import Request
from fista_modifier.cli.options import (
    ErrorCorrectionName,
    MethodName,
    MultipleOf,
    PatternName,
    PresetName,
    RecipeFile,
    Recovers,
    RemovedShare,
    Samples,
    SequenceLength,
    Structures,
    WarmStartName,
)
from fista_modifier.cli.tables import (
    channel_table,
    cost_table,
    memory_sentence,
    pattern_table,
    recovery_sentence,
)
from fista_modifier.cost import DEVICES, shape_of
from fista_modifier.models.limits import longest_sequence
from fista_modifier.models.loading import load_config, load_model
from fista_modifier.modifiers.base import LayerwiseModifier
from fista_modifier.modifiers.fista import FISTAPruningModifier
from fista_modifier.modifiers.forecast import forecasts
from fista_modifier.recovery.modifier import RecoveryModifier
from fista_modifier.recovery.obstacles import check_recoverable, check_trainable

__all__ = ["plan"]


def plan(
    model: Annotated[str, typer.Argument(help="folder with a config.json, or hub id")],
    pattern: PatternName = None,
    recipe: RecipeFile = None,
    method: MethodName = "fista",
    sparsity: RemovedShare = None,
    structure: Structures = None,
    multiple_of: MultipleOf = None,
    samples: Samples = 128,
    seq_len: SequenceLength = None,
    preset: PresetName = None,
    error_correction: ErrorCorrectionName = None,
    warm_start: WarmStartName = None,
    recover: Recovers = None,
    device: Annotated[
        str, typer.Option(help=f"that prunes: {', '.join(DEVICES)}")
    ] = "a100-80gb",
    devices: Annotated[
        int, typer.Option(min=1, help="how many of them, each with layers of its own")
    ] = 1,
) -> None:
    """
    Predict what a run will do to MODEL, and what it takes.

    The configuration is enough, unless channels are to leave: then the model is loaded,
    because only its runs show which channels can. The time is the number of operations
    in products and factorisations, divided by half of a device's published peak. It is
    a lower bound, which no GPU has confirmed yet.
    """
    with errors_as_messages():
        if device not in DEVICES:
            raise ValueError(f"device '{device}' is none of {', '.join(DEVICES)}")
        fields = {
            "preset": preset,
            "error_correction": error_correction,
            "warm_start": warm_start,
        }
        request = Request(
            method, pattern, recipe, sparsity, structure, multiple_of, recover, fields
        )
        config = load_config(model)
        length = seq_len or longest_sequence(config)
        chosen = DEVICES[device]
        if request.is_open:
            shape = shape_of(config, length)
            fista = FISTAPruningModifier(sparsity=0.5, **request.fields)
            procedure = fista.without_patterns
            console.print(cost_table(shape, samples, procedure, chosen, devices))
            console.print(memory_sentence(shape, samples, procedure, chosen))
            return
        check_recovery = partial(
            check_recoverable,
            config,
            request.read().modifiers,
            processes=devices,
            sequences=samples,
            length=length,
            memory=chosen.memory,
            dtype="bfloat16",  # as all that is predicted here
        )
        request, no_recovery = request.without_recovery_if(check_recovery)
        modifiers = request.read().modifiers
        recovers = any(isinstance(one, RecoveryModifier) for one in modifiers)
        if recovers:
            check_trainable(config, devices, samples, length)
        for forecast in forecasts(modifiers, config, length, lambda: load_model(model)):
            console.print(
                pattern_table(forecast)
                if forecast.plan is None
                else channel_table(forecast.plan)
            )
            work = forecast.shape, samples, forecast.procedure, chosen
            offload = forecast.modifier.offload_hessians
            console.print(cost_table(*work, devices))
            console.print(
                memory_sentence(*work, forecast.kept, offload_hessians=offload)
            )
        if no_recovery:
            console.print(f"{no_recovery}.")
        if recovers:
            console.print(recovery_sentence(forecast.shape, chosen))
        if others := [
            type(one).__name__
            for one in modifiers
            if not isinstance(one, LayerwiseModifier | RecoveryModifier)
        ]:
            console.print(f"What {', '.join(others)} will take is not predicted.")
