"""The command line, run as a user runs it."""

from __future__ import annotations

import sys

from typer.testing import CliRunner, Result

from fista_modifier.cli import app

TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run"]
TWO_PROCESSES += ["--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TWO_PROCESSES += ["--rdzv-endpoint", "localhost:0"]  # any free port


def invoke(*arguments: object) -> Result:
    """
    :param arguments: of ``fista-prune``
    :return: status and output, in a wide terminal
    """
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "200"}
    )
