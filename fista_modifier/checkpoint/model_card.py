"""``README.md`` of a checkpoint: its model card for the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from operator import attrgetter
from pathlib import Path

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import CONFIG_NAME

from fista_modifier.checkpoint.packing import LOAD_FORMAT
from fista_modifier.data.records import is_local
from fista_modifier.pruning.results import (
    REPORT_NAME,
    SHOWN,
    PruningReport,
    RecoveryResult,
    mean_error,
    short_name,
)
from fista_modifier.solver.patterns import reported_pattern

__all__ = [
    "StatedPerplexity",
    "has_foreign_card",
    "model_card",
    "stated_perplexities",
    "update_model_card",
    "write_model_card",
]

CARD_NAME = "README.md"
MARK = b"fista-prune"
"""
The bytes that each model card of this package contains. A card without them is somebody
else's.
"""
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
GENERATING = (
    (
        "AutoModelForImageTextToText",
        "image-text-to-text",
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ),
    (
        "AutoModelForCausalLM",
        "text-generation",
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ),
)
"""The classes that generate text: what loads them, their task, and their names."""
TEMPLATE = files("fista_modifier.checkpoint") / "model_card.md.jinja"


@dataclass(frozen=True)
class StatedPerplexity:
    """
    A perplexity with what it depends on.

    :param value: the perplexity
    :param tokens: number of predicted tokens
    :param seq_len: tokens in a block of text
    :param bos: whether each block begins with what the tokenizer puts at the beginning
        of a text
    """

    value: float
    tokens: int
    seq_len: int
    bos: bool = True


def has_foreign_card(folder: Path) -> bool:
    """
    Say whether a checkpoint has a model card that this package did not write.

    :param folder: the checkpoint's folder
    :return: whether somebody else's card is there
    """
    card = folder / CARD_NAME
    return card.exists() and MARK not in card.read_bytes()


def update_model_card(
    folder: Path,
    report: PruningReport,
    perplexities: Mapping[str, StatedPerplexity] | None = None,
) -> None:
    """
    Write the model card of a checkpoint, unless somebody else's card is there.

    :param folder: the checkpoint's folder
    :param report: what was done to the model
    :param perplexities: perplexities of the checkpoint, by the names of the texts
    """
    if not has_foreign_card(folder):
        write_model_card(folder, report, perplexities)


def write_model_card(
    folder: Path,
    report: PruningReport,
    perplexities: Mapping[str, StatedPerplexity] | None = None,
) -> None:
    """
    Write the model card of a checkpoint.

    :param folder: the checkpoint's folder; a card that is there is replaced
    :param report: what was done to the model
    :param perplexities: perplexities of the checkpoint, by the names of the texts
    """
    name = folder.absolute().name
    card = model_card(name, report, perplexities or {}, _class_name(folder))
    (folder / CARD_NAME).write_text(f"{card}\n", encoding="utf-8")


def stated_perplexities(folder: Path) -> dict[str, StatedPerplexity]:
    """
    Read the perplexities that a checkpoint's model card states.

    :param folder: the checkpoint's folder
    :return: them by the names of the texts; none without a card, and none that does
        not state what it was measured on
    """
    if has_foreign_card(folder) or not (folder / CARD_NAME).exists():
        return {}
    data = ModelCard.load(folder / CARD_NAME).data
    conditions = {field.name for field in fields(StatedPerplexity)} - {"value"}
    return {
        one.dataset_name: StatedPerplexity(one.metric_value, **one.metric_args)
        for one in data.eval_results or []
        if one.metric_type == "perplexity" and conditions == {*(one.metric_args or ())}
    }


def model_card(
    name: str,
    report: PruningReport,
    perplexities: Mapping[str, StatedPerplexity],
    class_name: str | None = None,
) -> ModelCard:
    """
    Return the model card of a checkpoint. It names local files without their folders,
    and links only models and data sets that have an id on the hub.

    :param name: the checkpoint's name
    :param report: what was done to the model
    :param perplexities: perplexities of the checkpoint, by the names of the texts
    :param class_name: the model's class; None stands for a causal language model
    :return: the card
    """
    loader, task = _loader(class_name)
    sparse = replace(report, operators=report.sparse)
    sparsity = round(sparse.sparsity, 4)
    weights = sum(one.shape[0] * one.shape[1] for one in sparse.operators)
    dataset = report.calibration.dataset if report.calibration else ""
    data = ModelCardData(
        base_model=_hub_id(report.model),
        datasets=_hub_id(dataset),
        library_name="transformers",
        pipeline_tag=task,
        tags=["llm-compressor", *_tags(report)],
        model_name=name,
        eval_results=[_result(*item) for item in perplexities.items()] or None,
        sparsity=None if report.operators and not report.sparse else sparsity,
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        base=_shown(report.model),
        dataset=_shown(dataset),
        names=[short_name(method) for method in report.smaller_by],
        sparse_by=report.solvers,
        solvers=[short_name(method) for method in report.solvers],
        patterns=_patterns(sparse),
        sparse=sparse,
        weights=weights,
        error=mean_error(report.stored, attrgetter("stored_error")),
        recovery=[_told(one) for one in report.recovery],
        perplexities=perplexities,
        report=report,
        report_name=REPORT_NAME,
        generates=task is not None,
        loader=loader,
        load_format=LOAD_FORMAT,
    )
    return card


def _loader(class_name: str | None) -> tuple[str, str | None]:
    """
    Return the class of transformers that loads a model, and the hub's name of its task
    (None unless it generates text). A class that transformers does not have is taken
    for a causal language model.
    """
    for loader, task, classes in GENERATING:
        if class_name in classes.values():
            return loader, task
    if class_name is None or not hasattr(transformers, class_name):
        return GENERATING[-1][:2]
    return class_name, None


def _class_name(folder: Path) -> str | None:
    """Return the class that a checkpoint's configuration names; None if it does not."""
    file = folder / CONFIG_NAME
    if not file.exists():
        return None
    names = json.loads(file.read_bytes()).get("architectures") or [None]
    name: str | None = names[0]
    return name


