"""The plots of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import (
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from fista_modifier.pruning.results import OperatorResult, PruningReport, mean_error
from fista_modifier.report.grid import OperatorGrid
from fista_modifier.report.svg import (
    GRID,
    MUTED,
    SOLVER,
    START,
    STORED,
    TEXT,
    heat,
    inline_svg,
    style,
)

__all__ = ["error_lines", "error_map", "search_paths", "sparsity_map", "times"]

WIDTH = 10.4
"""
The width of a figure in inches. With 72 points to the inch, this is 749 points. The
page shows a figure with 760 pixels or more, so a point has at least one pixel.
"""
PANELS_IN_A_ROW = 4
# A warm start is often all but equal to the solver's result, so it must shine through.
WARM_START_LOOK = {"c": START, "lw": 4.5, "alpha": 0.45}
SOLVER_LOOK = {"c": SOLVER, "marker": "o", "ms": 1.5}
STORED_LOOK = {"c": STORED, "marker": "o", "ms": 2.5, "ls": (0, (3, 1))}

Axes = Any
Measure = Callable[[OperatorResult], float]


def error_lines(report: PruningReport, grid: OperatorGrid) -> str:
    """
    Draw the errors along the layers.

    :param report: the model's report
    :param grid: its operators
    :return: an ``svg`` element with a panel for each kind of operator, and one for the
        layers as a whole where they were reconstructed
    """
    lines: list[tuple[str, Measure, dict[str, Any]]] = [
        ("warm start", _known("relative_start_error"), WARM_START_LOOK),
        ("solver", _known("relative_error"), SOLVER_LOOK),
    ]
    if report.layers:
        lines.append(("as stored", _known("stored_error"), STORED_LOOK))
    with style():
        figure, panels = _panels(len(grid.kinds) + bool(report.layers))
        for axes, kind, label in zip(
            panels, grid.kinds, grid.kind_labels, strict=False
        ):
            for name, measure, look in lines:
                _plot(axes, grid.along_layers(kind, measure), label=name, **look)
            axes.set_title(label)
        if report.layers:
            results = [report.layers.get(layer) for layer in grid.layers]
            before = [r.start_error if r else math.nan for r in results]
            after = [r.error if r else math.nan for r in results]
            _plot(panels[-1], before, **SOLVER_LOOK)
            _plot(panels[-1], after, **STORED_LOOK)
            panels[-1].set_title("whole layer (its output)")
        for axes in panels:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            _number_layers(axes, grid)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(lines))
        means = "; ".join(
            f"{label} {_mean(grid, kind, 'relative_start_error'):.1%} to "
            f"{_mean(grid, kind, 'stored_error'):.1%}"
            for kind, label in zip(grid.kinds, grid.kind_labels, strict=True)
        )
        return inline_svg(
            figure,
            "errors",
            "Relative error along the layers, for each kind of operator",
            f"Means over the layers, warm start to stored weight: {means}.",
        )


def error_map(grid: OperatorGrid) -> str:
    """
    Draw a heat map of the error of every operator as it is stored.

    :param grid: the operators
    :return: an ``svg`` element
    """
    highest = max(one.stored_error for one in grid.operators)
    return _map(
        grid,
        _known("stored_error"),
        highest or 1.0,
        "error-map",
        "Relative error of every operator as it is stored",
    )


def sparsity_map(grid: OperatorGrid) -> str:
    """
    Draw a heat map of the share of zeros of every operator, from none to all.

    :param grid: the operators
    :return: an ``svg`` element
    """
    return _map(
        grid,
        lambda operator: operator.sparsity,
        1.0,
        "sparsity-map",
        "Share of zeros in every operator",
    )


def search_paths(grid: OperatorGrid) -> str:
    """
    Draw λ and the error of every operator, round by round.

    :param grid: the operators, at least one with a search for λ
    :return: an ``svg`` element with two panels for each kind of operator
    """
    kinds = [
        (kind, label)
        for kind, label in zip(grid.kinds, grid.kind_labels, strict=True)
        if any(operator.search for operator in grid.of_kind(kind))
    ]
    with style():
        figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
        # one panel alone must not be as wide as the page
        columns = max(len(kinds), PANELS_IN_A_ROW)
        above, below = figure.subplots(
            2, columns, sharex=True, sharey="row", squeeze=False
        )
        for axes in [*above[len(kinds) :], *below[len(kinds) :]]:
            axes.set_visible(False)
        for upper, lower, (kind, label) in zip(above, below, kinds, strict=False):
            for operator in grid.of_kind(kind):
                _search(upper, lower, operator)
            upper.set_title(label)
            upper.set_yscale("log")
            upper.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            upper.yaxis.set_minor_locator(NullLocator())
            lower.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            lower.yaxis.set_major_formatter(PercentFormatter(1))
            lower.set_xlabel("round")
        above[0].set_ylabel("λ, in its unit")
        below[0].set_ylabel("error / warm start’s")
        searches = [o.search for kind, _ in kinds for o in grid.of_kind(kind)]
        rounds = [len(search) for search in searches]
        return inline_svg(
            figure,
            "search",
            "The search for λ, round by round, for each kind of operator",
            f"{fmean(rounds):.1f} values of λ an operator on average, at most "
            f"{max(rounds)}; λ from "
            f"{min(step.penalty for search in searches for step in search):.3g} to "
            f"{max(step.penalty for search in searches for step in search):.3g}.",
        )


def _search(upper: Axes, lower: Axes, operator: OperatorResult) -> None:
    """Draw one operator's λ above, and its trials and the best error so far below."""
    rounds = range(1, len(operator.search) + 1)
    upper.plot(
        rounds,
        [step.penalty for step in operator.search],
        c=SOLVER,
        lw=0.9,
        marker="o",
        ms=2.5,
        alpha=0.5,
    )
    if start := operator.relative_start_error:
        best = [1.0, *(step.best_error / start for step in operator.search)]
        lower.plot(range(len(best)), best, c=SOLVER, lw=0.9, alpha=0.5)
        tried = [step.error / start for step in operator.search]
        lower.plot(rounds, tried, "o", c=STORED, ms=2.5, mew=0, alpha=0.6)


