"""
What each part of the solver is worth, on single operators of a real model: all of those
in every third decoder layer (--every), each by itself.

Squared relative output errors ‖W*X − WX‖² / ‖WX‖², X* = X, as shares of those of
SparseGPT (llm-compressor's, with its own defaults) from the same Gram matrices.

    python benchmarks/operators.py --model DIR --calibration FILE.txt \\
        --out benchmarks/results/operators.md
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
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

DEFAULT = SolverOptions()
VARIANTS: dict[str, tuple[Any, SolverOptions]] = {
    "paper": (StageSolver, PAPER),
    "paper + scaling + refit": (StageSolver, replace(DEFAULT, start="sparsegpt")),
    "the same from dense weights": (StageSolver, replace(DEFAULT, start="dense")),
    "default (from ADMM)": (StageSolver, DEFAULT),
    "fast": (StageSolver, FAST),
    "default, damping 0.01": (StageSolver, replace(DEFAULT, dampening_frac=0.01)),
    "ALPS": (peers.ALPS, DEFAULT),
    "Boža": (peers.Boza, DEFAULT),
}
SPARSEGPT = "SparseGPT"
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
        self.squared: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def measure(
        self, operator: Operator, statistics: GramStatistics, pattern: SparsityPattern
    ) -> None:
        kind = operator.name.rpartition(".")[2]
        for variant, (solver, options) in VARIANTS.items():
            started = time.perf_counter()
            (solution,) = solver(statistics, pattern, options).prune([operator.weight])
            self.seconds[variant] += time.perf_counter() - started
            self.squared[variant][kind].append(solution.relative_error**2)
            if options is PAPER:
                start = solution.relative_start_error
                self.squared[SPARSEGPT][kind].append(start**2)

    def rows(self, pattern: SparsityPattern) -> list[list[str]]:
        reference = self.squared[SPARSEGPT]
        every = sum(reference.values(), [])
        means = [f"{sum(r) / len(r):.4f}" for r in (*reference.values(), every)]
        rows = [[str(pattern), SPARSEGPT, *means, "", "", ""]]
        for variant in VARIANTS:
            errors = self.squared[variant]
            shares = [sum(errors[kind]) / sum(reference[kind]) for kind in reference]
            mine = sum(errors.values(), [])
            ratios = [a / b for a, b in zip(mine, every, strict=True)]
            shares.append(sum(mine) / sum(every))
            rows.append(
                [str(pattern), variant, *(f"{share:.2f}" for share in shares)]
                + [f"{max(ratios):.2f}", f"{sum(r > 1 for r in ratios)}"]
                + [f"{self.seconds[variant]:.0f}"]
            )
        return rows


def main() -> None:
    parser = inputs.arguments(__doc__, 32)
    parser.add_argument("--every", type=int, default=3)
    args = parser.parse_args()
    model = pipeline.load_model(args.model, "float32")
    ignore = IGNORE + inputs.dense_layers(args.model, args.every)
    operators = find_operators(model, TARGETS, ignore)
    blocks = torch.tensor(inputs.calibration(args)["input_ids"])
    statistics = gram_matrices(model, operators, blocks)
    kinds = dict.fromkeys(one.name.rpartition(".")[2] for one in operators)
    header = ["", "solver", *kinds, "all", "worst", "above SparseGPT", "seconds"]
    lines: list[list[str]] = []
    for name in PATTERNS:
        pattern, errors = pattern_of(name), Errors()
        for operator, sums in zip(operators, statistics, strict=True):
            errors.measure(operator, sums, pattern)
        lines += errors.rows(pattern)
        table = markdown_table(header, lines)
        write_whole(
            args.out,
            f"{table}\n\n{Path(args.model).name}, the {len(operators)} operators "
            f"of one layer in {args.every}, {args.samples} × {args.seq_len} tokens of "
            f"{Path(args.calibration).name}. "
            "SparseGPT: means of squared relative errors; the others: shares of "
            "SparseGPT's mean, the worst operator's share of SparseGPT's error, how "
            "many are above SparseGPT's, and seconds for all operators, warm start "
            "included.\n",
        )
        print(table, flush=True)


if __name__ == "__main__":
    main()