def _hub_id(source: str) -> str | None:
    """
    Return the hub's id of a model or data set, without its configuration; None if it is
    local or has no id.
    """
    name = source.partition(":")[0]
    if Path(source).exists() or Path(name).exists() or is_local(source):
        return None
    return name if HUB_ID.fullmatch(name) else None


def _shown(source: str) -> str:
    """Return the name of a source; that of a local one without folders."""
    return source if _hub_id(source) else Path(source).name


def _told(recovery: RecoveryResult) -> RecoveryResult:
    """Return the result of a recovery with the folders of local files left out."""
    data = recovery.calibration
    return replace(
        recovery,
        teacher=_shown(recovery.teacher),
        calibration=replace(data, dataset=_shown(data.dataset)),
    )


def _patterns(report: PruningReport) -> list[str]:
    """
    Return each pattern with its meaning and the number of operators that have it; one
    summary if there are more than ``SHOWN``.
    """
    if len(report.patterns) > SHOWN:
        return [report.summary_of_patterns]
    return [
        f"{name}: {reported_pattern(name).description} ({count} operators)"
        for name, count in report.patterns.items()
    ]


def _tags(report: PruningReport) -> list[str]:
    if not report.operators:
        return []
    solvers = [short_name(one).lower() for one in report.solvers]
    structured = [short_name(one).lower() for one in report.smaller_by]
    kinds = (reported_pattern(name).tag for name in report.patterns)
    return [*solvers, *dict.fromkeys(structured), "pruned", *dict.fromkeys(kinds)]


def _result(text: str, perplexity: StatedPerplexity) -> EvalResult:
    conditions = asdict(perplexity)
    return EvalResult(
        task_type="text-generation",
        dataset_type=text,  # the hub takes results of one type for one data set's
        dataset_name=text,
        metric_type="perplexity",
        metric_value=round(conditions.pop("value"), 4),
        metric_args=conditions,
    )
