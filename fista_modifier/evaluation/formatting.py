"""Figures and tables as text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["markdown_table", "with_error"]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    :param header: of the columns
    :param rows: cells; a short row is filled up
    :return: a Markdown table
    """
    filled = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    rule = ["---"] * len(header)
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        for cells in ([*header], rule, *filled)
    )


def with_error(value: float, stderr: float | None) -> str:
    """
    :param value: an estimate
    :param stderr: its standard error, if it has one
    :return: both
    """
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"
