"""
The package on a GPU: its weights beside those of the CPU, and its time and memory.

``agree`` prunes a model on the GPU and, in another process, on the CPU, with the same
tokens. ``speed`` prunes the first layers of a model of a large shape, beside
SparseGPT and beside what ``fista-prune plan`` predicts. Its weights and tokens are
random, as neither time nor memory depends on their values.

    python benchmarks/gpu.py agree --model DIR --calibration FILE.txt --layers 4 \\
        --samples 16 --seq-len 256 --out benchmarks/results/gpu-agreement.md
    python benchmarks/gpu.py speed --shape llama-3-8b --layers 4 \\
        --out benchmarks/results/gpu-8b
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import inputs
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import fista_modifier.pruning.corrected
import fista_modifier.pruning.reconstruction
from fista_modifier import FISTAPruningModifier, pipeline
from fista_modifier.calibration.calls import LayerInputs
from fista_modifier.calibration.stream import PrunedStream
from fista_modifier.cost import DEVICES, peak_device_memory, seconds, shape_of
from fista_modifier.cost.operations import layer_cost
from fista_modifier.evaluation.comparison import in_own_process
from fista_modifier.evaluation.formatting import markdown_table
from fista_modifier.evaluation.methods import FISTA_METHODS, recipe
from fista_modifier.pruning.presets import PRESETS
from fista_modifier.solver import FISTAPruner, pattern_of

SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
METHODS = ("sparsegpt", "fista-fast", "fista", "fista-best", "fista-paper")
PHASES = {
    "sums": [(fista_modifier.pruning.corrected, "wave_statistics")],
    "blocks' inputs": [(LayerInputs, "of_block"), (PrunedStream, "advance")],
    "solver": [(FISTAPruner, "__init__"), (FISTAPruner, "prune")],
    "reconstruction": [(fista_modifier.pruning.reconstruction, "reconstruct")],
}


# agree

Case = tuple[str, str, str]
CASES: list[Case] = [
    (dtype, pattern, preset)
    for dtype in ("float32", "bfloat16")
    for pattern in ("2:4", "0.5")
    for preset in PRESETS
]


@dataclass(frozen=True)
class Outcome:
    """
    The outcome of the pruning of one operator.

    :param support: the support, bool out×in, on the CPU
    :param error: the error as the solver left it
    :param stored: the error of the weight as it is stored
    """

    support: Tensor
    error: float
    stored: float


def pruned(args: argparse.Namespace, case: Case) -> dict[str, Outcome]:
    dtype, pattern, preset = case
    model = inputs.first_layers(args.model, args.layers).to(getattr(torch, dtype))
    modifier = FISTAPruningModifier(
        preset=preset, ignore=["re:.*lm_head"], mask_structure=pattern
    )
    run = pipeline.prune(
        model, pipeline.load_tokenizer(args.model), inputs.calibration(args), modifier
    )
    return {
        result.name: Outcome(
            (model.get_submodule(result.name).weight != 0).cpu(),
            result.relative_error,
            result.stored_error,
        )
        for result in run.results
    }


def all_pruned(args: argparse.Namespace) -> list[dict[str, Outcome]]:
    return [pruned(args, case) for case in CASES]


def agree(args: argparse.Namespace) -> None:
    with ThreadPoolExecutor(2) as threads:
        with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
            on_cpu = threads.submit(in_own_process, all_pruned, args)
            time.sleep(5)  # by then the process has its environment
        on_gpu = threads.submit(in_own_process, all_pruned, args)
        pairs = zip(CASES, on_cpu.result(), on_gpu.result(), strict=True)
    header = ["dtype", "pattern", "preset", "support that differs, %"]
    header += ["error, GPU / CPU: mean", "lowest", "highest", "as stored: mean"]
    lines: list[list[str]] = []
    for case, cpu, gpu in pairs:
        differ = sum(int((cpu[one].support ^ gpu[one].support).sum()) for one in cpu)
        count = sum(outcome.support.numel() for outcome in cpu.values())
        ratios = [gpu[one].error / cpu[one].error for one in cpu]
        stored = fmean(gpu[one].stored / cpu[one].stored for one in cpu)
        figures = [fmean(ratios), min(ratios), max(ratios), stored]
        lines.append(
            [*case, f"{100 * differ / count:.3f}"] + [f"{one:.4f}" for one in figures]
        )
    inputs.show(args.out, markdown_table(header, lines) + "\n")


# speed


def random_model(shape: str, layers: int) -> PreTrainedModel:
    """
    Make a model with random weights in bfloat16. It is in main memory, where the
    toolkit takes layers from.
    """
    config = LlamaConfig(
        **SHAPES[shape], num_hidden_layers=layers, max_position_embeddings=8192
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):  # far faster there
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to("cpu")
    torch.cuda.empty_cache()
    folder = tempfile.mkdtemp()  # oneshot() looks for the configuration on disk
    config.save_pretrained(folder)
    model.name_or_path = model.config._name_or_path = folder
    return model


def random_tokens(args: argparse.Namespace, vocabulary: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        vocabulary, (args.samples, args.seq_len), generator=generator
    )
    return Dataset.from_dict(
        {
            "input_ids": tokens.tolist(),
            "attention_mask": torch.ones_like(tokens).tolist(),
        }
    )


def timed(phase: str, function: Callable[..., Any], found: Counter[str]) -> Any:
    """
    Wrap a function, so that its seconds are added up in ``found``. They include the
    work that it gave to the device.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = function(*args, **kwargs)
        torch.cuda.synchronize()
        found[phase] += time.perf_counter() - started
        return result

    return run


