"""``fista-prune unpack``: write the dense form of a packed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fista_modifier.checkpoint.storage import unpack_checkpoint
from fista_modifier.cli.console import console, errors_as_messages

__all__ = ["unpack"]


def unpack(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a packed checkpoint")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder for the dense checkpoint")
    ],
) -> None:
    """
    Write the dense form of CHECKPOINT, whose weights are in a bitmask format.

    The format may be sparse-bitmask or sparse-24-bitmask, as written by
    'prune --format' and by llm-compressor up to 0.10. The weights are the same bit for
    bit.
    """
    with errors_as_messages():
        count = unpack_checkpoint(checkpoint, output)
        console.print(
            f"Wrote [bold]{escape(str(output))}[/]: unpacked {count} weights."
        )
