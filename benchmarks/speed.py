"""
Time of the presets beside SparseGPT's, and of two processes beside one.

Only the first layers of the model are pruned, as all layers take alike. Methods have
two threads; the default is run with one as well, in one process and in two, which share
the layers out, and with its recorded activations on disk. Wall time means something
only on an idle machine. Memory is anonymous memory, looked at 20 times a second: pages
of files, which the system takes back when it needs them, do not count.

    python benchmarks/speed.py --model DIR --calibration FILE.txt --layers 6 \\
        --samples 128 --seq-len 512 --out benchmarks/results/speed.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
ON_DISK = ", activations on disk"


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """:return: the most anonymous memory of this process so far, in GiB"""
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            status = Path("/proc/self/status").read_text()
            used = int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0])
            peak[0] = max(peak[0], used / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def run(
    args: argparse.Namespace, method: str, rank: int, size: int, threads: int
) -> None:
    """One rank's part, and what the first of them found in ``args.found``."""
    torch.set_num_threads(threads)
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
    modifier = recipe(method.removesuffix(ON_DISK), NofM(2, 4))
    started, processor = time.perf_counter(), time.process_time()
    with (
        tempfile.TemporaryDirectory(dir=args.out.parent) as folder,
        peak_memory() as peak,
    ):
        if method.endswith(ON_DISK):
            fields = modifier.model_dump(exclude_unset=True)
            modifier = type(modifier)(**fields, activations_dir=folder)
        pipeline.prune(model, tokenizer, data, modifier)
    if rank == 0:
        args.found[method, size, threads] = (
            time.perf_counter() - started,
            time.process_time() - processor,
            peak[0],
        )


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
    reference, _, _ = found["sparsegpt", 1, 2]
    lines = ["| method | processes | threads of each | wall, s | ratio | processor, s "]
    lines[0] += "of the first | GiB of the first |"
    lines.append("|---|---|---|---|---|---|---|")
    for (method, size, threads), (wall, processor, memory) in found.items():
        lines.append(
            f"| {method} | {size} | {threads} | {wall:.1f} | {wall / reference:.2f} "
            f"| {processor:.1f} | {memory:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with multiprocessing.Manager() as manager:
        args.found = manager.dict()
        methods = [*METHODS, *(f"{one}{ON_DISK}" for one in METHODS if "fista" in one)]
        jobs = [(method, 1, 2) for method in methods]
        for job in [*jobs, ("fista", 1, 1), ("fista", 2, 1)]:
            measure(args, *job)
            args.out.write_text(table(dict(args.found)), encoding="utf-8")
            print(args.out.read_text(), flush=True)


if __name__ == "__main__":
    main()
