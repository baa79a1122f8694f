"""
Time of the presets beside SparseGPT's, and of two processes beside one.

Only the first layers of the model are pruned, as all layers take alike. Methods have
two threads; the default is run with one as well, in one process and in two, which share
the layers out. Wall time means something only on an idle machine.

    python benchmarks/speed.py --model DIR --calibration FILE.txt --layers 4 \\
        --samples 128 --seq-len 512 --out benchmarks/results/speed.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
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

METHODS = ("sparsegpt", "wanda", "fista-fast", "fista", "fista-best")


def arguments(description: str) -> argparse.ArgumentParser:
    """What is pruned, on what it is calibrated, where results go."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def prune(args: argparse.Namespace, method: str, **fields: Any) -> tuple[float, float]:
    """
    Prune the first layers of the model to 2:4.

    :return: wall time and processor time of it, in seconds
    """
    config = AutoConfig.from_pretrained(args.model)
    config.num_hidden_layers = args.layers
    model = AutoModelForCausalLM.from_pretrained(
        args.model, config=config, dtype=torch.float32
    )
    tokenizer = pipeline.load_tokenizer(args.model)
    data = calibration_dataset(
        args.calibration, tokenizer, samples=args.samples, seq_len=args.seq_len, seed=0
    )
    modifier = recipe(method, NofM(2, 4), **fields)
    started, processor = time.perf_counter(), time.process_time()
    pipeline.prune(model, tokenizer, data, modifier)
    return time.perf_counter() - started, time.process_time() - processor


def run(
    args: argparse.Namespace, method: str, rank: int, size: int, threads: int
) -> None:
    """One rank's part, and what the first of them took in ``args.found``."""
    torch.set_num_threads(threads)
    if size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
        dist.init_process_group("gloo", rank=rank, world_size=size)
    taken = prune(args, method)
    if rank == 0:
        args.found[method, size, threads] = taken


def measure(args: argparse.Namespace, method: str, size: int, threads: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        args.port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=run, args=(args, method, rank, size, threads))
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()


def table(found: Any) -> str:
    reference, _ = found["sparsegpt", 1, 2]
    lines = ["| method | processes | threads of each | wall, s | ratio | processor, s "]
    lines[0] += "of the first |"
    lines.append("|---|---|---|---|---|---|")
    for (method, size, threads), (wall, processor) in found.items():
        lines.append(
            f"| {method} | {size} | {threads} | {wall:.1f} | {wall / reference:.2f} "
            f"| {processor:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    args = arguments(__doc__.split("\n\n")[0]).parse_args()
    with multiprocessing.Manager() as manager:
        args.found = manager.dict()
        jobs = [(method, 1, 2) for method in METHODS]
        for job in [*jobs, ("fista", 1, 1), ("fista", 2, 1)]:
            measure(args, *job)
            args.out.write_text(table(dict(args.found)), encoding="utf-8")
            print(args.out.read_text(), flush=True)


if __name__ == "__main__":
    main()
