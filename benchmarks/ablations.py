"""
What each part of the method is worth: one field of the recipe changed at a time.

Every variant sees the same calibration tokens, apart from those that change their
number. Results are added to OUT.json as they come, and OUT.md is the table; what
OUT.json has already is not measured again.

    python benchmarks/ablations.py --model DIR --calibration FILE.txt --text FILE.txt \\
        --samples 32 --out benchmarks/results/ablations
"""

from __future__ import annotations

import argparse
import math
from statistics import fmean
from typing import Any

from compare import (
    common_arguments,
    common_setup,
    in_own_process,
    pattern_fields,
    pruned_and_evaluated,
    resumed,
    save,
)

SAMPLES = "samples"
PATTERN = "pattern"

# the tables and figures of the paper that a group corresponds to are in its name
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "default": [{}],
    "presets": [{"preset": "fast"}, {"preset": "paper"}],
    "warm start (Table 11)": [
        {"warm_start": start} for start in ("dense", "magnitude", "wanda", "sparsegpt")
    ],
    "error correction (Tables 12 to 15)": [
        {"error_correction": "none"},
        {"error_correction": "full"},
    ],
    "parts": [
        {"column_scaling": False},
        {"refit": False},
        {"patience": 0},
        {"admm_steps": 40},
    ],
    "damping": [{"dampening_frac": value} for value in (0.01, 0.03, 0.3)],
    "reconstruction": [
        {"reconstruction_epochs": 0},
        {"reconstruction_epochs": 0.5},
        {"reconstruction_epochs": 2},
        {"reconstruction_rate": 0.003},
        {"reconstruction_rate": 0.03},
    ],
    "calibration size (Figure 4b)": [{SAMPLES: count} for count in (8, 16, 64)],
    "sparsity (Figure 3)": [
        {PATTERN: pattern} for pattern in ("0.3", "0.4", "0.5", "0.6", "0.7", "4:8")
    ],
}


def measure(args: argparse.Namespace, variant: dict[str, Any] | None) -> dict[str, Any]:
    """Prune by the default with some fields changed; None only evaluates."""
    from fista_modifier import FISTAPruningModifier

    if variant is None:
        return pruned_and_evaluated(args, None, args.samples, args.seed)
    changed = dict(variant)
    samples = changed.pop(SAMPLES, args.samples)
    fields = pattern_fields(changed.pop(PATTERN, args.pattern)) | changed
    recipe = FISTAPruningModifier(**fields)
    return pruned_and_evaluated(args, recipe, samples, args.seed)


def table(report: dict[str, Any]) -> str:
    """Markdown: a row for each variant."""
    setup, dense = report["setup"], report["dense"]
    texts = list(dense["perplexity"])
    header = ["", "changed", *texts, "excess", "vs default", "time vs default"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    cells = [f"{dense['perplexity'][text]:.2f}" for text in texts]
    lines.append("| dense | | " + " | ".join(cells) + " | 0 | | |")

    def excess(row: dict[str, Any]) -> float:
        return fmean(
            math.log(row["perplexity"][text] / dense["perplexity"][text])
            for text in texts
        )

    default = next((row for row in report["rows"] if not row["variant"]), None)
    for group, variants in VARIANTS.items():
        for variant in variants:
            row = next((r for r in report["rows"] if r["variant"] == variant), None)
            if row is None:
                continue
            changed = ", ".join(f"{key}: {value}" for key, value in variant.items())
            cells = [group, f"`{changed}`" if changed else ""]
            cells += [f"{row['perplexity'][text]:.2f}" for text in texts]
            cells.append(f"{excess(row):.3f}")
            if default:
                cells.append(f"{excess(row) / excess(default):.3f}")
                cells.append(f"{row['seconds'] / default['seconds']:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Model {setup['model']}, {setup['pattern']} where nothing else is said, "
        f"{setup['samples']} × {setup['seq_len']} tokens of {setup['calibration']} "
        f"(seed {setup['seed']}); perplexity in blocks of {setup['eval_seq_len']} "
        f"tokens over the first {setup['eval_tokens']} tokens. Excess is "
        "ln(ppl / ppl of dense), mean of the texts.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = common_arguments(__doc__.split("\n\n")[0], 32, 16384)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", nargs="+", default=list(VARIANTS))
    args = parser.parse_args()
    setup = common_setup(args) | {"pattern": args.pattern, "seed": args.seed}
    report = resumed(args.out, setup)
    if "dense" not in report:
        report["dense"] = in_own_process(measure, args, None)
    for group in args.groups:
        for variant in VARIANTS[group]:
            if any(row["variant"] == variant for row in report["rows"]):
                continue
            row = {"variant": variant} | in_own_process(measure, args, variant)
            report["rows"].append(row)
            save(args.out, report, table(report))


if __name__ == "__main__":
    main()
