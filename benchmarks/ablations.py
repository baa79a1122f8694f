"""
The worth of each part of the method. One field of the recipe changes at a time.

Every variant sees the same calibration tokens, apart from those that change their
number. To save time, only every third decoder layer is pruned (--every). Results are
added to OUT.json as they come, and OUT.md is the table; what OUT.json has already is
not measured again.

    python benchmarks/ablations.py --model DIR --calibration FILE.txt --text FILE.txt \\
        --samples 32 --out benchmarks/results/ablations
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from statistics import fmean
from typing import Any

import inputs
from compare import common_arguments, common_setup, measure

from fista_modifier import pipeline
from fista_modifier.evaluation.formatting import markdown_table
from fista_modifier.evaluation.methods import recipe, warm_starts
from fista_modifier.evaluation.results import Results, Row
from fista_modifier.solver import pattern_of

SAMPLES = "samples"
PATTERN = "pattern"

# the tables and figures of the paper that a group corresponds to are in its name
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "default": [{}],
    "presets": [{"preset": "best"}, {"preset": "fast"}, {"preset": "paper"}],
    "warm start (Table 11)": [
        {"warm_start": start} for start in ("dense", "magnitude", "wanda", "sparsegpt")
    ],
    "error correction (Tables 12 to 15)": [
        {"error_correction": "none"},
        {"error_correction": "full"},
        {"preset": "paper", "error_correction": "none"},
        {"preset": "paper", "error_correction": "full"},
    ],
    "parts": [
        {"column_scaling": False},
        {"refit": False},
        {"patience": 0},
        {"admm_steps": 40},
    ],
    "damping": [{"dampening_frac": value} for value in (0.01, 0.1, 1.0)],
    "reconstruction": [
        {"reconstruction_epochs": 0},
        {"reconstruction_epochs": 0.5},
        {"reconstruction_epochs": 2},
        {"reconstruction_rate": 0.003},
        {"reconstruction_rate": 0.03},
        {"preset": "fast", "reconstruction_epochs": 1},
        {"preset": "paper", "reconstruction_epochs": 1},
        {"preset": "paper", "patience": 0, "reconstruction_epochs": 1},
    ],
    "calibration size (Figure 4b)": [{SAMPLES: count} for count in (8, 16, 64)],
    "sparsity (Figure 3)": [
        {PATTERN: pattern} for pattern in ("0.3", "0.4", "0.5", "0.6", "0.7", "4:8")
    ],
}


def pruned(args: argparse.Namespace, variant: dict[str, Any] | None) -> Row:
    """
    Prune by the default with some fields changed, and measure the model. Without a
    variant, only measure the dense model.
    """
    if variant is None:
        return measure(args, None, args.samples, args.seed)
    fields = dict(variant) | {"ignore": inputs.ignored(args)}
    samples = fields.pop(SAMPLES, args.samples)
    pattern = fields.pop(PATTERN, args.pattern)
    prune = partial(
        pipeline.prune, recipe=recipe("fista", pattern_of(pattern), **fields)
    )
    return measure(args, prune, samples, args.seed)


def table(results: Results) -> str:
    """Return the table in Markdown, with a row for each variant."""
    setup, dense = results.setup, results.find(variant=None)
    if dense is None:
        return ""
    texts = list(dense["perplexity"])
    header = ["", "changed", *texts, "excess", "vs default", "time vs default"]
    lines = [
        ["dense", "", *(f"{dense['perplexity'][text]:.2f}" for text in texts), "0"]
    ]

    def excess(row: Row) -> float:
        return fmean(
            math.log(row["perplexity"][text] / dense["perplexity"][text])
            for text in texts
        )

    default = results.find(variant={})
    for group, variants in VARIANTS.items():
        for variant in variants:
            row = results.find(variant=variant)
            if row is None:
                continue
            changed = ", ".join(f"{key}: {value}" for key, value in variant.items())
            cells = [group, f"`{changed}`" if changed else ""]
            cells += [f"{row['perplexity'][text]:.2f}" for text in texts]
            cells.append(f"{excess(row):.3f}")
            if default:
                cells.append(f"{excess(row) / excess(default):.3f}")
                cells.append(_ratio(row["seconds"], default["seconds"]))
            lines.append(cells)
    return (
        markdown_table(header, lines)
        + f"\n\nModel {setup['model']}, {setup['pattern']} where nothing else is said, "
        f"{setup['samples']} × {setup['seq_len']} tokens of {setup['calibration']} "
        f"(seed {setup['seed']}), one decoder layer of {setup['every']} pruned; "
        f"perplexity in blocks of {setup['eval_seq_len']} tokens over the first "
        f"{setup['eval_tokens']} tokens. Excess is "
        f"ln(ppl / ppl of dense), mean of the texts. {warm_starts()}\n"
    )


def _ratio(one: float | None, other: float | None) -> str:
    """Return a ratio of times; empty if one was taken beside other work."""
    return f"{one / other:.2f}" if one and other else ""


def setup(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that all results of this table share."""
    own = {key: getattr(args, key) for key in ("pattern", "seed", "every")}
    return common_setup(args) | own


def main() -> None:
    parser = common_arguments(__doc__, 32, 16384)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--groups", nargs="+", default=list(VARIANTS))
    args = parser.parse_args()
    results = Results.resume(args.out.with_suffix(".json"), setup(args))
    chosen = [variant for group in args.groups for variant in VARIANTS[group]]
    for row in results.missing({"variant": one} for one in (None, *chosen)):
        results.add(row | pruned(args, row["variant"]))
        inputs.show(args.out.with_suffix(".md"), table(results))


if __name__ == "__main__":
    main()
