"""
``fista-prune``: its commands, each in a module of its own, and what they print.

Nothing else in the package imports this folder. It may import all of the package.
``options`` has the options that several commands share, ``console`` the terminal and
the messages of errors, ``tables`` the tables.
"""

from __future__ import annotations

import typer

from fista_modifier.cli import (
    compare,
    evaluate,
    plan,
    prune,
    recover,
    report,
    unpack,
    verify,
)
from fista_modifier.cli.demo import command as demo

__all__ = ["app"]

app = typer.Typer(
    name="fista-prune",
    help="Prune language models by FISTAPruner, with llm-compressor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# in the order of `fista-prune --help`
app.command("prune")(prune.prune)
app.command("recover")(recover.recover)
app.command("verify")(verify.verify)
app.command("report")(report.report)
app.command("unpack")(unpack.unpack)
app.command("plan")(plan.plan)
app.command("eval")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("demo")(demo.demo)
