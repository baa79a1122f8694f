"""``fista-prune compare``: measure what several methods leave of one model."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, ParamSpec, TypeVar

import torch
from compressed_tensors.offload import dispatch_model
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fista_modifier import pipeline
from fista_modifier.evaluation.agreement import DIVERGENCE, SHARE, block_agreement
from fista_modifier.evaluation.formatting import markdown_table
from fista_modifier.evaluation.methods import METHODS, Pruner, pruner, warm_starts
from fista_modifier.evaluation.perplexity import Perplexity, block_losses
from fista_modifier.evaluation.results import (
    Results,
    Row,
    digest,
    state_of_checkpoint,
)
from fista_modifier.evaluation.texts import Text
from fista_modifier.host import package_versions
from fista_modifier.models.classes import check_predicts_text, weightless_model
from fista_modifier.models.experts import linearize_weightless
from fista_modifier.models.limits import check_length
from fista_modifier.models.loading import load_config, load_model, load_tokenizer
from fista_modifier.models.targets import IGNORE, TARGETS, find_operators
from fista_modifier.pruning.results import PACKAGES, Calibration
from fista_modifier.solver import SparsityPattern

__all__ = [
    "DENSE",
    "Comparison",
    "Measurement",
    "check_methods",
    "comparison_table",
    "excess",
    "identities",
    "in_own_process",
]

DENSE, REFERENCE = "dense", "sparsegpt"
STARTS = "error, warm start → solver"
PROCESSOR_TIME = "processor time"
TIMES = {"time": "seconds", PROCESSOR_TIME: "processor_seconds"}
PROCESSOR = " Other processes do not lengthen the processor time."
AGREEMENT = (
    " Same: share of the next tokens for which the pruned and the dense model hold the "
    "same for the most likely. KL: mean KL(dense ‖ pruned), in nats per token."
)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """
    A model that is pruned by a method and then measured.

    :param model: folder of a checkpoint, or its id on the hub
    :param texts: texts for the perplexity
    :param seq_len: tokens in a block of text
    :param max_tokens: use only so many tokens of each text; None uses all
    :param dtype: dtype of the weights; "auto" is that of the checkpoint
    """

    model: str
    texts: Sequence[Text]
    seq_len: int
    max_tokens: int | None = None
    dtype: str = "auto"

    def check(self) -> dict[str, Tensor]:
        """
        Refuse a model or a text that cannot be measured.

        :return: the blocks of tokens that are measured, by the texts' names
        :raises ValueError: if the model is no language model, or a text is too short
            for one block
        :raises FileNotFoundError: if there is no such model
        """
        check_predicts_text(load_config(self.model))
        return self._blocks(load_tokenizer(self.model))

    def _blocks(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        return {
            text.name: text.blocks(tokenizer, self.seq_len, self.max_tokens)
            for text in self.texts
        }

    def run(self, prune: Pruner | None, calibration: Dataset | None) -> Row:
        """
        Prune the model and measure what is left of it.

        :param prune: the method; None leaves the model dense
        :param calibration: the calibration tokens of the method
        :return: the perplexities; for a pruned model also its agreement with the dense
            one, and the time and memory of the pruning
        """
        tokenizer = load_tokenizer(self.model)
        model = load_model(self.model, self.dtype)
        row: Row = {}
        if prune is not None:
            started, processor = time.perf_counter(), time.process_time()
            run = prune(model, tokenizer, calibration)
            row["seconds"] = time.perf_counter() - started
            row["processor_seconds"] = time.process_time() - processor
            row["zeros"] = _zeros(model)
            row["peak_memory_bytes"] = _peak_memory()
            if run.results:
                row["solver_seconds"] = sum(r.seconds for r in run.results)
                row["mean_squared_start_error"] = fmean(
                    r.relative_start_error**2 for r in run.results
                )
                row["mean_squared_relative_error"] = fmean(
                    r.relative_error**2 for r in run.results
                )
        if torch.accelerator.is_available():
            dispatch_model(model)  # it was pruned from the CPU, layer by layer
        row["perplexity"], row["perplexity_stderr"] = {}, {}
        started = time.perf_counter()
        blocks = self._blocks(tokenizer)
        for name, tokens in blocks.items():
            losses = block_losses(model, tokens)
            measured = Perplexity.of_blocks(losses, self.seq_len)
            row["perplexity"][name] = measured.value
            row["perplexity_stderr"][name] = measured.stderr
        row["eval_seconds"] = time.perf_counter() - started
        return row if prune is None else row | self._agreement(model, blocks)

    def _agreement(self, model: PreTrainedModel, blocks: Mapping[str, Tensor]) -> Row:
        """Measure a model's agreement with the dense one, by the texts' names."""
        dense = load_model(self.model, self.dtype, to_accelerator=True)
        found = {
            name: block_agreement(model, dense, tokens)
            for name, tokens in blocks.items()
        }
        return {
            SHARE: {name: one.share for name, one in found.items()},
            DIVERGENCE: {name: one.divergence for name, one in found.items()},
        }


def _zeros(model: PreTrainedModel) -> float:
    """Return the share of zeros in the operators that methods prune."""
    operators = find_operators(model, TARGETS, IGNORE)
    zeros = sum(int((one.weight == 0).sum()) for one in operators)
    return zeros / sum(math.prod(one.shape) for one in operators)


def _peak_memory() -> int:
    """Return the most main memory that this process has had, in bytes."""
    import resource  # which Windows does not have

    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def in_own_process(
    function: Callable[P, T], *arguments: P.args, **options: P.kwargs
) -> T:
    """
    Run a function in a fresh interpreter, so that its peak memory is its own.

    :param function: picklable, as are its arguments and its result
    :return: its result
    :raises RuntimeError: if the process was killed, such as for its memory
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments, **options).result()


