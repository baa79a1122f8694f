"""
What recovery adds to pruning at 2:4: SparseGPT and FISTAPruner's presets, each alone
and recovered, on the tokens of the calibration and on eight times as many. Perplexity,
agreement with the dense model, and the time of both.

    python benchmarks/recovery.py --model DIR --calibration FILE.txt \\
        --text FILE.txt FILE.txt --out benchmarks/results/recovery --work FOLDER

The pruned weights wait in the work folder, so that each method prunes once for each
seed, and so does the state of a training that was interrupted; its row then has no
time. What OUT.json has already is not measured again. With --layers FOLDER, the --work
of compare.py with the same tokens, layers that are finished there are not pruned again;
their pruning has no time then.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import inputs
from compare import (
    WITHOUT_TIME,
    common_arguments,
    common_setup,
    measurement,
    resumable_pruner,
    resumed,
)
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fista_modifier import pipeline
from fista_modifier.evaluation.comparison import excess
from fista_modifier.evaluation.formatting import markdown_table
from fista_modifier.evaluation.methods import Pruner
from fista_modifier.evaluation.results import Results, Row, digest
from fista_modifier.files import whole
from fista_modifier.models.loading import load_model
from fista_modifier.models.targets import IGNORE, TARGETS, find_operators
from fista_modifier.pruning.results import Calibration
from fista_modifier.recovery.recover import kept_entries
from fista_modifier.recovery.resume import forget, last_state
from fista_modifier.recovery.training import Training, train_operators

METHODS = ("sparsegpt", "fista-fast", "fista", "fista-best")
REFERENCE = "sparsegpt"
TIMES = (0, 1, 8)
"""
The numbers of tokens that the recovery trains on, as multiples of those of the
calibration. 0 stands for no recovery.
"""


class Job(NamedTuple):
    """A method, and the tokens of its recovery as a multiple of the calibration's."""

    method: str
    times: int
    seed: int


def main() -> None:
    parser = common_arguments(__doc__ or "", 32, 16384)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--times", type=int, nargs="+", default=TIMES)
    parser.add_argument("--epochs", type=float, default=Training.epochs)
    parser.add_argument("--rate", type=float, default=Training.rate)
    parser.add_argument("--piece-len", type=int, default=Training.piece_length)
    args = parser.parse_args()
    settings = ("epochs", "rate", "piece_len")
    setup = common_setup(args) | {name: getattr(args, name) for name in settings}
    results = resumed(args, setup)
    for seed, method, times in product(args.seeds, args.methods, args.times):
        job = Job(method, times, seed)
        if not results.find(**job._asdict()):
            results.add(job._asdict() | measured(args, job))
        inputs.show(args.out.with_suffix(".md"), table(args, results))


def measured(args: argparse.Namespace, job: Job) -> Row:
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / f"{job.method}-{job.seed}-{digest(common_setup(args))}"
    row = job._asdict() | {"pattern": "2:4"}
    prune, resumes = resumable_pruner(args.layers, args.model, row)
    calibration = inputs.calibration(args, seed=job.seed)
    if not job.times:
        kept = partial(keep, prune=prune, file=file)
        found = measurement(args).run(kept, calibration)
        return found | (WITHOUT_TIME if resumes else {})
    if not file.exists():
        tokenizer = pipeline.load_tokenizer(args.model)
        dense = load_model(args.model, "float32")
        keep(dense, tokenizer, calibration, prune=prune, file=file)
    more = inputs.calibration(args, job.times * args.samples, job.seed)
    training = Training(
        args.epochs, args.rate, seed=job.seed, piece_length=args.piece_len
    )
    states = file.with_name(f"{file.name}-{job.times}-{digest(training)}")
    resumes = last_state(states) is not None
    again = partial(
        recovered, file=file, model_name=args.model, training=training, states=states
    )
    found = measurement(args).run(again, more)
    forget(states)
    return found | (WITHOUT_TIME if resumes else {})


