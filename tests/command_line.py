"""The command line, run as a user runs it."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from fista_modifier.cli import app


def invoke(*arguments: object) -> Result:
    """
    :param arguments: of ``fista-prune``
    :return: status and output, in a wide terminal
    """
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "200"}
    )
