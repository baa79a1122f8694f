"""
FISTAPruner beside the toolkit's own pruners: perplexity, time, memory.

Every method sees the same calibration tokens, in the same order, in one run of this
script; each runs in a process of its own, so that its peak memory is its own. Results
are added to OUT.json as they come, and OUT.md is the table; what OUT.json has already
is not measured again.

    python benchmarks/compare.py --model DIR --calibration FILE.txt --text FILE.txt \\
        --samples 128 --seq-len 512 --out benchmarks/results/compare

Methods run with their own defaults; "fista-paper" is Algorithm 1 as published. "alps"
and "boza" are the solvers of peers.py in the place of this project's.
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
from pathlib import Path
from typing import Any

METHODS = (
    "wanda",
    "sparsegpt",
    "boza",
    "alps",
    "fista-paper",
    "fista-fast",
    "fista-full",
    "fista",
)
PATTERNS = ("2:4", "0.5")


def modifier(method: str, pattern: str) -> Any:
    """The recipe of a method, its own defaults apart from the sparsity."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    from fista_modifier import FISTAPruningModifier

    structure = pattern if ":" in pattern else "0:0"
    keep, group = (int(part) for part in structure.split(":"))
    sparsity = 1 - keep / group if group else float(pattern)
    fields = {
        "sparsity": sparsity,
        "mask_structure": structure,
        "targets": ["Linear"],
        "ignore": ["re:.*lm_head"],
    }
    match method:
        case "wanda":
            return WandaPruningModifier(**fields)
        case "sparsegpt":
            return SparseGPTModifier(**fields)
        case "fista" | "alps" | "boza":
            return FISTAPruningModifier(**fields)
        case "fista-paper":
            return FISTAPruningModifier(**fields, preset="paper")
        case "fista-fast":
            return FISTAPruningModifier(**fields, preset="fast")
        case "fista-full":
            return FISTAPruningModifier(**fields, error_correction="full")
    raise ValueError(f"method '{method}' is none of {METHODS}")


def measure(args: argparse.Namespace, method: str, pattern: str) -> dict[str, Any]:
    """Prune by one method and evaluate; "dense" only evaluates."""
    import peers

    from fista_modifier import layer, pipeline
    from fista_modifier.data import calibration_dataset
    from fista_modifier.evaluation.perplexity import perplexity

    solvers = {"alps": peers.ALPS, "boza": peers.Boza}
    layer.StageSolver = solvers.get(method, layer.StageSolver)
    tokenizer = pipeline.load_tokenizer(args.model)
    model = pipeline.load_model(args.model, "float32")
    row: dict[str, Any] = {"method": method, "pattern": pattern, "seed": args.seed}
    if method != "dense":
        calibration = calibration_dataset(
            args.calibration,
            tokenizer,
            samples=args.samples,
            seq_len=args.seq_len,
            seed=args.seed,
        )
        run = pipeline.prune(model, tokenizer, calibration, modifier(method, pattern))
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
    """Markdown: a row for each method and pattern."""
    texts = list(report["rows"][0]["perplexity"])
    rows = sorted(
        report["rows"],
        key=lambda row: (row["pattern"], ("dense", *METHODS).index(row["method"])),
    )
    dense = next(row for row in rows if row["method"] == "dense")
    header = ["pattern", "method", *texts]
    header += [f"excess vs SparseGPT, {text}" for text in texts]
    header += ["time", "time vs SparseGPT", "peak memory", "zeros"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        peer = next(
            (
                other
                for other in rows
                if other["method"] == "sparsegpt" and other["pattern"] == row["pattern"]
            ),
            None,
        )
        cells = [row["pattern"], row["method"]]
        cells += [f"{row['perplexity'][text]:.2f}" for text in texts]
        for text in texts:
            excess = math.log(row["perplexity"][text] / dense["perplexity"][text])
            if peer is None or row is dense:
                cells.append("")
                continue
            of_peer = math.log(peer["perplexity"][text] / dense["perplexity"][text])
            cells.append(f"{excess / of_peer:.3f}")
        if row is dense:
            cells += [""] * 4
        else:
            cells.append(f"{row['seconds']:.0f} s")
            cells.append(f"{row['seconds'] / peer['seconds']:.2f}" if peer else "")
            cells.append(f"{row['peak_memory_bytes'] / 2**30:.2f} GiB")
            cells.append(f"{100 * row['zeros']:.2f} %")
        lines.append("| " + " | ".join(cells) + " |")
    setup = report["setup"]
    lines += [
        "",
        f"Model {setup['model']}, calibrated on {setup['samples']} × "
        f"{setup['seq_len']} tokens of {setup['calibration']} (seed {setup['seed']}); "
        f"perplexity in blocks of {setup['eval_seq_len']} tokens"
        + (
            f" over the first {setup['eval_tokens']} tokens."
            if setup["eval_tokens"]
            else "."
        ),
        "Excess is ln(ppl / ppl of dense), as a share of SparseGPT's. Times are of "
        f"calibration and pruning on {setup['cpus']} CPU cores, shared with other "
        "work: only the ratios mean something. Versions: "
        + ", ".join(f"{name} {number}" for name, number in setup["versions"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-seq-len", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    setup = {
        key: getattr(args, key)
        for key in ("samples", "seq_len", "eval_seq_len", "eval_tokens", "seed")
    }
    setup |= {
        "model": Path(args.model).name,
        "calibration": Path(args.calibration).name,
        "cpus": os.cpu_count(),
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "llmcompressor", "compressed-tensors")
        },
    }
    report: dict[str, Any] = {"setup": setup, "rows": []}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.with_suffix(".json").exists():
        earlier = json.loads(args.out.with_suffix(".json").read_text())
        if earlier["setup"] != setup:
            parser.error(f"{args.out}.json was measured with {earlier['setup']}")
        report = earlier
    done = {(row["method"], row["pattern"]) for row in report["rows"]}
    jobs = [("dense", "-")]
    jobs += [(method, pattern) for pattern in args.patterns for method in args.methods]
    for method, pattern in jobs:
        if (method, pattern) in done:
            continue
        report["rows"].append(in_own_process(measure, args, method, pattern))
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        args.out.with_suffix(".md").write_text(table(report))
        print(table(report), flush=True)


if __name__ == "__main__":
    main()
