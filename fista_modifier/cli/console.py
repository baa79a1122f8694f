"""The terminal: where the commands print, and how an error is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from loguru import logger
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from fista_modifier.errors import describe
from fista_modifier.files import write_whole

__all__ = ["console", "errors_as_messages", "show"]

console = Console()


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Make an error a message and exit status 1. The debug log has the traceback."""
    try:
        yield
    except Exception as error:
        logger.opt(exception=error).debug("where it came from")
        message = f"[bold red]error:[/] {escape(describe(error))}"
        Console(stderr=True).print(message, highlight=False)
        raise typer.Exit(1) from error


def show(table: str, file: Path | None) -> None:
    """
    :param table: Markdown, printed
    :param file: to write it to, if any
    """
    console.print(Markdown(table))
    if file:
        write_whole(file, table)
