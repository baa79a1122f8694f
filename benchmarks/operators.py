"""
The worth of each part of the solver, operator by operator, in every third decoder
layer (--every) of a real model, as the default prunes it without reconstruction.

The table has squared relative output errors ‖W*X* − WX‖² / ‖WX‖² of each solver's W*
beside those of SparseGPT (llm-compressor's, with its own defaults) on the same Gram
matrices: those of the layer in which the default has pruned the operators before. It
has the same on the first tokens of another text, which no solver sees.

    python benchmarks/operators.py --model DIR --calibration FILE.txt --text FILE.txt \\
        --out benchmarks/results/operators.md
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import inputs
import peers
from datasets import Dataset
from torch import Tensor

from fista_modifier import pipeline
from fista_modifier.evaluation.formatting import markdown_table
from fista_modifier.evaluation.methods import recipe
from fista_modifier.solver import (
    FAST,
    PAPER,
    GramStatistics,
    PrunedWeight,
    SolverFactory,
    SolverOptions,
    SparsityPattern,
    pattern_of,
)
from fista_modifier.solver.objective import LayerObjective
from fista_modifier.solver.quadratic import Quadratic

DEFAULT = SolverOptions()
PRUNES = "default (from ADMM)"
REFERENCE = "SparseGPT"
VARIANTS: dict[str, SolverFactory] = {
    REFERENCE: replace(PAPER, patience=0),
    "paper": PAPER,
    "default, SparseGPT's weights": replace(DEFAULT, start="sparsegpt"),
    "default, dense weights": replace(DEFAULT, start="dense"),
    PRUNES: DEFAULT,
    "fast": FAST,
    "default, damping 0.01": replace(DEFAULT, dampening_frac=0.01),
    "the same, 40 steps of ADMM": replace(DEFAULT, dampening_frac=0.01, admm_steps=40),
    "ALPS": peers.ALPS,
    "Boža": peers.Boza,
}
PATTERNS = ("2:4", "0.5")

Solve = Callable[[Tensor, GramStatistics], PrunedWeight]
"""
A function that returns W* for an operator's weight W and the statistics of its input.
"""


@dataclass
class Measured:
    """
    The results of all variants for one operator.

    :param kind: the last part of the operator's name
    :param solved: W* by variant
    :param seconds: seconds by variant
    :param unseen: squared relative error on the other text, by variant
    """

    kind: str = ""
    solved: dict[str, PrunedWeight] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    unseen: dict[str, float] = field(default_factory=dict)

    @property
    def seen(self) -> dict[str, float]:
        return {
            one: solution.relative_error**2 for one, solution in self.solved.items()
        }


def prune_with(
    solve: Solve, args: argparse.Namespace, pattern: str, data: Dataset
) -> list[str]:
    """
    Run the default with another solver, and return the operators' names in the order in
    which the solver had them.
    """

    class Solver:
        def __init__(self, statistics: GramStatistics) -> None:
            self.statistics = statistics

        def prune(
            self, weights: Sequence[Tensor], patterns: Sequence[SparsityPattern]
        ) -> list[PrunedWeight]:
            return [solve(weight, self.statistics) for weight in weights]

    fields = {"ignore": inputs.ignored(args), "reconstruction_epochs": 0}
    run = pipeline.prune(
        pipeline.load_model(args.model, "float32"),
        pipeline.load_tokenizer(args.model),
        data,
        recipe("fista", pattern_of(pattern), **fields).with_solver(Solver),
    )
    return [operator.name for operator in run.results]


def measure(args: argparse.Namespace, name: str) -> list[Measured]:
    """Measure all variants for a pattern, for each operator on the same statistics."""
    pattern = pattern_of(name)
    operators: list[Measured] = []

    def solve(weight: Tensor, statistics: GramStatistics) -> PrunedWeight:
        operator = Measured()
        operators.append(operator)
        for variant, solver in VARIANTS.items():
            started = time.perf_counter()
            (solution,) = solver(statistics).prune([weight], [pattern])
            operator.seconds[variant] = time.perf_counter() - started
            operator.solved[variant] = solution
        return operator.solved[PRUNES]

    names = prune_with(solve, args, name, inputs.calibration(args))
    for operator, full_name in zip(operators, names, strict=True):
        operator.kind = full_name.rpartition(".")[2]
    in_order = iter(operators)

    def judge(weight: Tensor, statistics: GramStatistics) -> PrunedWeight:
        operator = next(in_order)
        objective = LayerObjective(weight, Quadratic(statistics))
        for variant, one in operator.solved.items():
            error = objective.error(one.weight) / objective.output_norm
            operator.unseen[variant] = error**2
        return operator.solved[PRUNES]

    prune_with(judge, args, name, inputs.calibration(args, text=args.text))
    return operators


def row(variant: str, operators: Sequence[Measured]) -> list[str]:
    """
    Return the cells of a variant: the errors of SparseGPT, or those of another variant
    as shares of SparseGPT's.
    """
    kinds: defaultdict[str, list[Measured]] = defaultdict(list)
    for operator in operators:
        kinds[operator.kind].append(operator)
    cells = [
        mean(variant, [operator.seen for operator in same]) for same in kinds.values()
    ]
    for errors in (
        [operator.seen for operator in operators],
        [operator.unseen for operator in operators],
    ):
        shares = [one[variant] / one[REFERENCE] for one in errors]
        above = sum(share > 1 for share in shares)
        cells.append(mean(variant, errors))
        cells += [f"{fmean(shares):.2f}", f"{max(shares):.2f}", f"{above}"]
    return [*cells, f"{sum(operator.seconds[variant] for operator in operators):.0f}"]


def mean(variant: str, errors: Sequence[dict[str, float]]) -> str:
    """Return SparseGPT's mean error over operators, or another's as a share of it."""
    reference = fmean(one[REFERENCE] for one in errors)
    if variant == REFERENCE:
        return f"{reference:.4f}"
    return f"{fmean(one[variant] for one in errors) / reference:.2f}"


def main() -> None:
    parser = inputs.arguments(__doc__, 32)
    parser.add_argument("--text", required=True)
    parser.add_argument("--every", type=int, default=3)
    args = parser.parse_args()
    lines: list[list[str]] = []
    for name in PATTERNS:
        operators = measure(args, name)
        label = str(pattern_of(name))
        lines += [[label, one, *row(one, operators)] for one in VARIANTS]
        kinds = dict.fromkeys(operator.kind for operator in operators)
        columns = ["mean", "mean share", "worst share", "above SparseGPT"]
        others = [f"{column}, unseen" for column in columns]
        header = ["", "solver", *kinds, *columns, *others, "seconds"]
        table = markdown_table(header, lines)
        inputs.show(
            args.out,
            f"{table}\n\n{Path(args.model).name}, the {len(operators)} operators "
            f"of one layer in {args.every}, {args.samples} × {args.seq_len} tokens of "
            f"{Path(args.calibration).name}; unseen: as many of "
            f"{Path(args.text).name}. X* is what the default's operators before leave. "
            "SparseGPT: means of squared relative errors; the others: means as shares "
            "of SparseGPT's, the mean of the operators' own shares, the largest, how "
            "many are above SparseGPT's error, and seconds for all operators, warm "
            "start included.\n",
        )


if __name__ == "__main__":
    main()