@dataclass(frozen=True)
class Comparison:
    """
    A comparison of methods on the same model, calibration tokens and texts.

    :param measurement: the model, and the way it is measured
    :param calibration: the calibration data of all methods
    """

    measurement: Measurement
    calibration: Calibration

    def run(
        self,
        methods: Sequence[str],
        patterns: Mapping[str, SparsityPattern],
        file: Path | None = None,
    ) -> Results:
        """
        Measure what is not measured yet, each method in a process of its own.

        :param methods: names from ``METHODS``; the dense model is measured in any case
        :param patterns: the patterns by their names in the table
        :param file: the file that keeps the results as they come; None keeps none
        :return: a row for the dense model, and for each method and pattern
        :raises ValueError: if a method or pattern does not suit the model, there is too
            little text, or the file has results of other settings
        :raises FileNotFoundError: if the model does not exist
        :raises RuntimeError: if a method's process was killed
        """
        blocks = self.measurement.check()
        longest = max(self.calibration.seq_len, self.measurement.seq_len)
        check_methods(self.measurement.model, methods, patterns.values(), longest)
        tokens = pipeline.calibration_tokens(
            self.calibration, load_tokenizer(self.measurement.model)
        )
        results = Results.resume(file, self._setup(tokens, blocks))
        chosen = [method for method in METHODS if method in methods]
        rows = identities(chosen, list(patterns), [self.calibration.seed])
        for row in results.missing(tqdm(rows, desc="Methods", unit="method")):
            prune = None
            if row["method"] != DENSE:
                prune = pruner(row["method"], patterns[row["pattern"]])
            results.add(row | in_own_process(self.measurement.run, prune, tokens))
        return results

    def _setup(self, tokens: Dataset, blocks: Mapping[str, Tensor]) -> dict[str, Any]:
        """
        Return the settings that all rows of one table share. The tokens tell what a
        name does not: a file that has changed, or another way to cut it.
        """
        column = self.calibration.text_column
        return ({"text_column": column} if column else {}) | {
            "model": self.measurement.model,
            "checkpoint": state_of_checkpoint(self.measurement.model),
            "dtype": self.measurement.dtype,
            "calibration": self.calibration.dataset,
            "samples": self.calibration.samples,
            "seq_len": self.calibration.seq_len,
            "eval_seq_len": self.measurement.seq_len,
            "eval_tokens": self.measurement.max_tokens,
            "calibration_digest": digest(tokens["input_ids"][:]),
            "texts_digest": {
                name: digest(tokens.tolist()) for name, tokens in blocks.items()
            },
            "cpus": os.cpu_count(),
            "versions": package_versions(*PACKAGES),
        }


