"""
Memory of the presets beside SparseGPT's, with recorded activations in main memory and
on disk.

Only the first layers of the model are pruned, as memory does not grow with their
number. The script measures anonymous memory, 20 times a second. Pages of files, which
the system takes back when it needs them, do not count. The allocator is told to return
what is freed (MALLOC_MMAP_THRESHOLD_), because by itself glibc keeps a varying share.

    python benchmarks/memory.py --model DIR --calibration FILE.txt --layers 2 \\
        --samples 64 --seq-len 512 --out benchmarks/results/memory.md
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import inputs
from speed import METHODS, prune

from fista_modifier.evaluation.comparison import in_own_process
from fista_modifier.evaluation.formatting import markdown_table

RETURN_WHAT_IS_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """
    Watch the memory of this process.

    :return: a list with the most anonymous memory so far, in GiB
    """
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


def measured(args: argparse.Namespace, method: str, on_disk: bool) -> float:
    with (
        tempfile.TemporaryDirectory(dir=args.out.parent) as folder,
        peak_memory() as peak,
    ):
        prune(args, method, **{"activations_dir": folder} if on_disk else {})
    return peak[0]


def main() -> None:
    args = inputs.arguments(__doc__, 64, layers=2).parse_args()
    os.environ |= RETURN_WHAT_IS_FREED
    header = ["method", "GiB", "above SparseGPT", "on disk", "above SparseGPT"]
    lines: list[list[str]] = []
    reference: float | None = None
    for method in METHODS:  # SparseGPT first
        peaks = [in_own_process(measured, args, method, False)]
        reference = peaks[0] if reference is None else reference
        if "fista" in method:
            peaks.append(in_own_process(measured, args, method, True))
        cells = [[f"{peak:.3f}", f"{peak - reference:+.3f}"] for peak in peaks]
        lines.append([method, *sum(cells, [])])
        inputs.show(args.out, markdown_table(header, lines) + "\n")


if __name__ == "__main__":
    main()
