"""
Selectors, restorers and the training of layers, compared on the same calibration tokens
when channels leave the MLPs. The table has how far the ln perplexity is above the dense
model's, as a share of that of Wanda's score without restoration.

    python benchmarks/structured.py --model DIR --calibration FILE.txt \\
        --text FILE.txt FILE.txt --out benchmarks/results/structured

With --work FOLDER, finished layers and the state of a training wait there, and a row
that was interrupted goes on; it has no time then.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import inputs
from compare import WITHOUT_TIME, common_arguments, common_setup, measurement
from recovery import mean_seconds, prune_and_train

from fista_modifier import FASPPruningModifier, pipeline
from fista_modifier.evaluation.comparison import excess
from fista_modifier.evaluation.formatting import markdown_table
from fista_modifier.evaluation.methods import recipe
from fista_modifier.evaluation.results import Results, Row, digest
from fista_modifier.models.targets import IGNORE
from fista_modifier.recovery.resume import forget
from fista_modifier.solver import pattern_of

REFERENCE = "Wanda's score"
BARE = {"reconstruction_epochs": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    REFERENCE: {"selector": "fasp", "restorer": "none", **BARE},
    "magnitude": {"selector": "magnitude", "restorer": "none", **BARE},
    "FASP, paper": {"preset": "paper"},
    "ZipLM's elimination": {"selector": "greedy", **BARE},
    "OSSCAR's local search": {"selector": "local", **BARE},
    "FLAP's score": {"selector": "flap", **BARE},
    "SPAP's choice": {"selector": "spap", **BARE},
    "FASP, paper, with values": {
        "preset": "paper",
        "structures": ["mlp", "value_dims"],
    },
    "SPAP, paper": {"selector": "spap", "restorer": "alternating", **BARE},
    "FASP, default": {},
    "SPAP, default": {"selector": "spap"},
    "ZipLM's elimination, trained": {"selector": "greedy"},
    "FASP, slow training": {"reconstruction_rate": 0.003},
    "FASP, full, three slow epochs": {
        "error_correction": "full",
        "reconstruction_epochs": 3.0,
        "reconstruction_rate": 0.003,
    },
}
RECOVERED = {
    f"{name}, recovered": METHODS[name]
    for name in (
        "FASP, paper",
        "SPAP's choice",
        "ZipLM's elimination",
        "OSSCAR's local search",
        "FLAP's score",
    )
}
"""
The methods whose model is trained end to end after the pruning, on the same tokens.
"FASP, paper, recovered" is what the command line does by default.
"""
METHODS |= RECOVERED
SPARSEGPT = "SparseGPT 2:4"


class Job(NamedTuple):
    """
    One row of the table.

    :param method: its name, "dense" for the model before
    :param level: the share of the decoder layers' parameters that is to leave
    :param seed: seed of the calibration tokens
    """

    method: str
    level: float
    seed: int


DENSE = Job("dense", 0.0, 0)


def main() -> None:
    parser = common_arguments(__doc__ or "", 32, 16384)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, SPARSEGPT])
    args = parser.parse_args()
    results = Results.resume(args.out.with_suffix(".json"), common_setup(args))
    for identity in results.missing(job._asdict() for job in wanted(args)):
        results.add(identity | measured(args, Job(**identity)))
        inputs.show(args.out.with_suffix(".md"), table(args, results))
    inputs.show(args.out.with_suffix(".md"), table(args, results))


def wanted(args: argparse.Namespace) -> Iterator[Job]:
    """Return the rows to measure, in order."""
    yield DENSE
    methods = [method for method in args.methods if method != SPARSEGPT]
    for seed in args.seeds:
        for level, method in product(args.levels, methods):
            yield Job(method, level, seed)
        if SPARSEGPT in args.methods:
            yield Job(SPARSEGPT, 0.0, seed)


def measured(args: argparse.Namespace, job: Job) -> Row:
    if job == DENSE:
        return measurement(args).run(None, None)
    modifier: Any = recipe("sparsegpt", pattern_of("2:4"))
    kept = None
    if job.method != SPARSEGPT:
        fields = {"sparsity": job.level, "ignore": IGNORE} | METHODS[job.method]
        if args.work is not None:
            kept = args.work / digest([*job, common_setup(args)])
            fields["resume_dir"] = str(kept)
        modifier = FASPPruningModifier(**fields)
    resumes = kept is not None and kept.exists()
    prune = partial(pipeline.prune, recipe=modifier)
    states = kept and kept.with_name(f"{kept.name}-recovery")
    if job.method in RECOVERED:
        prune = partial(prune_and_train, prune=prune, teacher=args.model, states=states)
    row = measurement(args).run(prune, inputs.calibration(args, seed=job.seed))
    if states is not None:
        forget(states)
    left = getattr(modifier, "removed", 0.0) + getattr(modifier, "zeroed", 0.0)
    return row | {"removed": left} | (WITHOUT_TIME if resumes else {})


def table(args: argparse.Namespace, results: Results) -> str:
    """Return the table of all rows that were measured, of this run and earlier ones."""
    dense = results.find(method="dense")
    assert dense is not None
    texts = dense["perplexity"]
    lines = [["", "dense", "", "", *inputs.measures([dense], texts), "", "", ""]]
    rows = [row for row in results.rows if row["method"] != "dense"]
    order = [*METHODS, SPARSEGPT]
    for level in sorted(
        {row["level"] for row in rows}, key=lambda one: one or math.inf
    ):
        for method in order:
            of_seeds = [
                (row, results.find(method=REFERENCE, level=level, seed=row["seed"]))
                for row in rows
                if (row["method"], row["level"]) == (method, level)
            ]
            if of_seeds:
                lines.append(line(level, method, results, of_seeds))
    header = [
        "sparsity",
        "method",
        "seeds",
        "removed",
        *inputs.measures_header(texts),
        "share of the excess",
        "processor time",
        "seconds",
    ]
    return markdown_table(header, lines) + (
        f"\n\n{Path(args.model).name}, {args.samples} × {args.seq_len} tokens of "
        f"{Path(args.calibration).name}, {args.eval_tokens} tokens of each text. "
        f"{inputs.AGREEMENT} Share of the excess: of that of {REFERENCE} without "
        "restoration, at the same level with the same tokens, mean of the texts and "
        "seeds. Removed: with values that are zeros in place. Processor time: of "
        f"calibration, pruning and recovery, as a ratio to that of {SPARSEGPT} with "
        "the same seed. Seconds: of the seed that was measured last, with whatever "
        "else ran then.\n"
    )


def line(
    level: float, method: str, results: Results, of_seeds: list[tuple[Row, Row | None]]
) -> list[str]:
    dense = results.find(method="dense")
    assert dense is not None
    texts = dense["perplexity"]
    found = [row for row, _ in of_seeds]
    shares = [
        excess(row, dense, text) / excess(reference, dense, text)
        for row, reference in of_seeds
        for text in texts
        if reference is not None
    ]
    return [
        f"{100 * level:g} %" if level else "",
        method,
        str(len(found)),
        f"{100 * fmean(row['removed'] for row in found):.1f} %",
        *inputs.measures(found, texts),
        f"{fmean(shares):.2f}" if shares else "",
        ratio(found, results),
        mean_seconds(found[-1:]),
    ]


def ratio(rows: list[Row], results: Results) -> str:
    """Return the mean of the rows' processor times, in SparseGPT's with their seeds."""
    key = "processor_seconds"
    ratios = [
        row[key] / reference[key]
        for row in rows
        for reference in [results.find(method=SPARSEGPT, seed=row["seed"]) or {}]
        if row.get(key) and reference.get(key)
    ]
    return f"{fmean(ratios):.2f}" if ratios else ""


if __name__ == "__main__":
    main()
