"""What a pruned model's ``save_pretrained`` writes beside its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce, wraps
from pathlib import Path
from typing import Any

from compressed_tensors.offload import disable_onloading
from compressed_tensors.offload.dist_utils import is_source_process
from compressed_tensors.utils import patch_attr
from loguru import logger
from transformers import PreTrainedModel

from fista_modifier.checkpoint.model_card import update_model_card
from fista_modifier.checkpoint.sparsity_config import write_sizes, write_sparsity
from fista_modifier.distributed import current_ranks
from fista_modifier.models.experts import native_experts
from fista_modifier.pruning.results import REPORT_NAME, PruningReport

__all__ = [
    "describe_on_save",
    "report_of",
    "report_of_checkpoint",
    "revise_report",
    "saved_by_caller",
    "when_saved",
]


def describe_on_save(model: PreTrainedModel, report: PruningReport) -> None:
    """
    Make the model's ``save_pretrained`` also write what was done to the model. It
    writes a ``sparsity_config`` into ``config.json``, a report and a model card (unless
    there is one that somebody else wrote). The toolkit wraps ``save_pretrained`` as
    well, and restores the original ``config.json``, so that an attribute of
    ``model.config`` would be lost.

    Tensors get the names of the checkpoint that the model came from; the model itself
    stays as it is: see ``native_experts``.

    :param model: the pruned model
    :param report: what was done to it; added to what was done before, also to the
        checkpoint that it came from
    """
    if _state(model) is None:
        earlier = report_of_checkpoint(model)
        _write_on_save(model, [earlier] if earlier else [])
    state = _state(model)
    assert state is not None
    state.reports.append(report)
    # counted now, because quantised weights are packed when the model is saved
    with disable_onloading():  # a list of onloaded weights is the whole model
        state.entries = sum(parameter.numel() for parameter in model.parameters())


def revise_report(
    model: PreTrainedModel, revise: Callable[[PruningReport], PruningReport]
) -> None:
    """
    Change the report of what was done to a model, for what does not prune.

    :param model: a model that was pruned in this process
    :param revise: returns the new report, given that of all runs together
    """
    state = _state(model)
    assert state is not None, "pruned before"
    state.reports = [revise(state.report)]


def report_of(model: PreTrainedModel) -> PruningReport | None:
    """
    Return the report of what was done to a model in this process.

    :param model: any model
    :return: its report, or None if this package did nothing to it
    """
    state = _state(model)
    return state.report if state else None


def report_of_checkpoint(model: PreTrainedModel) -> PruningReport | None:
    """
    Return the report of the checkpoint that a model came from.

    :param model: any model
    :return: the report; None if there is none in a local folder, or, with a warning, if
        it cannot be read
    """
    folder = Path(model.name_or_path)
    if not model.name_or_path or not (folder / REPORT_NAME).is_file():
        return None
    try:
        return PruningReport.load(folder)
    except ValueError as error:  # the work must not be lost for it
        logger.warning(f"The new report leaves out what {folder} went through: {error}")
        return None


def when_saved(model: PreTrainedModel, action: Callable[[], object]) -> None:
    """
    Do something as soon as the model is saved, such as to delete what it could be made
    from once more.

    :param model: a model that was pruned in this process
    :param action: called once, in the process that writes
    """
    state = _state(model)
    assert state is not None, "pruned before"
    state.when_saved.append(action)


@contextmanager
def saved_by_caller(model: PreTrainedModel) -> Iterator[None]:
    """
    Keep ``save_pretrained`` from writing the report and the model card, which the
    caller writes. The model counts as saved once this context has ended without an
    error.

    :param model: any model
    """
    state = _state(model) or _OnSave()
    with patch_attr(state, "by_caller", True):
        yield
    state.saved()


@dataclass
class _OnSave:
    """
    The state of a model's ``save_pretrained``: what it writes beside the weights.

    :param reports: the report of each run on the model, in the order of the runs
    :param entries: number of entries of the model's parameters after the last run
    :param by_caller: whether the caller writes the report and the card
    :param when_saved: what is to be done once the model is saved
    """

    reports: list[PruningReport] = field(default_factory=list)
    entries: int = 0
    by_caller: bool = False
    when_saved: list[Callable[[], object]] = field(default_factory=list)

    @property
    def report(self) -> PruningReport:
        """The report of all runs together."""
        return reduce(PruningReport.followed_by, self.reports)

    def saved(self) -> None:
        """Do what was to be done once the model is saved."""
        while self.when_saved:
            self.when_saved.pop(0)()


def _state(model: PreTrainedModel) -> _OnSave | None:
    """
    Return the state at the model's ``save_pretrained``, or None. The toolkit's wrapper
    around ``save_pretrained`` shares it.
    """
    return getattr(model.save_pretrained, "on_save", None)


def _write_on_save(model: PreTrainedModel, earlier: Iterable[PruningReport]) -> None:
    save = model.save_pretrained
    state = _OnSave([*earlier])

    @wraps(save)
    def save_pretrained(save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        try:
            with native_experts(model):
                save(save_directory, *args, **kwargs)
            if is_source_process():
                write_beside(Path(save_directory))
        finally:
            current_ranks().wait()  # others may read what the first one writes

    def write_beside(folder: Path) -> None:
        report = state.report
        write_sizes(folder, report.sizes)
        if report.sparsity:
            write_sparsity(folder, report.sparse, state.entries, report.share_of_layers)
        if not state.by_caller:
            report.save(folder)
            update_model_card(folder, report)
            state.saved()

    save_pretrained.on_save = state  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained
