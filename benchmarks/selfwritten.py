"""
Calibration text that the dense model writes itself, for those who have little: samples
of how it goes on from the beginnings of the given sequences. Each method is calibrated
on the given tokens, on these and the model's own, on the model's own alone, and on as
many given ones in all; and recovered on the same tokens.

    python benchmarks/selfwritten.py --model DIR --calibration FILE.txt \\
        --text FILE.txt FILE.txt --out benchmarks/results/selfwritten

What OUT.json has already is not measured again.
"""

from __future__ import annotations

import argparse
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import inputs
import torch
from compare import common_arguments, common_setup, measurement, resumed
from datasets import Dataset
from recovery import prune_and_train
from tqdm.auto import tqdm

from fista_modifier.evaluation.comparison import excess
from fista_modifier.evaluation.formatting import markdown_table
from fista_modifier.evaluation.methods import Pruner, pruner
from fista_modifier.evaluation.results import Results, Row
from fista_modifier.models.loading import load_model
from fista_modifier.solver import pattern_of

GIVEN, BOTH, OWN, MORE = "given", "given and own", "own", "more given"
SOURCES = (GIVEN, BOTH, OWN, MORE)
METHODS = ("sparsegpt", "fista-fast", "fista")
BATCH = 64
"""The sequences that are written at a time."""


class Job(NamedTuple):
    """A method, the tokens it sees, and whether they recover its model, too."""

    method: str
    source: str
    recovered: bool


def main() -> None:
    parser = common_arguments(__doc__ or "", 32, 8192)
    parser.add_argument("--times", type=int, default=4, help="tokens / given tokens")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a beginning")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--sources", nargs="+", default=SOURCES, choices=SOURCES)
    parser.add_argument("--recover", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    setup = common_setup(args) | {"times": args.times, "prompt": args.prompt}
    results = resumed(args, setup)
    for method, source, recover in product(args.methods, args.sources, args.recover):
        job = Job(method, source, bool(recover))
        if not results.find(**job._asdict()):
            results.add(job._asdict() | measured(args, job))
        inputs.show(args.out.with_suffix(".md"), table(args, results))


def measured(args: argparse.Namespace, job: Job) -> Row:
    prune: Pruner = pruner(job.method, pattern_of("2:4"))
    if job.recovered:
        prune = partial(prune_and_train, prune=prune, teacher=args.model)
    return measurement(args).run(prune, tokens(args, job.source))


def tokens(args: argparse.Namespace, source: str) -> Dataset:
    """
    Return the calibration tokens of a source: for ``GIVEN`` ``args.samples`` sequences,
    for the others ``args.times`` as many.
    """
    if source == MORE:
        return inputs.calibration(args, args.times * args.samples)
    given = inputs.calibration(args)
    if source == GIVEN:
        return given
    starts = tuple(tuple(one[: args.prompt]) for one in given["input_ids"])
    sequences = written(args.model, starts * args.times, args.seq_len)
    if source == BOTH:
        sequences = [*given["input_ids"], *sequences[: -len(given)]]
    masks = [[1] * len(one) for one in sequences]
    return Dataset.from_dict({"input_ids": sequences, "attention_mask": masks})


@cache
def written(
    model_name: str, starts: tuple[tuple[int, ...], ...], length: int
) -> list[list[int]]:
    """
    Let the dense model go on from the beginnings of sequences. Tokens are drawn from
    its own probabilities, all of them, and none ends a sequence.

    :param model_name: the folder of the dense model
    :param starts: the beginnings, of equal lengths
    :param length: tokens of a sequence, with its beginning
    :return: the sequences
    """
    model = load_model(model_name, "float32")
    model.eval()
    torch.manual_seed(0)
    sequences: list[list[int]] = []
    for batch in tqdm(torch.tensor(starts).split(BATCH), desc="Writing", unit="batch"):
        own = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            min_new_tokens=length - batch.shape[1],
            max_new_tokens=length - batch.shape[1],
            pad_token_id=0,
        )
        sequences += own.tolist()
    return sequences


def table(args: argparse.Namespace, results: Results) -> str:
    dense = results.find(method="dense")
    assert dense is not None
    texts = dense["perplexity"]
    lines = [["dense", "", "", *inputs.measures([dense], texts), ""]]
    lines += [
        line(row, dense, results) for row in results.rows if row["method"] != "dense"
    ]
    header = ["method", "calibrated on", "recovered", *inputs.measures_header(texts)]
    header.append("share of the excess")
    return markdown_table(header, lines) + (
        f"\n\n{Path(args.model).name} at 2:4. Given: {args.samples} × {args.seq_len} "
        f"tokens of {Path(args.calibration).name}. Own: sequences that the dense model "
        f"wrote from the first {args.prompt} tokens of each, so that there are "
        f"{args.times} times as many tokens in all; more given: as many of the text. "
        f"{args.eval_tokens} tokens of each text. {inputs.AGREEMENT} Share of the "
        "excess: of that of the method on the given tokens, not recovered, mean of the "
        "texts.\n"
    )


def line(row: Row, dense: Row, results: Results) -> list[str]:
    texts = dense["perplexity"]
    reference = results.find(method=row["method"], source=GIVEN, recovered=False)
    share = ""
    if reference is not None:
        shares = [
            excess(row, dense, text) / excess(reference, dense, text) for text in texts
        ]
        share = f"{fmean(shares):.3f}"
    return [
        row["method"],
        row["source"],
        "yes" if row["recovered"] else "",
        *inputs.measures([row], texts),
        share,
    ]


if __name__ == "__main__":
    main()
