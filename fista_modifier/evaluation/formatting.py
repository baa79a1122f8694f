"""Figures and tables as text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["markdown_table", "with_error"]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    Format a table in Markdown.

    :param header: names of the columns
    :param rows: cells of each row; a short row is filled up
    :return: the table
    """
    filled = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    rule = ["---"] * len(header)
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        for cells in ([*header], rule, *filled)
    )


def with_error(value: float, stderr: float | None) -> str:
    """
    Format an estimate with its standard error.

    :param value: the estimate
    :param stderr: its standard error, or None
    :return: both, to three decimals
    """
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"