def times(report: PruningReport, grid: OperatorGrid) -> str:
    """
    Draw where the time went, by task and along the layers.

    :param report: the model's report
    :param grid: its operators
    :return: an ``svg`` element
    """
    solver = {
        label: sum(operator.seconds for operator in grid.of_kind(kind))
        for kind, label in zip(grid.kinds, grid.kind_labels, strict=True)
    }
    reconstruction = sum(result.seconds for result in report.layers.values())
    rest = report.seconds - sum(solver.values()) - reconstruction
    tasks = [(label, seconds, SOLVER) for label, seconds in solver.items()]
    if report.layers:
        tasks.append(("reconstruction", reconstruction, STORED))
    if rest > 0:  # several processes, or earlier runs, may have shared the work
        tasks.append(("calibration and the rest", rest, START))
    with style():
        figure = Figure(figsize=(WIDTH, 0.9 + 0.24 * len(tasks)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[2, 3])
        labels, seconds, colours = zip(*tasks, strict=True)
        bars = left.barh(range(len(tasks)), seconds, 0.7, color=colours)
        left.bar_label(
            bars, [f"{each:.3g}" for each in seconds], padding=3, color=MUTED
        )
        left.set_yticks(range(len(tasks)), labels)
        left.invert_yaxis()
        left.margins(x=0.15)
        left.grid(False, axis="y")
        left.set_title("By task, in seconds")
        in_solver = [
            sum(o.seconds for k in grid.kinds for o in grid.cells.get((layer, k), []))
            for layer in grid.layers
        ]
        trained = [report.layers.get(layer) for layer in grid.layers]
        in_training = [result.seconds if result else 0.0 for result in trained]
        right.bar(range(len(in_solver)), in_solver, 0.7, color=SOLVER, label="solver")
        if report.layers:
            right.bar(
                range(len(in_training)),
                in_training,
                0.7,
                bottom=in_solver,
                color=STORED,
                label="reconstruction",
            )
            right.legend(loc="upper right", ncols=2, bbox_to_anchor=(1, 1.15))
        right.grid(False, axis="x")
        right.set_title("By layer, in seconds")
        _number_layers(right, grid)
        shares = "; ".join(f"{label} {each:.3g} s" for label, each, _ in tasks)
        return inline_svg(
            figure, "times", "Where the time went, by task and by layer", f"{shares}."
        )


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Make a figure with a grid of small plots, and return it with their axes."""
    rows = math.ceil(count / PANELS_IN_A_ROW)
    figure = Figure(figsize=(WIDTH, 0.5 + 1.9 * rows), layout="constrained")
    axes = list(figure.subplots(rows, PANELS_IN_A_ROW, sharey=True, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def _plot(axes: Axes, values: Sequence[float], **look: Any) -> None:
    axes.plot(range(len(values)), values, **look)


def _number_layers(axes: Axes, grid: OperatorGrid) -> None:
    """Name as many layers on the x axis as there is room for."""
    labels = grid.layer_labels
    step = math.ceil(len(labels) / (8 if max(map(len, labels)) <= 3 else 2))
    axes.set_xticks(range(0, len(labels), step), labels[::step])
    axes.set_xlabel("layer")


def _known(error: str) -> Measure:
    """Return an error of an operator, NaN if no calibration token reached it."""
    return lambda one: getattr(one, error) if one.tokens else math.nan


def _mean(grid: OperatorGrid, kind: str, error: str) -> float:
    return mean_error(grid.of_kind(kind), attrgetter(error))


def _map(
    grid: OperatorGrid, measure: Measure, highest: float, name: str, title: str
) -> str:
    """
    Draw a heat map of kinds over layers. Each cell shows its value under the mouse, so
    it is an artist of its own. The cells of a mesh or an image are not.
    """
    tooltips: dict[str, str] = {}
    extremes: list[tuple[float, str]] = []
    with style():
        figure = Figure(
            figsize=(WIDTH, 0.75 + 0.22 * len(grid.kinds)), layout="constrained"
        )
        axes, scale = figure.subplots(1, 2, width_ratios=[60, 1])
        for row, (kind, kind_label) in enumerate(
            zip(grid.kinds, grid.kind_labels, strict=True)
        ):
            values = grid.along_layers(kind, measure)
            for column, value in enumerate(values):
                if math.isnan(value):
                    continue
                gid = f"{name}-{row}-{column}"
                where = f"layer {grid.layer_labels[column]}, {kind_label}"
                tooltips[gid] = f"{where}: {value:.2%}"
                extremes.append((value, where))
                corner = (column - 0.46, row - 0.42)
                colour = heat(value / highest)
                axes.add_patch(Rectangle(corner, 0.92, 0.84, facecolor=colour, gid=gid))
        axes.set_xlim(-0.5, len(grid.layers) - 0.5)
        axes.set_ylim(len(grid.kinds) - 0.5, -0.5)
        axes.set_yticks(range(len(grid.kinds)), grid.kind_labels)
        _number_layers(axes, grid)
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        _scale(scale, highest)
        span = "No calibration token reached an operator."
        if extremes:
            low, high = min(extremes), max(extremes)
            span = f"From {low[0]:.2%} ({low[1]}) to {high[0]:.2%} ({high[1]})."
        return inline_svg(figure, name, title, span, tooltips)


def _scale(axes: Axes, highest: float, steps: int = 40) -> None:
    """Draw the scale of a heat map's colours."""
    for step in range(steps):
        colour = heat((step + 0.5) / steps)
        # each is higher than its step, so that no page shines through the seams
        height = min(1.5, steps - step) / steps
        axes.add_patch(Rectangle((0, step / steps), 1, height, facecolor=colour))
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 1], ["0 %", f"{100 * highest:.3g} %"], color=TEXT)
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_color(GRID)
    axes.spines[:].set_visible(False)
