"""
Time of the presets beside SparseGPT's, and of two processes beside one.

Only the first layers of the model are pruned, as all layers take alike. Each process
has one thread. Processor time is what a run takes of a machine that others use too;
wall time means something only on an idle one.

    python benchmarks/speed.py --model DIR --calibration FILE.txt --layers 4 \\
        --samples 128 --seq-len 512 --out benchmarks/results/speed.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from fista_modifier import pipeline
from fista_modifier.data import calibration_dataset
from fista_modifier.evaluation.methods import recipe
from fista_modifier.solver import NofM

METHODS = ("sparsegpt", "wanda", "fista-fast", "fista", "fista-paper")


def run(args: argparse.Namespace, method: str, rank: int, size: int) -> None:
    """One rank's part, and what the first of them found in ``args.found``."""
    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(args.model)
    config.num_hidden_layers = args.layers
    model = AutoModelForCausalLM.from_pretrained(
        args.model, config=config, dtype=torch.float32
    )
    tokenizer = pipeline.load_tokenizer(args.model)
    data = calibration_dataset(
        args.calibration, tokenizer, samples=args.samples, seq_len=args.seq_len, seed=0
    )
    if size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
        dist.init_process_group("gloo", rank=rank, world_size=size)
    started, processor = time.perf_counter(), time.process_time()
    pipeline.prune(model, tokenizer, data, recipe(method, NofM(2, 4)))
    if rank == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        args.found[method, size] = (
            time.perf_counter() - started,
            time.process_time() - processor,
            peak / 2**20,
        )


def measure(args: argparse.Namespace, method: str, size: int = 1) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        args.port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=run, args=(args, method, rank, size))
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()


def table(found: Any) -> str:
    reference = found["sparsegpt", 1]
    lines = ["| method | processes | wall, s | ratio | processor, s | ratio | GiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for (method, size), (wall, processor, memory) in found.items():
        lines.append(
            f"| {method} | {size} | {wall:.0f} | {wall / reference[0]:.2f} "
            f"| {processor:.0f} | {processor / reference[1]:.2f} | {memory:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with multiprocessing.Manager() as manager:
        args.found = manager.dict()
        jobs = [(method, 1) for method in ("sparsegpt", *args.methods)]
        for method, size in dict.fromkeys([*jobs, ("fista", 2)]):
            measure(args, method, size)
            args.out.write_text(table(dict(args.found)), encoding="utf-8")
            print(args.out.read_text(), flush=True)


if __name__ == "__main__":
    main()