def measured(args: argparse.Namespace, method: str, pattern: str) -> dict[str, Any]:
    """Prune once, and measure time and memory, also the time of each phase."""
    model = random_model(args.shape, args.layers)
    data = random_tokens(args, model.config.vocab_size)
    found: Counter[str] = Counter()
    torch.cuda.reset_peak_memory_stats()
    with ExitStack() as stack:
        for phase, functions in PHASES.items():
            for owner, name in functions:
                wrapper = timed(phase, getattr(owner, name), found)
                stack.enter_context(patch.object(owner, name, wrapper))
        if args.profile:
            profiler = stack.enter_context(
                torch.profiler.profile(
                    activities=[torch.profiler.ProfilerActivity.CUDA]
                )
            )
        started = time.perf_counter()
        pipeline.prune(model, object(), data, recipe(method, pattern_of(pattern)))
        seconds = time.perf_counter() - started
    if args.profile:
        averages = profiler.key_averages()
        table = averages.table(
            sort_by="cuda_time_total", row_limit=25, max_name_column_width=80
        )
        name = f"{args.out.name}-{method}-profile.txt"
        args.out.with_name(name).write_text(table)
    return {
        "method": method,
        "pattern": pattern,
        "card": torch.cuda.get_device_name(),
        "seconds": seconds,
        "phases": dict(found) | {"rest": seconds - sum(found.values())},
        "memory": torch.cuda.max_memory_allocated(),
    }


def predicted(args: argparse.Namespace, method: str) -> tuple[float, float]:
    """Return the seconds and bytes that ``plan`` predicts for a FISTAPruner preset."""
    config = LlamaConfig(
        **SHAPES[args.shape],
        num_hidden_layers=args.layers,
        max_position_embeddings=8192,
    )
    shape = shape_of(config, args.seq_len)
    procedure = PRESETS[FISTA_METHODS[method]]
    cost = layer_cost(shape, args.samples, procedure)
    time_taken = seconds(cost, shape, procedure, DEVICES["h100-80gb"])
    return time_taken, peak_device_memory(shape, procedure)


def speed(args: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for pattern in args.patterns:
        for method in args.methods:
            row = in_own_process(measured, args, method, pattern)
            if method in FISTA_METHODS:
                row["predicted"] = predicted(args, method)
            rows.append(row)
            args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
            inputs.show(args.out.with_suffix(".md"), speed_table(rows))


def speed_table(rows: list[dict[str, Any]]) -> str:
    header = ["pattern", "method", "s", "ratio", "predicted, s", "GB", "predicted, GB"]
    header += [*PHASES, "rest"]
    lines = []
    for row in rows:
        peer = next(
            (
                other["seconds"]
                for other in rows
                if other["method"] == "sparsegpt" and other["pattern"] == row["pattern"]
            ),
            None,
        )
        ratio = f"{row['seconds'] / peer:.2f}" if peer else ""
        expected = row.get("predicted")
        lines.append(
            [row["pattern"], row["method"], f"{row['seconds']:.1f}", ratio]
            + [f"{expected[0]:.1f}" if expected else "", f"{row['memory'] / 1e9:.1f}"]
            + [f"{expected[1] / 1e9:.1f}" if expected else ""]
            + [f"{row['phases'].get(phase, 0):.1f}" for phase in [*PHASES, "rest"]]
        )
    cards = ", ".join(sorted({row["card"] for row in rows}))
    return f"{cards}\n\n{markdown_table(header, lines)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("agree")
    one.add_argument("--model", required=True)
    one.add_argument("--calibration", required=True)
    one.add_argument("--layers", type=int, default=4)
    one.add_argument("--samples", type=int, default=16)
    one.add_argument("--seq-len", type=int, default=256)
    one.set_defaults(command=agree)
    one = commands.add_parser("speed")
    one.add_argument("--shape", choices=SHAPES, required=True)
    one.add_argument("--layers", type=int, default=4)
    one.add_argument("--samples", type=int, default=128)
    one.add_argument("--seq-len", type=int, default=2048)
    one.add_argument("--patterns", nargs="+", default=["2:4"])
    one.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    one.add_argument("--profile", action="store_true")
    one.set_defaults(command=speed)
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()
