"""
Time of the presets beside SparseGPT's, and of two processes beside one.

Only the first layers of the model are pruned, because all layers take the same time.
Methods have two threads. The default also runs with one thread, in one process and in
two, which share the layers. Wall times are comparable only on an idle machine.

    python benchmarks/speed.py --model DIR --calibration FILE.txt --layers 4 \\
        --samples 128 --seq-len 512 --out benchmarks/results/speed.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import time
from typing import Any

import inputs
import torch
import torch.distributed as dist

from fista_modifier import pipeline
from fista_modifier.evaluation.formatting import markdown_table
from fista_modifier.evaluation.methods import recipe
from fista_modifier.solver import NofM

METHODS = ("sparsegpt", "wanda", "fista-paper", "fista-fast", "fista", "fista-best")


def prune(args: argparse.Namespace, method: str, **fields: Any) -> tuple[float, float]:
    """
    Prune the first layers of the model to 2:4.

    :return: wall time and processor time of the pruning, in seconds
    """
    model = inputs.first_layers(args.model, args.layers)
    tokenizer = pipeline.load_tokenizer(args.model)
    data = inputs.calibration(args)
    modifier = recipe(method, NofM(2, 4), **fields)
    started, processor = time.perf_counter(), time.process_time()
    pipeline.prune(model, tokenizer, data, modifier)
    return time.perf_counter() - started, time.process_time() - processor


def run(
    args: argparse.Namespace, method: str, rank: int, size: int, threads: int
) -> None:
    """Run one rank's part. The first rank writes its time to ``args.found``."""
    torch.set_num_threads(threads)
    if size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
        dist.init_process_group("gloo", rank=rank, world_size=size)
    taken = prune(args, method)
    if rank == 0:
        args.found[method, size, threads] = taken


def measure(args: argparse.Namespace, method: str, size: int, threads: int) -> None:
    """
    Run all ranks of a method, each in a process of its own.

    :raises RuntimeError: if a process failed; what went wrong is in its own output
    """
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
    for number, rank in enumerate(ranks):
        if rank.exitcode:
            raise RuntimeError(
                f"{method}, {threads} threads: process {number + 1} of {size} failed "
                f"with status {rank.exitcode}"
            )


def table(found: Any) -> str:
    reference, _ = found["sparsegpt", 1, 2]
    header = ["method", "processes", "threads of each", "wall, s", "ratio"]
    lines = [
        [method, f"{size}", f"{threads}", f"{wall:.1f}", f"{wall / reference:.2f}"]
        + [f"{processor:.1f}"]
        for (method, size, threads), (wall, processor) in found.items()
    ]
    return markdown_table([*header, "processor, s of the first"], lines) + "\n"


def main() -> None:
    args = inputs.arguments(__doc__, 128, layers=4).parse_args()
    with multiprocessing.Manager() as manager:
        args.found = manager.dict()
        jobs = [(method, 1, 2) for method in METHODS]
        for job in [*jobs, ("fista", 1, 1), ("fista", 2, 1)]:
            measure(args, *job)
            inputs.show(args.out, table(dict(args.found)))


if __name__ == "__main__":
    main()
