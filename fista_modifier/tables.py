"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.markup import escape
from rich.table import Table

from fista_modifier.checkpoint.verification import OperatorCheck, Verification
from fista_modifier.evaluation.formatting import with_error
from fista_modifier.evaluation.perplexity import Perplexity
from fista_modifier.layer import OperatorResult
from fista_modifier.reconstruction import ReconstructionResult

__all__ = ["layer_table", "operator_table", "perplexity_table", "verification_table"]


def operator_table(results: Sequence[OperatorResult]) -> Table:
    """
    :param results: of all operators of a model
    :return: one line for each kind of operator (q_proj, up_proj, …), and a total
    """
    table = Table(title="Pruned operators")
    table.add_column("operator")
    for heading in (
        "count",
        "weights",
        "zeros",
        "error, warm start",
        "error",
        "solver, s",
    ):
        table.add_column(heading, justify="right")
    by_kind = sorted(results, key=lambda result: result.kind)
    for kind, group in groupby(by_kind, key=lambda result: result.kind):
        table.add_row(kind, *_summary(list(group)))
    table.add_section()
    table.add_row("all", *_summary(results))
    table.caption = "error of the solver: mean over operators of ‖W*X* − WX‖ / ‖WX‖"
    return table


def _summary(results: Sequence[OperatorResult]) -> list[str]:
    weights = sum(result.shape[0] * result.shape[1] for result in results)
    zeros = sum(result.zeros for result in results)
    count = len(results)
    return [
        str(count),
        f"{weights / 1e6:.2f} M",
        f"{100 * zeros / weights:.2f} %",
        f"{sum(result.relative_start_error for result in results) / count:.4f}",
        f"{sum(result.relative_error for result in results) / count:.4f}",
        f"{sum(result.seconds for result in results):.1f}",
    ]


def layer_table(results: dict[str, ReconstructionResult]) -> Table:
    """
    :param results: of the reconstructed layers, by their names
    :return: one line for each layer
    """
    table = Table(title="Reconstructed layers")
    table.add_column("layer")
    for heading in ("steps", "error before", "error", "s"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            str(result.steps),
            f"{result.start_error:.4f}",
            f"{result.error:.4f}",
            f"{result.seconds:.1f}",
        )
    table.caption = "error: of the layer's output, by token, over every sixteenth batch"
    return table


def perplexity_table(measured: Sequence[tuple[str, Perplexity]], text: str) -> Table:
    """
    :param measured: name and perplexity of each model
    :param text: what it was measured on
    :return: one line for each model
    """
    table = Table(title=f"Perplexity on {text}")
    table.add_column("model")
    for heading in ("perplexity", "nats/token", "tokens"):
        table.add_column(heading, justify="right")
    for name, result in measured:
        value = with_error(result.value, result.stderr)
        table.add_row(name, value, f"{result.nll:.4f}", str(result.tokens))
    return table


def verification_table(verification: Verification) -> Table:
    """
    :param verification: of a checkpoint
    :return: one line for each kind of operator and pattern
    """
    table = Table(title="Verified operators")
    table.add_column("operator")
    for heading in ("pattern", "count", "weights", "zeros", "failed"):
        table.add_column(heading, justify="right")

    def kind(check: OperatorCheck) -> tuple[str, str]:
        return check.name.rpartition(".")[2], check.pattern

    by_kind = sorted(verification.operators, key=kind)
    for (name, pattern), group in groupby(by_kind, key=kind):
        checks = list(group)
        entries = sum(check.entries for check in checks)
        zeros = sum(check.zeros for check in checks)
        table.add_row(
            escape(name),
            escape(pattern),
            str(len(checks)),
            f"{entries / 1e6:.2f} M",
            f"{100 * zeros / entries:.2f} %" if entries else "",
            str(sum(check.problem is not None for check in checks)),
        )
    return table