def identities(
    methods: Sequence[str], patterns: Sequence[str], seeds: Sequence[int]
) -> list[Row]:
    """
    Return what tells the rows of a table apart.

    :param methods: names of the methods
    :param patterns: names of the patterns
    :param seeds: seeds of the calibration data
    :return: method, pattern and seed of each row: one row for the dense model, and one
        for each seed, pattern and other method
    """
    dense: Row = {"method": DENSE, "pattern": "-", "seed": None}
    return [dense] + [
        {"method": method, "pattern": pattern, "seed": seed}
        for seed, pattern, method in product(seeds, patterns, methods)
        if method != DENSE
    ]


def check_methods(
    model: str,
    methods: Sequence[str],
    patterns: Iterable[SparsityPattern],
    longest: int = 1,
) -> None:
    """
    Refuse methods and patterns that do not suit a model.

    :param model: folder of a checkpoint, or its id on the hub
    :param methods: names of the methods that are to prune it
    :param patterns: the patterns that it is to have
    :param longest: tokens in the longest sequence that it is to be run on
    :raises ValueError: if a method is unknown or cannot prune the model, if the model's
        operators cannot have a pattern, or if it has too few positions
    """
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"method '{method}' is none of {', '.join(METHODS)}")
    skeleton = weightless_model(load_config(model))
    check_length(skeleton, longest)
    linearize_weightless(skeleton)
    operators = find_operators(skeleton, TARGETS, IGNORE)
    foreign = {"wanda", "sparsegpt"}.intersection(methods)
    if foreign and any(isinstance(operator.module, Conv1D) for operator in operators):
        raise ValueError(
            f"llm-compressor's {' and '.join(sorted(foreign))} leave the Conv1D "
            f"operators of {model} dense: name --methods without"
        )
    for pattern in patterns:
        for operator in operators:
            try:
                pattern.check_columns(operator.shape[1])
            except ValueError as error:
                raise ValueError(f"{operator.name}: {error}") from None


def comparison_table(results: Results) -> str:
    """
    Format the results of a comparison as a table in Markdown. It has a row for each
    pattern and method, with means over the seeds.

    :param results: the results of a comparison
    :return: the table and its caption; empty without a row of the dense model
    """
    dense = results.find(method=DENSE)
    if dense is None:
        return ""
    texts = list(dense["perplexity"])
    header = ["pattern", "method", "seeds", *texts]
    header += [f"excess, {text}" for text in texts]
    compared = any(DIVERGENCE in row for row in results.rows)
    if compared:
        header += [f"{what}, {text}" for text in texts for what in ("same", "KL")]
    header += ["excess", "its range", STARTS, *TIMES, "peak memory", "zeros"]
    figures = {text: f"{dense['perplexity'][text]:.2f}" for text in texts}
    lines = [{"method": DENSE} | figures]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        if row["method"] != DENSE:
            groups.setdefault((row["pattern"], row["method"]), []).append(row)
    order = [*METHODS, *(method for _, method in groups)]
    for pattern, method in sorted(
        groups, key=lambda key: (key[0], order.index(key[1]))
    ):
        rows = groups[pattern, method]
        peers = {row["seed"]: row for row in groups.get((pattern, REFERENCE), [])}
        label = {"pattern": pattern, "method": method}
        lines.append(label | _figures(rows, dense, peers, texts))
    # A column that repeats another, or says nothing, is left out.
    unwanted = set() if len(texts) > 1 else {"excess"}
    if all(len(rows) == 1 for rows in groups.values()):
        unwanted |= {"seeds", "its range"}
    optional = (STARTS, PROCESSOR_TIME)
    unwanted |= {name for name in optional if not any(name in line for line in lines)}
    header = [name for name in header if name not in unwanted]
    cells = [[line.get(name, "") for name in header] for line in lines]
    caption = _caption(results.setup)
    caption += AGREEMENT if compared else ""
    caption += PROCESSOR if PROCESSOR_TIME not in unwanted else ""
    return markdown_table(header, cells) + "\n\n" + caption + "\n"


