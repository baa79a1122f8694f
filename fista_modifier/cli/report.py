"""``fista-prune report``: render the pruning report as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fista_modifier.cli.console import console, errors_as_messages

__all__ = ["report"]

PAGE_NAME = "pruning_report.html"


def report(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a checkpoint")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help=f"HTML file (default: {PAGE_NAME} in CHECKPOINT)"
        ),
    ] = None,
) -> None:
    """
    Render the pruning report of CHECKPOINT as one HTML page, which needs no network.
    """
    with errors_as_messages():
        try:
            from fista_modifier.report import write_page
        except ModuleNotFoundError as error:
            library = str(error.name).partition(".")[0]
            raise RuntimeError(
                f"the page needs {library}: pip install 'fista-modifier[report]'"
            ) from error
        target = output or checkpoint / PAGE_NAME
        write_page(checkpoint, target)
        console.print(f"Wrote [bold]{escape(str(target))}[/].")
