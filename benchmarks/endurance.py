"""
This script prunes a tiny model two hundred times in one process and shows what grows.

    python benchmarks/endurance.py --out benchmarks/results/endurance.md
"""

from __future__ import annotations

import argparse
import gc
import os
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import inputs
import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import LlamaConfig, LlamaForCausalLM

from fista_modifier import FISTAPruningModifier
from fista_modifier.evaluation.formatting import markdown_table

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)


def prune_once(folder: str, data: Dataset) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    recipe = FISTAPruningModifier(mask_structure="2:4", ignore=["lm_head"])
    oneshot(model=model, recipe=recipe, dataset=data, processor=object())


def measure() -> dict[str, float]:
    gc.collect()
    status = Path("/proc/self/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return {
        "resident, MiB": int(resident.split()[1]) / 1024,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "live tensors": sum(torch.is_tensor(thing) for thing in gc.get_objects()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prunes", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = torch.randint(2, 64, (8, 32))
    ones = torch.ones_like(tokens)
    data = Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": ones.tolist()}
    )
    rows: list[list[str]] = []
    with TemporaryDirectory() as folder:
        LlamaForCausalLM(CONFIG).save_pretrained(folder)
        for prune in range(1, args.prunes + 1):
            prune_once(folder, data)
            if prune in (1, 10) or prune % 50 == 0:
                found = measure()
                rows.append([f"{prune}", *(f"{value:.0f}" for value in found.values())])
                table = markdown_table(["prunes", *found], rows)
                inputs.show(args.out, table + "\n")


if __name__ == "__main__":
    main()