def excess(row: Row, dense: Row, text: str) -> float:
    """
    Return by how much the logarithm of the perplexity is above the dense model's.

    :param row: the row of a pruned model
    :param dense: the row of the dense model
    :param text: name of a text that both were measured on
    :return: ln(perplexity / perplexity of the dense model)
    """
    return math.log(row["perplexity"][text] / dense["perplexity"][text])


def _figures(
    rows: Sequence[Row], dense: Row, peers: Mapping[int, Row], texts: Sequence[str]
) -> dict[str, str]:
    """
    Format the results of one method and pattern.

    :param rows: its rows, one for each seed
    :param dense: the row of the dense model
    :param peers: SparseGPT's row of each seed
    :param texts: names of the texts that were measured
    :return: cells by the names of their columns
    """
    cells = {"seeds": str(len(rows))}
    for text in texts:
        log = fmean(math.log(row["perplexity"][text]) for row in rows)
        cells[text] = f"{math.exp(log):.2f}"
    if all(DIVERGENCE in row for row in rows):
        for text in texts:
            share = fmean(row[SHARE][text] for row in rows)
            cells[f"same, {text}"] = f"{100 * share:.2f} %"
            divergence = fmean(row[DIVERGENCE][text] for row in rows)
            cells[f"KL, {text}"] = f"{divergence:.4f}"
    pairs = [(row, peers[row["seed"]]) for row in rows if row["seed"] in peers]
    # pruning may improve a poor model: a share of SparseGPT's excess then means nothing
    if pairs and all(
        excess(peer, dense, text) > 0 for _, peer in pairs for text in texts
    ):
        shares = [
            [excess(row, dense, text) / excess(peer, dense, text) for text in texts]
            for row, peer in pairs
        ]
        for text, column in zip(texts, zip(*shares, strict=True), strict=True):
            cells[f"excess, {text}"] = f"{fmean(column):.3f}"
        means = [fmean(share) for share in shares]
        cells["excess"] = f"{fmean(means):.3f}"
        cells["its range"] = f"{min(means):.3f}–{max(means):.3f}"
    if all("mean_squared_start_error" in row for row in rows):
        start = fmean(row["mean_squared_start_error"] for row in rows)
        solved = fmean(row["mean_squared_relative_error"] for row in rows)
        cells[STARTS] = f"{start:.4f} → {solved:.4f}"
    # a run beside others has no time that could be compared
    for name, seconds in TIMES.items():
        if pairs and all(row.get(seconds) and peer.get(seconds) for row, peer in pairs):
            ratio = fmean(row[seconds] / peer[seconds] for row, peer in pairs)
            cells[name] = f"{ratio:.2f}"
    peak = max(row["peak_memory_bytes"] for row in rows)
    cells["peak memory"] = f"{peak / 2**30:.2f} GiB"
    cells["zeros"] = f"{100 * fmean(row['zeros'] for row in rows):.2f} %"
    return cells


def _caption(setup: Mapping[str, Any]) -> str:
    tokens = setup["eval_tokens"]
    return (
        f"Model {setup['model']}, calibrated on {setup['samples']} × "
        f"{setup['seq_len']} tokens of {setup['calibration']}; perplexity in blocks of "
        f"{setup['eval_seq_len']} tokens"
        + (f" over the first {tokens} tokens.\n" if tokens else ".\n")
        + "Excess is ln(ppl / ppl of dense), as a share of SparseGPT's with the same "
        "calibration tokens (where there are several: their mean over the texts, and "
        "the lowest and highest of a seed; perplexities are geometric means over the "
        "seeds). Errors are means of the operators' squared relative ones, as warm "
        f"starts and as the solver left them. {warm_starts()} Times are of calibration "
        f"and pruning, as ratios to SparseGPT's, on {setup['cpus']} CPU cores. Peak "
        "memory is that of the method's process, without the accelerator's. Versions: "
        + ", ".join(f"{name} {number}" for name, number in setup["versions"].items())
        + "."
    )
