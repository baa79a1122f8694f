"""What a pruned model's ``save_pretrained`` writes beside its weights."""

from __future__ import annotations

from functools import reduce, wraps
from pathlib import Path
from typing import Any

from compressed_tensors.offload.dist_utils import is_source_process
from transformers import PreTrainedModel

from fista_modifier.checkpoint.model_card import update_model_card
from fista_modifier.checkpoint.sparsity_config import write_sparsity
from fista_modifier.models.experts import native_experts
from fista_modifier.pruning.results import PruningReport

__all__ = ["describe_on_save"]


def describe_on_save(model: PreTrainedModel, report: PruningReport) -> None:
    """
    Have the model's ``save_pretrained`` write a ``sparsity_config`` into
    ``config.json``, a report and a model card (unless there is one that somebody else
    wrote). The toolkit wraps ``save_pretrained`` as well, and restores the original
    ``config.json``: setting an attribute of ``model.config`` would not do.

    Tensors get the names of the checkpoint that the model came from; the model itself
    stays as it is: see ``native_experts``.

    :param model: that was pruned
    :param report: what was done to it; added to what was done before
    """
    reports: list[PruningReport] | None = getattr(
        model.save_pretrained, "pruning_reports", None
    )
    if reports is None:
        reports = []
        _write_on_save(model, reports)
    reports.append(report)


def _write_on_save(model: PreTrainedModel, reports: list[PruningReport]) -> None:
    """:param reports: in order, as they are when it comes to saving"""
    save = model.save_pretrained
    # quantised weights are packed by then
    entries = sum(parameter.numel() for parameter in model.parameters())

    @wraps(save)
    def save_pretrained(save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        with native_experts(model):
            save(save_directory, *args, **kwargs)
        if is_source_process():
            folder = Path(save_directory)
            report = reduce(PruningReport.followed_by, reports)
            write_sparsity(folder, report.operators, entries, report.share_of_layers)
            report.save(folder)
            update_model_card(folder, report)

    save_pretrained.pruning_reports = reports  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained
