"""
FISTAPruner beside the toolkit's own pruners: perplexity, time, memory.

Every method sees the same calibration tokens, in the same order, in one run of this
script; each runs in a process of its own, so that its peak memory is its own. Results
are added to OUT.json as they come, and OUT.md is the table; what OUT.json has already
is not measured again. With --work FOLDER the layers that FISTAPruner has finished are
kept there, and an interrupted method goes on; it has no time then.

    python benchmarks/compare.py --model DIR --calibration FILE.txt --text FILE.txt \\
        --samples 128 --seq-len 512 --seeds 0 1 2 --out benchmarks/results/compare

Methods run with their own defaults. "fista-paper" is Algorithm 1 as published,
"fista-operators" is the default without reconstruction of layers, "fista-dense" is the
same from dense weights, and "sparsegpt-damped" is SparseGPT with forty times its
damping. "alps" and "boza" are the solvers of peers.py in the place of this project's,
without reconstruction.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import inputs
import peers

from fista_modifier import pipeline
from fista_modifier.evaluation.comparison import (
    DENSE,
    Measurement,
    comparison_table,
    identities,
    in_own_process,
)
from fista_modifier.evaluation.methods import FISTA_METHODS, Pruner, recipe
from fista_modifier.evaluation.results import Results, Row
from fista_modifier.evaluation.texts import load_texts
from fista_modifier.host import package_versions
from fista_modifier.solver import SolverFactory, pattern_of

SOLVERS: dict[str, SolverFactory] = {"alps": peers.ALPS, "boza": peers.Boza}
# one of the package's own methods, and the fields of its recipe that differ
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "boza": ("fista", {"reconstruction_epochs": 0}),
    "alps": ("fista", {"reconstruction_epochs": 0}),
    "fista-dense": ("fista", {"warm_start": "dense", "reconstruction_epochs": 0}),
    "fista-operators": ("fista", {"reconstruction_epochs": 0}),
    "sparsegpt-damped": ("sparsegpt", {"dampening_frac": 0.4}),
}
METHODS = ("wanda", "sparsegpt", *FISTA_METHODS, *VARIANTS)
PATTERNS = ("2:4", "0.5")
WITHOUT_TIME = {"seconds": None, "processor_seconds": None}
# without this package's own version: a row takes hours, and README.md says which rows
# of a committed table are older than the others
PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors")


def method_pruner(method: str, pattern: str, layers: Path | None = None) -> Pruner:
    """
    Return a method of the package, or one that only the benchmarks have.

    :param method: one of ``METHODS``
    :param pattern: the pattern to prune to
    :param layers: the folder for finished layers, where the method can keep them
    :return: the method, which can be pickled
    """
    base, fields = VARIANTS.get(method, (method, {}))
    if layers is not None and base in FISTA_METHODS:
        fields = fields | {"resume_dir": str(layers)}
    modifier = recipe(base, pattern_of(pattern), **fields)
    if method in SOLVERS:
        modifier = modifier.with_solver(SOLVERS[method])
    return partial(pipeline.prune, recipe=modifier)


def common_arguments(
    documentation: str, samples: int, eval_tokens: int | None
) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark, and those of evaluation."""
    parser = inputs.arguments(documentation, samples)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--eval-seq-len", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=eval_tokens)
    return parser


def common_setup(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that all results of one table share."""
    keys = ("samples", "seq_len", "eval_seq_len", "eval_tokens")
    return {key: getattr(args, key) for key in keys} | {
        "model": Path(args.model).name,
        "calibration": Path(args.calibration).name,
    }


def measure(
    args: argparse.Namespace, prune: Pruner | None, samples: int, seed: int
) -> Row:
    """Prune and measure in a process of its own. Without a pruner, only measure."""
    calibration = inputs.calibration(args, samples, seed)
    return in_own_process(measurement(args).run, prune, calibration)


def measurement(args: argparse.Namespace) -> Measurement:
    """Return the measurement of the model on the texts that the options name."""
    texts = load_texts(args.text)
    return Measurement(
        args.model, texts, args.eval_seq_len, args.eval_tokens, "float32"
    )


def resumed(args: argparse.Namespace, setup: dict[str, Any]) -> Results:
    """Return the results of OUT.json, with those of the dense model as the first."""
    results = Results.resume(args.out.with_suffix(".json"), setup)
    if not results.find(method=DENSE):
        results.add({"method": DENSE} | measurement(args).run(None, None))
    return results


def setup(args: argparse.Namespace) -> dict[str, Any]:
    """
    Return the settings that all results share. The machine is one of them, because the
    table has times and memory.
    """
    return common_setup(args) | {
        "cpus": os.cpu_count(),
        "versions": package_versions(*PACKAGES),
    }


def main() -> None:
    parser = common_arguments(__doc__, 128, None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    results = Results.resume(args.out.with_suffix(".json"), setup(args))
    for row in results.missing(identities(args.methods, args.patterns, args.seeds)):
        results.add(row | measured_row(args, row))
        inputs.show(args.out.with_suffix(".md"), comparison_table(results))


def measured_row(args: argparse.Namespace, row: Row) -> Row:
    """Return the figures of a row of the table."""
    if row["method"] == DENSE:
        return measure(args, None, args.samples, 0)
    prune, resumes = resumable_pruner(args.work, args.model, row)
    found = measure(args, prune, args.samples, row["seed"])
    return found | (WITHOUT_TIME if resumes else {})


def resumable_pruner(work: Path | None, model: str, row: Row) -> tuple[Pruner, bool]:
    """
    Return the method of a row.

    :param work: the folder for finished layers; None for none
    :param model: the folder of the model
    :param row: has the method, the pattern and the seed
    :return: the method, and whether some of its layers are finished already
    """
    method, pattern = row["method"], row["pattern"]
    if work is None:
        return method_pruner(method, pattern), False
    name = f"{Path(model).name}-{method}-{pattern}-{row['seed']}".replace(":", "of")
    return method_pruner(method, pattern, work / name), (work / name).exists()


if __name__ == "__main__":
    main()
