"""The page as one HTML file, which needs no script, no network and no other file."""

from __future__ import annotations

from importlib.resources import files
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fista_modifier.pruning.results import (
    REPORT_NAME,
    OperatorResult,
    PruningReport,
    mean_error,
)
from fista_modifier.report.figures import (
    error_lines,
    error_map,
    search_paths,
    sparsity_map,
    times,
)
from fista_modifier.report.grid import OperatorGrid

__all__ = ["render", "write_page"]

TEMPLATE = files("fista_modifier.report") / "page.html.jinja"


def write_page(folder: Path, output: Path) -> None:
    """
    Write the page of a checkpoint's report.

    :param folder: folder of a checkpoint with a report
    :param output: the HTML file to write
    :raises FileNotFoundError: if the checkpoint has no report
    :raises ValueError: if its report is damaged, or tells of no pruned operator
    """
    if not (folder / REPORT_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} has no {REPORT_NAME}: name a folder that 'fista-prune prune' "
            "wrote"
        )
    page = render(PruningReport.load(folder))
    output.write_text(page, encoding="utf-8")


def render(report: PruningReport) -> str:
    """
    Render a report as a page.

    :param report: the report of a pruned model
    :return: the page; whatever the report says is text in it, never markup
    :raises ValueError: if there is nothing to draw
    """
    if not report.operators:
        raise ValueError(f"the report of {report.model} tells of no pruned operator")
    grid = OperatorGrid.of(report.operators)
    operators = grid.operators
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "seconds": _seconds}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    searched = any(operator.search for operator in operators)
    return template.render(
        report=report,
        name=Path(report.model).name or report.model,
        methods=report.methods,
        patterns=report.summary_of_patterns,
        total=_summary(operators),
        sparse_weights=sum(one.shape[0] * one.shape[1] for one in report.sparse),
        kinds=[
            (label, _summary(grid.of_kind(kind)))
            for kind, label in zip(grid.kinds, grid.kind_labels, strict=True)
        ],
        errors=Markup(error_lines(report, grid)),
        error_map=Markup(error_map(grid)),
        search=Markup(search_paths(grid)) if searched else None,
        sparsity=Markup(sparsity_map(grid)),
        times=Markup(times(report, grid)),
    )


def _summary(operators: list[OperatorResult] | Any) -> dict[str, Any]:
    """Return sums and means over operators, by their names in the template."""
    weights = sum(operator.shape[0] * operator.shape[1] for operator in operators)
    return {
        "count": len(operators),
        "weights": weights,
        "sparsity": sum(operator.zeros for operator in operators) / weights,
        "start": mean_error(operators, attrgetter("relative_start_error")),
        "solver": mean_error(operators, attrgetter("relative_error")),
        "stored": mean_error(operators, attrgetter("stored_error")),
        "trials": fmean(operator.trials for operator in operators),
        "improved": fmean(operator.penalty > 0 for operator in operators),
        "seconds": sum(operator.seconds for operator in operators),
    }


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _seconds(seconds: float) -> str:
    """Format a duration in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
