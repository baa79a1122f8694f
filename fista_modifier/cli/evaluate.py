"""``fista-prune eval``: measure perplexities and accuracies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fista_modifier.checkpoint.model_card import (
    has_foreign_card,
    stated_perplexities,
    write_model_card,
)
from fista_modifier.cli.console import errors_as_messages, show
from fista_modifier.cli.options import (
    BatchSize,
    LoadDtype,
    ResultsFile,
    TableFile,
    TokenLimit,
    comma_separated,
)
from fista_modifier.evaluation.engines import Backend
from fista_modifier.evaluation.evaluate import (
    Evaluation,
    evaluation_table,
    perplexities,
)
from fista_modifier.evaluation.tasks import PAPER_TASKS, TaskSuite
from fista_modifier.evaluation.texts import PAPER_TEXTS, load_texts
from fista_modifier.models.loading import load_config
from fista_modifier.pruning.results import REPORT_NAME, PruningReport

__all__ = ["evaluate"]


def evaluate(
    models: Annotated[list[str], typer.Argument(help="folders of checkpoints, or ids")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="wikitext2, ptb, c4, FILE.txt, FILE.jsonl or a hub id; may be repeated"
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="zero-shot tasks of lm-eval, with commas between; 'paper' is the "
            "paper's seven"
        ),
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(help="folder with your own tasks in lm-eval's YAML")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="use only so many examples of each task")
    ] = None,
    backend: Annotated[Backend, typer.Option(help="runs the models")] = "transformers",
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=2, help="tokens in a block (default: the model's maximum, at most 2048)"
        ),
    ] = None,
    max_tokens: TokenLimit = None,
    batch_size: BatchSize = 1,
    dtype: LoadDtype = "auto",
    reference: Annotated[
        str | None,
        typer.Option(
            help="the dense model, a folder or a hub id: shows for each text how often "
            "MODELS predict the same next token, and the mean KL from it"
        ),
    ] = None,
    bos: Annotated[
        bool,
        typer.Option(
            help="begin each block with the token that the tokenizer puts at the "
            "beginning of a text; the published tables of LLaMA and OPT do not"
        ),
    ] = True,
    json_file: ResultsFile = None,
    markdown: TableFile = None,
    card: Annotated[
        bool,
        typer.Option(
            "--card", help="write perplexities into the model cards of MODELS, too"
        ),
    ] = False,
) -> None:
    """
    Measure the perplexity of MODELS on texts, and their accuracy on tasks.

    Perplexity is measured on contiguous blocks over the whole text. The evaluation is
    that of the paper if neither --text nor --tasks is given: WikiText-2, PTB, C4 and
    seven tasks.
    """
    with errors_as_messages():
        if text is None and tasks is None:
            text, tasks = list(PAPER_TEXTS), "paper"
        described = {one: report_for_card(Path(one)) for one in models if card}
        names = PAPER_TASKS if tasks == "paper" else comma_separated(tasks or "")
        for option, value in (("--task-path", task_path), ("--limit", limit)):
            if value and not names:
                raise ValueError(f"{option} has no effect without --tasks: name some")
        for model in (*models, *filter(None, [reference])):
            load_config(model)  # a wrong name must not wait for downloads of data
        evaluation = Evaluation(
            suite=TaskSuite(names, task_path, limit) if names else None,
            texts=load_texts(text or []),
            backend=backend,
            dtype=dtype,
            seq_len=seq_len,
            max_tokens=max_tokens,
            batch_size=batch_size,
            reference=reference,
            bos=bos,
        )
        results = evaluation.run(models, json_file)
        show(evaluation_table(results), markdown)
        for checkpoint, report in described.items():
            folder = Path(checkpoint)
            stated = stated_perplexities(folder) | perplexities(results, checkpoint)
            write_model_card(folder, report, stated)


def report_for_card(checkpoint: Path) -> PruningReport:
    """
    Return the report of a checkpoint whose model card is to be written.

    :param checkpoint: the checkpoint's folder
    :return: its report
    :raises FileNotFoundError: if it has no report
    :raises ValueError: if it has a model card of somebody else's
    """
    if has_foreign_card(checkpoint):
        raise ValueError(
            f"{checkpoint} has a model card that fista-prune did not write: move it "
            "away, or leave out --card"
        )
    if not (checkpoint / REPORT_NAME).is_file():
        raise FileNotFoundError(
            f"{checkpoint} has no {REPORT_NAME}, which a model card is made from: "
            "leave out --card"
        )
    return PruningReport.load(checkpoint)
