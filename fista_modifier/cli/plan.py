"""``fista-prune plan``: what pruning a model takes."""

from __future__ import annotations

from typing import Annotated

import typer

from fista_modifier.cli.console import console, errors_as_messages
from fista_modifier.cli.options import Samples, SequenceLength
from fista_modifier.cli.tables import cost_table, memory_sentence
from fista_modifier.cost import DEVICES, shape_of
from fista_modifier.data import max_sequence_length
from fista_modifier.models.loading import load_config
from fista_modifier.pruning.presets import PRESETS, Preset

__all__ = ["plan"]


def plan(
    model: Annotated[str, typer.Argument(help="folder with a config.json, or hub id")],
    samples: Samples = 128,
    seq_len: SequenceLength = None,
    preset: Annotated[
        Preset, typer.Option(help="of the modifier's fields")
    ] = "default",
    device: Annotated[
        str, typer.Option(help=f"that prunes: {', '.join(DEVICES)}")
    ] = "a100-80gb",
    devices: Annotated[
        int, typer.Option(min=1, help="how many of them, each with layers of its own")
    ] = 1,
) -> None:
    """
    Predict what pruning MODEL takes, from its configuration alone.

    Counts the operations of products and factorisations and divides them by half of a
    device's published peak: a lower bound that no GPU has confirmed yet.
    """
    with errors_as_messages():
        if device not in DEVICES:
            raise ValueError(f"device '{device}' is none of {', '.join(DEVICES)}")
        config = load_config(model)
        shape = shape_of(config, seq_len or max_sequence_length(config))
        procedure = PRESETS[preset]
        chosen = DEVICES[device]
        console.print(cost_table(shape, samples, procedure, chosen, devices))
        console.print(memory_sentence(shape, samples, procedure, chosen))
