"""
Speed and memory of smaller models, as ratios to the dense one, in transformers and in
vLLM.

Only sizes matter for speed, so the channels are those of FASP's score on a little data.
In each round each engine runs each checkpoint in a process of its own; ratios are to
the dense model of the same round, and the table has their medians. Wall time means
something only on an idle machine.

    python benchmarks/serving_speed.py --model DIR --calibration FILE.txt \\
        --vllm PYTHON_WITH_VLLM --out benchmarks/results/serving_speed.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import inputs
from transformers import AutoConfig, PretrainedConfig

from fista_modifier import FASPPruningModifier, pipeline
from fista_modifier.evaluation.formatting import markdown_table
from fista_modifier.models.classes import weightless_model
from fista_modifier.models.targets import IGNORE

DENSE = "0"
WORKER = Path(__file__).with_name("engine_speed.py")
# one process, on all threads given, without words to anybody else
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def smaller(args: argparse.Namespace, level: str, folder: Path) -> float:
    """
    Write a checkpoint of the model with smaller layers.

    :param level: the sparsity, which is the share of the layers' parameters to remove
    :return: the exact share of their parameters that left
    """
    modifier = FASPPruningModifier(sparsity=float(level), preset="paper", ignore=IGNORE)
    model = pipeline.load_model(args.model, args.dtype)
    tokenizer = pipeline.load_tokenizer(args.model)
    pipeline.prune(model, tokenizer, inputs.calibration(args), modifier)
    model.save_pretrained(folder)
    return modifier.removed


def run(args: argparse.Namespace, engine: str, checkpoint: str) -> dict[str, float]:
    """
    Measure an engine with a checkpoint, in a process of its own.

    :raises CalledProcessError: if the engine failed; it has said why
    """
    keys = ("threads", "dtype", "sequences", "prompt", "new")
    sizes = json.dumps({key: getattr(args, key) for key in keys})
    python = sys.executable if engine == "transformers" else args.vllm
    output = subprocess.run(
        [python, WORKER, engine, checkpoint, sizes],
        env=os.environ | VLLM | {"OMP_NUM_THREADS": str(args.threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def bounds(config: PretrainedConfig) -> tuple[int, int]:
    """
    Count the parameters that a token of a prompt passes through, and those that a
    generated token passes through. The former are the layers'. The latter include the
    output embedding, which a prompt needs only once.
    """
    model = weightless_model(config)
    embeddings = model.get_input_embeddings().weight.numel()
    whole = sum(one.numel() for one in model.parameters())  # tied ones count once
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    layers = whole - embeddings - (0 if tied else head.numel())
    return layers, layers + head.numel()


def table(
    rounds: list[dict[tuple[str, str], dict[str, float]]],
    removed: dict[str, float],
    sizes: dict[str, tuple[int, int]],
) -> str:
    lines = []
    for engine, level in rounds[0]:
        if level == DENSE:
            absolute = [
                f"{median(one[engine, level][key] for one in rounds):,.0f}"
                for key in ("prefill", "decode", "memory")
            ]
            prefill, decode, memory = absolute
            dense = [f"{prefill} /s", f"{decode} /s", f"{memory} MiB"]
            lines.append([engine, "dense", "", *dense, "", ""])
            continue
        ratios = {
            key: [one[engine, level][key] / one[engine, DENSE][key] for one in rounds]
            for key in ("prefill", "decode", "memory")
        }
        bound = [sizes[DENSE][kind] / sizes[level][kind] for kind in (0, 1)]
        lines.append(
            [engine, f"{100 * float(level):g} %", f"{100 * removed[level]:.1f} %"]
            + [spread(values) for values in ratios.values()]
            + [f"{value:.2f}" for value in bound]
        )
    header = ["engine", "sparsity", "removed", "prefill", "decode", "peak memory"]
    return markdown_table([*header, "bound of prefill", "bound of decode"], lines)


def spread(values: list[float]) -> str:
    """Give the median, and the lowest and highest, which other work would set apart."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = inputs.arguments(__doc__ or "", 8)
    parser.add_argument("--levels", nargs="+", default=["0.1", "0.2", "0.3"])
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--vllm", default=sys.executable, help="a Python that has it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        checkpoints = {DENSE: args.model}
        checkpoints |= {level: f"{folder}/{level}" for level in args.levels}
        removed = {
            level: smaller(args, level, Path(checkpoints[level]))
            for level in args.levels
        }
        sizes = {
            level: bounds(AutoConfig.from_pretrained(checkpoint))
            for level, checkpoint in checkpoints.items()
        }
        rounds: list[dict[tuple[str, str], dict[str, float]]] = []
        for _ in range(args.rounds):
            measured = {
                (engine, level): run(args, engine, checkpoint)
                for engine in args.engines
                for level, checkpoint in checkpoints.items()
            }
            rounds.append(measured)
            inputs.show(args.out, table(rounds, removed, sizes) + note(args))


def note(args: argparse.Namespace) -> str:
    threads: Any = args.threads
    return (
        f"\n\n{Path(args.model).name}, {args.dtype}, {threads} threads, "
        f"{args.sequences} sequences: prompts of {args.prompt} tokens, and {args.new} "
        "new ones after a prompt of one. Ratios to the dense model of the same round, "
        f"median (and range) of {args.rounds} rounds. Bounds: what the parameters that "
        "a token passes through leave at best.\n"
    )


if __name__ == "__main__":
    main()
