"""
FISTAPruner beside the toolkit's own pruners: perplexity, time, memory.

Every method sees the same calibration tokens, in the same order, in one run of this
script; each runs in a process of its own, so that its peak memory is its own. Results
are added to OUT.json as they come, and OUT.md is the table; what OUT.json has already
is not measured again.

    python benchmarks/compare.py --model DIR --calibration FILE.txt --text FILE.txt \\
        --samples 128 --seq-len 512 --seeds 0 1 2 --out benchmarks/results/compare

Methods run with their own defaults. "fista-paper" is Algorithm 1 as published,
"fista-operators" the default without reconstruction of layers, "fista-dense" that from
dense weights. "alps" and "boza" are the solvers of peers.py in the place of this
project's, without reconstruction.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

WARM_STARTS = {
    "dense": "",
    "wanda": "",
    "sparsegpt": "",
    "boza": "dense",
    "alps": "dense",
    "fista-paper": "SparseGPT",
    "fista-dense": "dense",
    "fista-fast": "ADMM",
    "fista-operators": "ADMM",
    "fista": "ADMM",
}
METHODS = tuple(method for method in WARM_STARTS if method != "dense")
PATTERNS = ("2:4", "0.5")


def pattern_fields(pattern: str) -> dict[str, Any]:
    """What the recipes of all methods have in common."""
    structure = pattern if ":" in pattern else "0:0"
    keep, group = (int(part) for part in structure.split(":"))
    return {
        "sparsity": 1 - keep / group if group else float(pattern),
        "mask_structure": structure,
        "targets": ["Linear"],
        "ignore": ["re:.*lm_head"],
    }


def modifier(method: str, pattern: str) -> Any:
    """The recipe of a method, its own defaults apart from the sparsity."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    from fista_modifier import FISTAPruningModifier

    fields = pattern_fields(pattern)
    match method:
        case "wanda":
            return WandaPruningModifier(**fields)
        case "sparsegpt":
            return SparseGPTModifier(**fields)
        case "fista":
            return FISTAPruningModifier(**fields)
        case "fista-paper":
            return FISTAPruningModifier(**fields, preset="paper")
        case "fista-fast":
            return FISTAPruningModifier(**fields, preset="fast")
        case "fista-operators" | "alps" | "boza":
            return FISTAPruningModifier(**fields, reconstruction_epochs=0)
        case "fista-dense":
            return FISTAPruningModifier(
                **fields, warm_start="dense", reconstruction_epochs=0
            )
    raise ValueError(f"method '{method}' is none of {METHODS}")


def measure(
    args: argparse.Namespace, method: str, pattern: str, seed: int | None
) -> dict[str, Any]:
    """Prune by one method and evaluate; "dense" only evaluates."""
    import peers

    from fista_modifier import layer

    solvers = {"alps": peers.ALPS, "boza": peers.Boza}
    layer.StageSolver = solvers.get(method, layer.StageSolver)
    recipe = None if method == "dense" else modifier(method, pattern)
    row = {"method": method, "pattern": pattern, "seed": seed}
    return row | pruned_and_evaluated(args, recipe, args.samples, seed or 0)


def pruned_and_evaluated(
    args: argparse.Namespace, recipe: Any, samples: int, seed: int
) -> dict[str, Any]:
    """What a recipe costs and what it leaves of the model; None leaves all of it."""
    from fista_modifier import pipeline
    from fista_modifier.data import calibration_dataset
    from fista_modifier.evaluation.perplexity import perplexity

    tokenizer = pipeline.load_tokenizer(args.model)
    model = pipeline.load_model(args.model, "float32")
    row: dict[str, Any] = {}
    if recipe is not None:
        calibration = calibration_dataset(
            args.calibration,
            tokenizer,
            samples=samples,
            seq_len=args.seq_len,
            seed=seed,
        )
        run = pipeline.prune(model, tokenizer, calibration, recipe)
        row["seconds"] = run.seconds
        row["zeros"] = _zeros(model)
        row["peak_memory_bytes"] = _peak_memory()
        if run.results:
            count = len(run.results)
            row["solver_seconds"] = sum(r.seconds for r in run.results)
            row["mean_squared_relative_error"] = (
                sum(r.relative_error**2 for r in run.results) / count
            )
    row["perplexity"] = {}
    for text in args.text:
        started = time.perf_counter()
        result = perplexity(
            model,
            tokenizer,
            Path(text).read_text(),
            seq_len=args.eval_seq_len,
            max_tokens=args.eval_tokens,
        )
        row["perplexity"][Path(text).stem] = result.value
        row["eval_seconds"] = time.perf_counter() - started
    return row


def _zeros(model: Any) -> float:
    """Share of zeros in the decoder layers' linear operators."""
    import torch

    weights = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    ]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


def _peak_memory() -> int:
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _child(function: Callable[..., Any], queue: Any, *arguments: Any) -> None:
    queue.put(function(*arguments))


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a fresh interpreter and return its result."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(
        target=_child, args=(function, queue, *arguments), daemon=True
    )
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{arguments[1:]} ended with status {process.exitcode}")
    return queue.get()


