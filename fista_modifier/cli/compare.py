"""``fista-prune compare``: compare methods on the same model and tokens."""

from __future__ import annotations

from typing import Annotated

import typer

from fista_modifier.cli.console import errors_as_messages, show
from fista_modifier.cli.options import (
    CalibrationText,
    LoadDtype,
    ModelName,
    ResultsFile,
    Samples,
    Seed,
    SequenceLength,
    TableFile,
    TextColumn,
    TokenLimit,
    comma_separated,
)
from fista_modifier.evaluation.comparison import (
    Comparison,
    Measurement,
    comparison_table,
)
from fista_modifier.evaluation.methods import METHODS
from fista_modifier.evaluation.texts import PAPER_TEXTS, load_texts
from fista_modifier.models.limits import longest_sequence
from fista_modifier.models.loading import load_config, load_tokenizer
from fista_modifier.pruning.results import Calibration
from fista_modifier.solver import pattern_of

__all__ = ["compare"]


def compare(
    model: ModelName,
    pattern: Annotated[
        list[str], typer.Option(help="such as 2:4 or 0.5; may be repeated")
    ],
    methods: Annotated[
        str, typer.Option(help="with commas between; the dense model is always there")
    ] = ",".join(METHODS),
    dataset: CalibrationText = "allenai/c4",
    text_column: TextColumn = None,
    samples: Samples = 128,
    seq_len: SequenceLength = None,
    seed: Seed = 0,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="wikitext2, ptb, c4 (default: these three), FILE.txt, FILE.jsonl or a "
            "hub id; may be repeated"
        ),
    ] = None,
    eval_seq_len: Annotated[
        int | None,
        typer.Option(
            min=2, help="tokens in a block of the texts (default: as --seq-len)"
        ),
    ] = None,
    max_tokens: TokenLimit = None,
    dtype: LoadDtype = "auto",
    json_file: ResultsFile = None,
    markdown: TableFile = None,
) -> None:
    """
    Prune MODEL by several methods on the same tokens and compare what is left of it.

    No checkpoint is written. With --json, what an interrupted run has measured is not
    measured again.
    """
    with errors_as_messages():
        patterns = {name: pattern_of(name) for name in pattern}
        # a missing model fails here, before anything is downloaded
        load_tokenizer(model)
        length = seq_len or longest_sequence(load_config(model))
        measurement = Measurement(
            model,
            load_texts(text or list(PAPER_TEXTS)),
            eval_seq_len or length,
            max_tokens,
            dtype,
        )
        calibration = Calibration(dataset, samples, length, seed, text_column)
        comparison = Comparison(measurement, calibration)
        results = comparison.run(comma_separated(methods), patterns, json_file)
        show(comparison_table(results), markdown)
