"""
What each part of the solver is worth, on single operators of a real model: all of those
in every third decoder layer (--every), each by itself.

Squared relative output errors ‖W*X − WX‖² / ‖WX‖², X* = X, as shares of those of
SparseGPT (llm-compressor's, with its own defaults) from the same Gram matrices, and the
same on the first tokens of another text, which no solver sees.

    python benchmarks/operators.py --model DIR --calibration FILE.txt --text FILE.txt \\
        --out benchmarks/results/operators.md
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import inputs
import peers
import torch
from compare import pattern_of
from torch import nn

from fista_modifier import pipeline
from fista_modifier.calibration.operators import Operator, find_operators
from fista_modifier.evaluation.formatting import markdown_table
from fista_modifier.evaluation.methods import IGNORE, TARGETS
from fista_modifier.evaluation.results import write_whole
from fista_modifier.solver import (
    FAST,
    PAPER,
    GramStatistics,
    SolverOptions,
    SparsityPattern,
    StageSolver,
)
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.quadratic import Quadratic

DEFAULT = SolverOptions()
SPARSEGPT = "SparseGPT"
VARIANTS: dict[str, tuple[Any, SolverOptions]] = {
    SPARSEGPT: (StageSolver, replace(PAPER, patience=0)),
    "paper": (StageSolver, PAPER),
    "paper + scaling + refit": (StageSolver, replace(DEFAULT, start="sparsegpt")),
    "the same from dense weights": (StageSolver, replace(DEFAULT, start="dense")),
    "default (from ADMM)": (StageSolver, DEFAULT),
    "fast": (StageSolver, FAST),
    "default, damping 0.01": (StageSolver, replace(DEFAULT, dampening_frac=0.01)),
    "ALPS": (peers.ALPS, DEFAULT),
    "Boža": (peers.Boza, DEFAULT),
}
PATTERNS = ("2:4", "0.5")


def gram_matrices(
    model: nn.Module, operators: Sequence[Operator], blocks: torch.Tensor
) -> list[GramStatistics]:
    """Of the inputs of operators, in one pass over the blocks."""
    statistics = [GramStatistics.empty(one.weight.shape[1]) for one in operators]
    hooks = [
        operator.module.register_forward_pre_hook(
            lambda _module, args, sums=sums: sums.accumulate(args[0].flatten(0, 1))
        )
        for operator, sums in zip(operators, statistics, strict=True)
    ]
    with torch.no_grad():
        for block in blocks.split(4):
            model(block)
    for hook in hooks:
        hook.remove()
    return statistics


class Errors:
    """Squared relative errors of each variant, by kind of operator, and seconds."""

    def __init__(self) -> None:
        self.seen: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self.unseen: defaultdict[str, list[float]] = defaultdict(list)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def measure(
        self,
        operator: Operator,
        statistics: GramStatistics,
        elsewhere: GramStatistics,
        pattern: SparsityPattern,
    ) -> None:
        kind = operator.name.rpartition(".")[2]
        other = LayerObjective(operator.weight, Quadratic(elsewhere))
        for variant, (solver, options) in VARIANTS.items():
            started = time.perf_counter()
            (solution,) = solver(statistics, pattern, options).prune([operator.weight])
            self.seconds[variant] += time.perf_counter() - started
            self.seen[variant][kind].append(solution.relative_error**2)
            relative = other.error(solution.weight) / other.output_norm
            self.unseen[variant].append(relative**2)

    def rows(self, pattern: SparsityPattern) -> list[list[str]]:
        reference = self.seen[SPARSEGPT]
        rows = []
        for variant in VARIANTS:
            errors = self.seen[variant]
            if variant == SPARSEGPT:
                cells = [f"{fmean(errors[kind]):.4f}" for kind in reference]
                cells += [f"{fmean(sum(errors.values(), [])):.4f}", "", ""]
                cells += [f"{fmean(self.unseen[variant]):.4f}", "", ""]
            else:
                shares = (sum(errors[k]) / sum(reference[k]) for k in reference)
                cells = [f"{share:.2f}" for share in shares]
                for one, base in (
                    (sum(errors.values(), []), sum(reference.values(), [])),
                    (self.unseen[variant], self.unseen[SPARSEGPT]),
                ):
                    ratios = [a / b for a, b in zip(one, base, strict=True)]
                    cells += [f"{fmean(ratios):.2f}", f"{max(ratios):.2f}"]
                    cells.append(f"{sum(ratio > 1 for ratio in ratios)}")
            seconds = f"{self.seconds[variant]:.0f}"
            rows.append([str(pattern), variant, *cells, seconds])
        return rows


def main() -> None:
    parser = inputs.arguments(__doc__, 32)
    parser.add_argument("--text", required=True)
    parser.add_argument("--every", type=int, default=3)
    args = parser.parse_args()
    model = pipeline.load_model(args.model, "float32")
    ignore = IGNORE + inputs.dense_layers(args.model, args.every)
    operators = find_operators(model, TARGETS, ignore)
    statistics, elsewhere = (
        gram_matrices(model, operators, torch.tensor(data["input_ids"]))
        for data in (inputs.calibration(args), inputs.calibration(args, text=args.text))
    )
    kinds = dict.fromkeys(one.name.rpartition(".")[2] for one in operators)
    columns = ["all", "worst", "above SparseGPT"]
    others = [f"{column}, unseen" for column in columns]
    header = ["", "solver", *kinds, *columns, *others, "seconds"]
    lines: list[list[str]] = []
    for name in PATTERNS:
        pattern, errors = pattern_of(name), Errors()
        for one in zip(operators, statistics, elsewhere, strict=True):
            errors.measure(*one, pattern)
        lines += errors.rows(pattern)
        table = markdown_table(header, lines)
        write_whole(
            args.out,
            f"{table}\n\n{Path(args.model).name}, the {len(operators)} operators "
            f"of one layer in {args.every}, {args.samples} × {args.seq_len} tokens of "
            f"{Path(args.calibration).name}; unseen: as many of "
            f"{Path(args.text).name}. "
            "SparseGPT: means of squared relative errors; the others: shares of "
            "SparseGPT's mean, of all operators the mean of their shares, the largest, "
            "how many are above SparseGPT's error, and seconds for all operators, warm "
            "start included.\n",
        )
        print(table, flush=True)


if __name__ == "__main__":
    main()