def table(report: dict[str, Any]) -> str:
    """Markdown: a row for each pattern and method, the mean over the seeds."""
    texts = list(report["rows"][0]["perplexity"])
    [dense] = [row for row in report["rows"] if row["method"] == "dense"]
    header = ["pattern", "method", "warm start", "seeds", *texts]
    header += [f"excess, {text}" for text in texts]
    header += ["excess", "its range", "time", "peak memory", "zeros"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    cells = [f"{dense['perplexity'][text]:.2f}" for text in texts]
    lines.append("| | dense | | | " + " | ".join(cells) + " |" + " |" * 7)
    for pattern in sorted({row["pattern"] for row in report["rows"]} - {"-"}):
        for method in METHODS:
            rows = [
                row
                for row in report["rows"]
                if row["method"] == method and row["pattern"] == pattern
            ]
            if rows:
                cells = [pattern, method, WARM_STARTS[method]]
                cells += _cells(rows, dense, report["rows"], texts)
                lines.append("| " + " | ".join(cells) + " |")
    setup = report["setup"]
    lines += [
        "",
        f"Model {setup['model']}, calibrated on {setup['samples']} × "
        f"{setup['seq_len']} tokens of {setup['calibration']}; perplexity in blocks of "
        f"{setup['eval_seq_len']} tokens"
        + (
            f" over the first {setup['eval_tokens']} tokens."
            if setup["eval_tokens"]
            else "."
        ),
        "Excess is ln(ppl / ppl of dense), as a share of SparseGPT's with the same "
        "calibration tokens; then the mean over the texts, and the lowest and highest "
        "of a seed. Perplexities are geometric means over the seeds. Times are of "
        "calibration and pruning, as ratios to SparseGPT's, on "
        f"{setup['cpus']} CPU cores shared with other work. Versions: "
        + ", ".join(f"{name} {number}" for name, number in setup["versions"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _cells(
    rows: list[dict[str, Any]],
    dense: dict[str, Any],
    every: list[dict[str, Any]],
    texts: list[str],
) -> list[str]:
    """The figures of one method and pattern, a row for each seed."""

    def excess(row: dict[str, Any], text: str) -> float:
        return math.log(row["perplexity"][text] / dense["perplexity"][text])

    peers = {
        row["seed"]: row
        for row in every
        if row["method"] == "sparsegpt" and row["pattern"] == rows[0]["pattern"]
    }
    cells = [str(len(rows))]
    for text in texts:
        log = fmean(math.log(row["perplexity"][text]) for row in rows)
        cells.append(f"{math.exp(log):.2f}")
    compared = [(row, peers[row["seed"]]) for row in rows if row["seed"] in peers]
    if not compared:
        return cells + [""] * (len(texts) + 5)
    shares = [
        [excess(row, text) / excess(peer, text) for text in texts]
        for row, peer in compared
    ]
    cells += [f"{fmean(column):.3f}" for column in zip(*shares, strict=True)]
    means = [fmean(share) for share in shares]
    cells.append(f"{fmean(means):.3f}")
    cells.append(f"{min(means):.3f}–{max(means):.3f}")
    ratio = fmean(row["seconds"] / peer["seconds"] for row, peer in compared)
    cells.append(f"{ratio:.2f}")
    peak = max(row["peak_memory_bytes"] for row in rows)
    cells.append(f"{peak / 2**30:.2f} GiB")
    cells.append(f"{100 * fmean(row['zeros'] for row in rows):.2f} %")
    return cells


def common_arguments(
    description: str, samples: int, eval_tokens: int | None
) -> argparse.ArgumentParser:
    """What is pruned, on what it is calibrated and evaluated, where results go."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-seq-len", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=eval_tokens)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def common_setup(args: argparse.Namespace) -> dict[str, Any]:
    """What results must share to stand in one table."""
    keys = ("samples", "seq_len", "eval_seq_len", "eval_tokens")
    return {key: getattr(args, key) for key in keys} | {
        "model": Path(args.model).name,
        "calibration": Path(args.calibration).name,
    }


def resumed(out: Path, setup: dict[str, Any]) -> dict[str, Any]:
    """The report of an earlier run of the same setup, or a new one."""
    file = out.with_suffix(".json")
    if not file.exists():
        return {"setup": setup, "rows": []}
    report: dict[str, Any] = json.loads(file.read_text())
    if report["setup"] != setup:
        raise SystemExit(f"{file} was measured with {report['setup']}")
    return report


def save(out: Path, report: dict[str, Any], markdown: str) -> None:
    """Write and show what there is so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    out.with_suffix(".md").write_text(markdown)
    print(markdown, flush=True)


def main() -> None:
    parser = common_arguments(__doc__.split("\n\n")[0], 128, None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    args = parser.parse_args()

    setup = common_setup(args) | {
        "cpus": os.cpu_count(),
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "llmcompressor", "compressed-tensors")
        },
    }
    report = resumed(args.out, setup)
    jobs: list[tuple[str, str, int | None]] = [("dense", "-", None)]
    jobs += [
        (method, pattern, seed)
        for seed, pattern, method in product(args.seeds, args.patterns, args.methods)
    ]
    done = {(row["method"], row["pattern"], row["seed"]) for row in report["rows"]}
    for job in jobs:
        if job in done:
            continue
        report["rows"].append(in_own_process(measure, args, *job))
        save(args.out, report, table(report))


if __name__ == "__main__":
    main()
