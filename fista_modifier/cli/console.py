"""The terminal that the commands print to, and the way they print errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from loguru import logger
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from fista_modifier.cli.errors import describe
from fista_modifier.files import write_whole

__all__ = ["console", "errors_as_messages", "show"]

console = Console()


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turn an error into a message and exit status 1; the debug log has its origin."""
    try:
        yield
    except Exception as error:
        logger.opt(exception=error).debug("where it came from")
        message = f"[bold red]error:[/] {escape(describe(error))}"
        Console(stderr=True).print(message, highlight=False)
        raise typer.Exit(1) from error


def show(table: str, file: Path | None) -> None:
    """
    Print a table, and write it to a file if one is given.

    :param table: Markdown
    :param file: the file, or None
    """
    console.print(Markdown(table))
    if file:
        write_whole(file, table)
