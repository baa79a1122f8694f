"""``fista-prune eval``: measure several models on several texts and tasks."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from fista_modifier.checkpoint.model_card import StatedPerplexity
from fista_modifier.evaluation.agreement import DIVERGENCE, SHARE
from fista_modifier.evaluation.engines import (
    Backend,
    Engine,
    TransformersEngine,
    check_installed,
    start,
    vllm_package,
)
from fista_modifier.evaluation.formatting import markdown_table, with_error
from fista_modifier.evaluation.perplexity import Perplexity
from fista_modifier.evaluation.results import (
    Results,
    Row,
    digest,
    state_of_checkpoint,
)
from fista_modifier.evaluation.tasks import TaskSuite
from fista_modifier.evaluation.texts import Text
from fista_modifier.host import package_versions
from fista_modifier.models.classes import check_predicts_text
from fista_modifier.models.limits import longest_sequence
from fista_modifier.models.loading import (
    check_not_packed,
    load_config,
    load_model,
    load_tokenizer,
)
from fista_modifier.models.vocabulary import check_same_vocabulary

__all__ = ["Evaluation", "evaluation_table", "perplexities"]

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """
    The things to measure, and the way to measure them.

    :param texts: texts for the perplexity
    :param suite: zero-shot tasks; None for none
    :param backend: the backend that runs the models
    :param dtype: dtype of the weights; "auto" is that of each checkpoint
    :param seq_len: tokens in a block of text; None is each model's maximum, at most
        2048
    :param max_tokens: use only so many tokens of each text; None uses all
    :param batch_size: sequences in a forward pass
    :param reference: the dense model that the others' predictions are compared with;
        None compares them with nothing
    :param bos: whether each block begins with what the tokenizer puts at the beginning
        of a text
    """

    texts: Sequence[Text]
    suite: TaskSuite | None = None
    backend: Backend = "transformers"
    dtype: str = "auto"
    seq_len: int | None = None
    max_tokens: int | None = None
    batch_size: int = 1
    reference: str | None = None
    bos: bool = True

    def run(self, models: Sequence[str], file: Path | None = None) -> Results:
        """
        Measure what is not measured yet. What was measured before a checkpoint or a
        text changed is measured anew.

        :param models: folders of checkpoints, or ids on the hub
        :param file: the file that keeps the results as they come; None keeps none
        :return: a row for each model and text, and for each model and task
        :raises ValueError: if a model is no language model, a text is too short for a
            block of it, a task has no metric, the file has results of other settings,
            or the reference has other tokens than a model
        :raises FileNotFoundError: if a model does not exist
        :raises RuntimeError: if the backend is not installed
        """
        for model in models:
            self._check_reference(model)
        check_installed(self.backend)
        blocks = {model: self._blocks(model) for model in models}
        results = Results.resume(file, self._setup())
        with tqdm(total=len(models), desc="Models", unit="model") as bar:
            for model in models:
                bar.set_postfix_str(model)
                self._measure(model, blocks[model], results)
                bar.update()
        return results

    def _check_reference(self, model: str) -> None:
        if self.reference is None:
            return
        if self.backend != "transformers":
            raise ValueError(
                "--reference compares whole distributions, which only --backend "
                "transformers gives"
            )
        if not self.texts:
            raise ValueError("--reference needs a text: --text wikitext2")
        check_same_vocabulary(
            load_config(model),
            load_tokenizer(model),
            load_config(self.reference),
            load_tokenizer(self.reference),
            self.reference,
        )

    @cached_property
    def _dense(self) -> PreTrainedModel | None:
        """The reference model, loaded once for all models; None without a reference."""
        if self.reference is None:
            return None
        return load_model(self.reference, self.dtype, to_accelerator=True)

    def _setup(self) -> dict[str, Any]:
        """Return the settings that all rows of one table share."""
        packages = [vllm_package()] if self.backend == "vllm" else []
        reference = {}
        if self.reference is not None:
            state = state_of_checkpoint(self.reference)
            reference = {"reference": self.reference, "reference_checkpoint": state}
        return reference | {
            "backend": self.backend,
            "dtype": self.dtype,
            "seq_len": self.seq_len,
            "max_tokens": self.max_tokens,
            "bos": self.bos,
            "versions": package_versions("torch", "transformers", *packages),
        }

    def _blocks(self, model: str) -> dict[str, Tensor]:
        """
        Return the texts as blocks of the model's tokens, by the texts' names. This may
        fail, so it is done before any model runs.
        """
        config = load_config(model)
        if self.backend == "transformers":
            check_not_packed(model, config)
        if not self.texts:
            return {}
        check_predicts_text(config)
        tokenizer = load_tokenizer(model)
        seq_len = self.seq_len
        if seq_len is None:
            seq_len = longest_sequence(config)
            positions = getattr(
                config.get_text_config(), "max_position_embeddings", None
            )
            if self.backend == "vllm" and positions is not None:
                seq_len = min(seq_len, positions - 1)  # vLLM wants room for one more
        return {
            text.name: text.blocks(tokenizer, seq_len, self.max_tokens, bos=self.bos)
            for text in self.texts
        }

    def _measure(self, model: str, blocks: dict[str, Tensor], results: Results) -> None:
        checkpoint = state_of_checkpoint(model)
        samples = {name: digest(tokens.tolist()) for name, tokens in blocks.items()}
        definitions = self.suite.definitions if self.suite else {}
        results.rows = [
            row
            for row in results.rows
            if row["model"] != model
            or _is_current(row, checkpoint, samples, definitions)
        ]
        texts = [name for name in blocks if not results.find(model=model, text=name)]
        limit = self.suite.limit if self.suite else None
        tasks = [
            name
            for name in definitions
            if not results.find(model=model, task=name, limit=limit)
        ]
        if not texts and not tasks:
            return
        if texts:
            _ = self._dense  # if it cannot be loaded, no measurement is lost
        engine: Engine = start(self.backend, model, self.dtype, self.batch_size)
        origin = {"model": model, "checkpoint": checkpoint}
        for name in texts:
            losses = engine.losses(blocks[name])
            seq_len = blocks[name].shape[1]
            source = {"text": name, "tokens_digest": samples[name], "seq_len": seq_len}
            measured = Perplexity.of_blocks(losses, seq_len)
            compared = self._compared(model, engine, blocks[name])
            results.add(origin | source | asdict(measured) | compared)
        for name in tasks:
            assert self.suite is not None
            scores = self.suite.score(engine.harness_model, name)
            results.add(
                origin
                | {"task": name, "definitions": definitions[name]}
                | {"versions": package_versions("lm-eval")}
                | scores
            )
        # a spread model refers to itself, and the next one needs its place
        del engine
        gc.collect()

    def _compared(self, model: str, engine: Engine, blocks: Tensor) -> Row:
        """
        Return the agreement with the reference model as a part of a row. It is empty
        without a reference, and for the reference itself.
        """
        if self._dense is None or model == self.reference:
            return {}
        assert isinstance(engine, TransformersEngine)
        agreement = engine.agreement(self._dense, blocks)
        return {SHARE: agreement.share, DIVERGENCE: agreement.divergence}


def _is_current(
    row: Row, checkpoint: str, samples: dict[str, str], definitions: dict[str, str]
) -> bool:
    """
    Say whether the checkpoint, and the text or the definitions of a task, are still
    those that a row measured.
    """
    if "task" in row:
        own = row.get("definitions")
        asked = definitions.get(row["task"], own)
    else:
        own = row.get("tokens_digest")
        asked = samples.get(row.get("text", ""), own)
    return bool(row["checkpoint"] == checkpoint and own == asked)


def perplexities(results: Results, model: str) -> dict[str, StatedPerplexity]:
    """
    Return the perplexities of a model as its model card states them.

    :param results: the results of an evaluation
    :param model: one of the models that were measured
    :return: its perplexity on each text, by the text's name
    """
    bos = results.setup["bos"]
    return {
        row["text"]: StatedPerplexity(row["value"], row["tokens"], row["seq_len"], bos)
        for row in results.rows
        if row["model"] == model and "text" in row
    }


def evaluation_table(results: Results) -> str:
    """
    Format the results of an evaluation as a table in Markdown. It has a row for each
    model and a column for each text and task, and values with their standard errors.
    The agreement with the reference follows its text. The last column is the mean of
    the tasks, if all have the same limit.

    :param results: the results of an evaluation
    :return: the table and its caption
    """
    models = _distinct(row["model"] for row in results.rows)
    texts = _distinct(row["text"] for row in results.rows if "text" in row)
    tasks = _tasks(results)
    compared = [
        text
        for text in texts
        if any(DIVERGENCE in row for row in results.rows if row.get("text") == text)
    ]
    header = ["model"]
    for text in texts:
        header.append(f"{text}, ppl")
        header += [f"{text}, same", f"{text}, KL"] if text in compared else []
    metrics = {task: _metric(results, task) for task, _ in tasks}
    limited = len({limit for _, limit in tasks}) > 1
    for task, limit in tasks:
        label = f"{task} (first {limit})" if limited and limit else task
        header.append(f"{label}, {metrics[task]}")
    averaged = len(tasks) > 1 and not limited
    header += ["mean of the tasks"] if averaged else []
    lines = []
    for model in models:
        cells = [model]
        for text in texts:
            row = results.find(model=model, text=text)
            cells.append(with_error(row["value"], row["stderr"]) if row else "")
            cells += _agreement_cells(row or {}) if text in compared else []
        scores = []
        for task, limit in tasks:
            row = results.find(model=model, task=task, limit=limit)
            score = row["metrics"].get(metrics[task]) if row else None
            cells.append(with_error(**score) if score else "")
            scores += [score] if score else []
        if averaged and len(scores) == len(tasks):
            cells.append(_mean(scores))
        lines.append(cells)
    return markdown_table(header, lines) + "\n\n" + _caption(results) + "\n"


def _agreement_cells(row: Row) -> list[str]:
    if DIVERGENCE not in row:
        return ["", ""]
    return [f"{100 * row[SHARE]:.2f} %", f"{row[DIVERGENCE]:.4f}"]


def _tasks(results: Results) -> list[tuple[str, int | None]]:
    """Return each task with its limit of examples. Each limit has its own column."""
    return _distinct(
        (row["task"], row["limit"]) for row in results.rows if "task" in row
    )


def _metric(results: Results, task: str) -> str:
    """Return the metric that the table shows: accuracy or, without it, the first."""
    row = results.find(task=task)
    assert row is not None
    return "acc" if "acc" in row["metrics"] else next(iter(row["metrics"]))


def _distinct(things: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(things))


def _mean(scores: Sequence[dict[str, Any]]) -> str:
    """
    Return the mean over tasks with its standard error. The tasks are independent, so
    that their squared standard errors add up.
    """
    errors = [score["stderr"] for score in scores]
    stderr = None if None in errors else math.hypot(*errors) / len(errors)
    return with_error(fmean(score["value"] for score in scores), stderr)


def _caption(results: Results) -> str:
    setup = results.setup
    lengths = sorted({row["seq_len"] for row in results.rows if "text" in row})
    parts = []
    if lengths:
        tokens = " or ".join(str(length) for length in lengths)
        limit = setup["max_tokens"]
        sentence = f"Perplexity (ppl) in contiguous blocks of {tokens} tokens"
        if limit:
            sentence += f" of the first {limit} tokens"
        if not setup["bos"]:
            sentence += ", without the token that a tokenizer puts at the beginning"
        parts.append(f"{sentence}.")
    if reference := setup.get("reference"):
        parts.append(
            f"Same: share of the next tokens for which the model and {reference} hold "
            f"the same for the most likely. KL: mean KL({reference} ‖ model), in nats "
            "per token."
        )
    limits = _distinct(limit for _, limit in _tasks(results))
    if limits:
        tasks = "Tasks zero-shot by lm-eval"
        if len(limits) > 1:
            tasks += ", on their first examples where a number is given"
        elif limits[0]:
            tasks += f", on their first {limits[0]} examples"
        parts.append(f"{tasks}.")
    parts.append(f"± is one standard error. Run by {setup['backend']}.")
    return " ".join(parts)