def keep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Dataset,
    *,
    prune: Pruner,
    file: Path,
) -> pipeline.PruningRun:
    """Prune a model, and write the weights of its operators to a file."""
    run = prune(model, tokenizer, calibration)
    weights = {
        operator.name: operator.weight.contiguous()
        for operator in find_operators(model, TARGETS, IGNORE)
    }
    with whole(file) as unfinished:
        save_file(weights, unfinished)
    return run


def recovered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Dataset,
    *,
    file: Path,
    model_name: str,
    training: Training,
    states: Path | None = None,
) -> pipeline.PruningRun:
    """
    Train the weights that the file has kept. The states of the training wait in a
    folder, if one is given.
    """
    weights = load_file(file)
    for operator in find_operators(model, TARGETS, IGNORE):
        operator.save(weights[operator.name])
    return train(model, calibration, model_name, training, states)


def train(
    model: PreTrainedModel,
    tokens: Dataset,
    teacher: str,
    training: Training,
    states: Path | None = None,
) -> pipeline.PruningRun:
    """
    Train a pruned model in place, towards the dense model that it was made of. The
    states of the training wait in a folder, if one is given.
    """
    operators = find_operators(model, TARGETS, IGNORE)
    data = Calibration("", len(tokens), len(tokens[0]["input_ids"]), 0)
    dense = load_model(teacher, "float32")
    masks = kept_entries(operators)
    train_operators(
        model,
        dense,
        tokens,
        operators,
        masks,
        data,
        training,
        resume=states,
        teacher_name=teacher,
    )
    return pipeline.PruningRun(model)


def prune_and_train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Dataset,
    *,
    prune: Pruner,
    teacher: str,
    states: Path | None = None,
) -> pipeline.PruningRun:
    """
    Prune, and train what is left on the same tokens. The states of the training wait in
    a folder, if one is given.
    """
    prune(model, tokenizer, calibration)
    return train(model, calibration, teacher, Training(), states)


def table(args: argparse.Namespace, results: Results) -> str:
    dense = results.find(method="dense")
    assert dense is not None
    texts = dense["perplexity"]
    lines = [["dense", "", *inputs.measures([dense], texts), "", ""]]
    rows = [row for row in results.rows if row["method"] != "dense"]
    for method, times in product(METHODS, sorted({row["times"] for row in rows})):
        if found := [
            row for row in rows if (row["method"], row["times"]) == (method, times)
        ]:
            lines.append(line(found, dense, results))
    header = ["method", "recovered on", *inputs.measures_header(texts)]
    header += ["share of the excess", "seconds"]
    return markdown_table(header, lines) + (
        f"\n\n{Path(args.model).name} at 2:4, {args.samples} × {args.seq_len} tokens "
        f"of {Path(args.calibration).name}, recovered with --epochs {args.epochs:g} "
        f"--rate {args.rate:g} --piece-len {args.piece_len}; {args.eval_tokens} tokens "
        f"of each text. {inputs.AGREEMENT} Share of the excess: of that of {REFERENCE} "
        "alone, mean of the texts and seeds. Seconds: of pruning and of recovery.\n"
    )


def line(rows: list[Row], dense: Row, results: Results) -> list[str]:
    """Return the cells of one method and number of tokens: means over the seeds."""
    method, times = rows[0]["method"], rows[0]["times"]
    cells = [method, f"{times} × the tokens" if times else ""]
    cells += inputs.measures(rows, dense["perplexity"])
    shares = [
        excess(row, dense, text) / excess(reference, dense, text)
        for row in rows
        if (reference := results.find(method=REFERENCE, times=0, seed=row["seed"]))
        for text in dense["perplexity"]
    ]
    seconds = mean_seconds(rows)
    if times:
        pruning = results.find(method=method, times=0, seed=rows[0]["seed"])
        seconds = f"{mean_seconds([pruning] if pruning else [])} + {seconds}"
    return [*cells, f"{fmean(shares):.2f}" if shares else "", seconds]


def mean_seconds(rows: list[Row]) -> str:
    """Return the mean time of the rows that have one."""
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    return f"{fmean(seconds):.0f}" if seconds else "?"


if __name__ == "__main__":
    main()
