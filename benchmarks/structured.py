"""
Selectors, restorers and the training of layers, compared on the same calibration tokens
when channels leave the MLPs. The table has how far the ln perplexity is above the dense
model's, as a share of that of Wanda's score without restoration.

    python benchmarks/structured.py --model DIR --calibration FILE.txt \\
        --text FILE.txt FILE.txt --out benchmarks/results/structured
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import inputs
from compare import common_arguments, measurement
from datasets import Dataset
from recovery import train
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fista_modifier import FASPPruningModifier, pipeline
from fista_modifier.evaluation.comparison import excess
from fista_modifier.evaluation.formatting import markdown_table
from fista_modifier.evaluation.methods import IGNORE, recipe
from fista_modifier.evaluation.results import Row
from fista_modifier.recovery.recover import Training
from fista_modifier.solver import pattern_of

REFERENCE = "Wanda's score"
BARE = {"reconstruction_epochs": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    REFERENCE: {"selector": "fasp", "restorer": "none", **BARE},
    "magnitude": {"selector": "magnitude", "restorer": "none", **BARE},
    "FASP, paper": {"preset": "paper"},
    "FASP, paper, recovered": {"preset": "paper"},
    "ZipLM's elimination": {"selector": "greedy", **BARE},
    "SPAP's choice": {"selector": "spap", **BARE},
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
RECOVERED = {"FASP, paper, recovered"}
"""
The methods whose model is trained end to end after the pruning, on the same tokens.
"""
SPARSEGPT = "SparseGPT 2:4"


def main() -> None:
    parser = common_arguments(__doc__ or "", 32, 16384)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, SPARSEGPT])
    args = parser.parse_args()
    file = args.out.with_suffix(".json")
    rows: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for key, made in wanted(args).items():
        if key not in rows:
            rows[key] = measured(args, *made)
            file.write_text(json.dumps(rows, indent=1) + "\n")
            inputs.show(args.out.with_suffix(".md"), table(args, rows))
    inputs.show(args.out.with_suffix(".md"), table(args, rows))


def wanted(args: argparse.Namespace) -> dict[str, tuple[str | None, float, int]]:
    """Return method, level and seed of each row of the table, by the row's key."""
    found: dict[str, tuple[str | None, float, int]] = {"dense": (None, 0.0, 0)}
    for seed in args.seeds:
        for level in args.levels:
            for method in args.methods:
                if method != SPARSEGPT:
                    found[f"{method} | {level} | {seed}"] = (method, level, seed)
        if SPARSEGPT in args.methods:
            found[f"{SPARSEGPT} | 0 | {seed}"] = (SPARSEGPT, 0.0, seed)
    return found


def measured(
    args: argparse.Namespace, method: str | None, level: float, seed: int
) -> Row:
    if method is None:
        return measurement(args).run(None, None)
    modifier: Any = recipe("sparsegpt", pattern_of("2:4"))
    if method != SPARSEGPT:
        fields = {"sparsity": level, "ignore": IGNORE} | METHODS[method]
        modifier = FASPPruningModifier(**fields)
    prune = partial(pipeline.prune, recipe=modifier)
    if method in RECOVERED:
        prune = partial(recovered, modifier=modifier, teacher=args.model)
    row = measurement(args).run(prune, inputs.calibration(args, seed=seed))
    return row | {"removed": getattr(modifier, "removed", 0.0)}


def recovered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Dataset,
    *,
    modifier: FASPPruningModifier,
    teacher: str,
) -> pipeline.PruningRun:
    """Prune, and train what is left on the same tokens."""
    pipeline.prune(model, tokenizer, calibration, modifier)
    return train(model, calibration, teacher, Training())


def table(args: argparse.Namespace, rows: dict[str, Any]) -> str:
    dense = rows["dense"]
    texts = dense["perplexity"]
    lines = [["", "dense", "", *(f"{value:.2f}" for value in texts.values()), "", ""]]
    for level in [*args.levels, 0]:
        for method in [*METHODS, SPARSEGPT]:
            of_seeds = [
                (rows[key], rows.get(f"{REFERENCE} | {level} | {seed}", {}))
                for seed in args.seeds
                if (key := f"{method} | {level} | {seed}") in rows
            ]
            if of_seeds:
                lines.append(line(level, method, dense, of_seeds))
    header = ["sparsity", "method", "removed", *texts, "share of the excess", "seconds"]
    return markdown_table(header, lines) + (
        f"\n\n{Path(args.model).name}, {args.samples} × {args.seq_len} tokens of "
        f"{Path(args.calibration).name}, {args.eval_tokens} tokens of each text. Share "
        f"of the excess: of that of {REFERENCE} without restoration, at the same level "
        "with the same tokens, mean of the texts and seeds.\n"
    )


def line(
    level: float, method: str, dense: Row, of_seeds: list[tuple[Row, Row]]
) -> list[str]:
    texts = dense["perplexity"]
    found = [row for row, _ in of_seeds]
    values = [fmean(row["perplexity"][text] for row in found) for text in texts]
    shares = [
        excess(row, dense, text) / excess(reference, dense, text)
        for row, reference in of_seeds
        for text in texts
        if reference
    ]
    return [
        f"{100 * level:g} %" if level else "",
        method,
        f"{100 * fmean(row['removed'] for row in found):.1f} %",
        *(f"{value:.2f}" for value in values),
        f"{fmean(shares):.2f}" if shares else "",
        f"{fmean(row['seconds'] for row in found):.0f}",
    ]


if __name__ == "__main__":
    main()
