"""
What the benchmarks have in common: the model, its calibration data, and cells and the
file of the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import torch
from datasets import Dataset
from transformers import AutoConfig, PreTrainedModel

from fista_modifier import pipeline
from fista_modifier.data import calibration_dataset
from fista_modifier.evaluation.results import Row
from fista_modifier.files import write_whole
from fista_modifier.models.classes import model_class
from fista_modifier.models.targets import IGNORE

__all__ = [
    "AGREEMENT",
    "agreement",
    "agreement_header",
    "arguments",
    "calibration",
    "first_layers",
    "ignored",
    "measures",
    "measures_header",
    "show",
]

AGREEMENT = (
    "Same: share of the next tokens for which the model and the dense one hold the "
    "same for the most likely. KL: mean KL(dense ‖ model), in nats per token."
)
"""What the cells of :func:`agreement` are, for the note of a table."""


def arguments(
    documentation: str, samples: int, layers: int | None = None
) -> argparse.ArgumentParser:
    """
    Return a parser with the options of every benchmark.

    :param documentation: docstring of the script; its first paragraph is the
        description
    :param samples: default number of calibration sequences
    :param layers: default number of layers, from the first, that are pruned; None for a
        benchmark that does not cut the model short
    :return: the parser
    """
    parser = argparse.ArgumentParser(description=documentation.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    if layers is not None:
        parser.add_argument("--layers", type=int, default=layers)
    return parser


def calibration(
    args: argparse.Namespace,
    samples: int | None = None,
    seed: int = 0,
    text: str | None = None,
) -> Dataset:
    """Read the calibration tokens that the options ask for, or other ones."""
    return calibration_dataset(
        text or args.calibration,
        pipeline.load_tokenizer(args.model),
        samples=samples or args.samples,
        seq_len=args.seq_len,
        seed=seed,
    )


def first_layers(model: str, layers: int) -> PreTrainedModel:
    """Load a model with its first layers only, as all layers take the same time."""
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = layers
    return model_class(config).from_pretrained(
        model, config=config, dtype=torch.float32
    )


def ignored(args: argparse.Namespace) -> list[str]:
    """
    Return patterns of the names that are left dense: the output embedding, and all but
    one layer in ``args.every``.
    """
    layers = AutoConfig.from_pretrained(args.model).num_hidden_layers
    left = (number for number in range(layers) if number % args.every)
    return IGNORE + [rf"re:.*layers\.{number}\..*" for number in left]


def agreement(rows: list[Row], text: str) -> list[str]:
    """
    Return two cells of a table, for how near rows are to the dense model on a text: the
    share of the next tokens for which both hold the same for the most likely, and the
    mean KL in nats. They are means over the rows, and empty for the dense model.
    """
    if any("same_token" not in row for row in rows):
        return ["", ""]
    same = fmean(row["same_token"][text] for row in rows)
    divergence = fmean(row["divergence"][text] for row in rows)
    return [f"{100 * same:.1f} %", f"{divergence:.3f}"]


def agreement_header(text: str) -> list[str]:
    """Return the heads of the columns of :func:`agreement`."""
    return [f"same, {text}", f"KL, {text}"]


def measures(rows: list[Row], texts: Iterable[str]) -> list[str]:
    """Return the cells of perplexity and agreement on each text, means over rows."""
    cells = []
    for text in texts:
        perplexity = fmean(row["perplexity"][text] for row in rows)
        cells += [f"{perplexity:.2f}", *agreement(rows, text)]
    return cells


def measures_header(texts: Iterable[str]) -> list[str]:
    """Return the heads of the columns of :func:`measures`."""
    return [head for text in texts for head in (text, *agreement_header(text))]


def show(file: Path, table: str) -> None:
    """Write a table, completely or not at all, and print it."""
    write_whole(file, table)
    print(table, flush=True)
