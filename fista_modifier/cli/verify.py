"""``fista-prune verify``: check that a checkpoint is what it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fista_modifier.checkpoint.verification import Verification
from fista_modifier.checkpoint.verification import verify as verify_checkpoint
from fista_modifier.cli.console import console, errors_as_messages
from fista_modifier.cli.tables import verification_table
from fista_modifier.solver import pattern_of

__all__ = ["check", "verify"]


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a checkpoint")],
    pattern: Annotated[
        str | None,
        typer.Option(
            help="such as 2:4 or 0.5 (default: what the report beside it says)"
        ),
    ] = None,
) -> None:
    """
    Check that CHECKPOINT is whole and as sparse as it should be.

    Every pruned operator has its pattern, no value is NaN or infinite, shards and index
    agree, names and shapes are those of config.json, tied weights are equal. If
    anything is wrong, the exit status is 1, and all that is wrong is printed. Only
    safetensors files are read.
    """
    with errors_as_messages():
        expected = None if pattern is None else pattern_of(pattern)
        verification = verify_checkpoint(checkpoint, expected)
        console.print(verification_table(verification))
        check(verification, checkpoint)
        console.print(f"[bold]{escape(str(checkpoint))}[/] is whole.")


def check(verification: Verification, folder: Path) -> None:
    """
    Refuse a checkpoint that did not pass its verification.

    :param verification: what was found
    :param folder: the checkpoint
    :raises RuntimeError: if anything is wrong; the message names all of it
    """
    faults = list(verification.problems)
    faults += [f"{failed.name} {failed.problem}" for failed in verification.failures]
    if faults:
        raise RuntimeError(f"{folder} failed verification:\n" + "\n".join(faults))
