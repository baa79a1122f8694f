"""
What each part of the solver is worth, on single operators of a real model.

Squared relative output error ‖W*X − WX‖² / ‖WX‖² of several operators, X* = X, for
SparseGPT, Algorithm 1 as published, and the default preset with one part left out.

    python benchmarks/operators.py --model DIR --calibration FILE.txt \\
        --out benchmarks/results/operators.md
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from fista_modifier import pipeline
from fista_modifier.data import calibration_dataset
from fista_modifier.solver import (
    PAPER,
    GramStatistics,
    SolverOptions,
    parse_pattern,
    prune_weight,
)

OPERATORS = (
    "model.layers.3.self_attn.q_proj",
    "model.layers.3.mlp.up_proj",
    "model.layers.3.mlp.down_proj",
    "model.layers.15.self_attn.o_proj",
)
DEFAULT = SolverOptions()
VARIANTS = {
    "paper": PAPER,
    "paper + scaling": replace(PAPER, column_scaling=True),
    "paper + scaling + refit": replace(DEFAULT, start="sparsegpt"),
    "the same from dense weights": replace(DEFAULT, start="dense"),
    "default (from ADMM)": DEFAULT,
}


def gram_matrices(
    model: torch.nn.Module, blocks: torch.Tensor
) -> dict[str, GramStatistics]:
    """Of the inputs of OPERATORS in one pass over the blocks."""
    statistics = {}
    for name in OPERATORS:
        module = model.get_submodule(name)
        statistics[name] = GramStatistics.empty(module.in_features)

        def accumulate(_module, args, name=name):
            statistics[name].accumulate(args[0].flatten(0, 1))

        module.register_forward_pre_hook(accumulate)
    with torch.no_grad():
        for block in blocks.split(4):
            model(block)
    return statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = pipeline.load_tokenizer(args.model)
    model = pipeline.load_model(args.model, "float32")
    calibration = calibration_dataset(
        args.calibration, tokenizer, samples=args.samples, seq_len=args.seq_len
    )
    statistics = gram_matrices(model, torch.tensor(calibration["input_ids"]))
    names = [name.removeprefix("model.layers.") for name in OPERATORS]
    lines = [
        "| pattern | solver | " + " | ".join(names) + " | seconds |",
        "| --- | --- |" + " --- |" * (len(names) + 1),
    ]
    for pattern in (parse_pattern("2:4", None), parse_pattern("0:0", 0.5)):
        for variant, options in VARIANTS.items():
            solutions = []
            started = time.perf_counter()
            for name in OPERATORS:
                weight = model.get_submodule(name).weight.detach()
                solutions.append(
                    prune_weight(weight, statistics[name], pattern, options)
                )
            seconds = time.perf_counter() - started
            if variant == "paper":
                cells = [f"{s.relative_start_error**2:.4f}" for s in solutions]
                lines.append(f"| {pattern} | SparseGPT | " + " | ".join(cells) + " | |")
            cells = [f"{s.relative_error**2:.4f}" for s in solutions]
            cells.append(f"{seconds:.0f}")
            lines.append(f"| {pattern} | {variant} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    lines += [
        "",
        f"{Path(args.model).name}, {args.samples} × {args.seq_len} tokens of "
        f"{Path(args.calibration).name}. Seconds are of all four operators together, "
        "warm start included.",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
