"""The checks that a checkpoint can be trained further, and a model can teach it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from compressed_tensors.offload import disable_onloading
from loguru import logger
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from fista_modifier.checkpoint.names import names_in_memory
from fista_modifier.checkpoint.shards import locate
from fista_modifier.models.classes import check_predicts_text, model_class
from fista_modifier.models.loading import (
    check_not_packed,
    load_config,
    load_tokenizer,
)
from fista_modifier.models.norms import replaced_norms
from fista_modifier.models.vocabulary import check_same_vocabulary
from fista_modifier.pruning.results import REPORT_NAME, PruningReport

__all__ = ["check_architecture", "check_pruned", "check_teacher", "check_unchanged"]


def check_pruned(checkpoint: Path) -> PruningReport:
    """
    Refuse a checkpoint that cannot be trained, and return its report.

    :param checkpoint: folder of a pruned checkpoint
    :return: its report
    :raises FileNotFoundError: if there is no checkpoint, or it has no report
    :raises ValueError: if its weights are quantised or packed, or nothing was pruned
    """
    config = load_config(str(checkpoint))
    if not (checkpoint / REPORT_NAME).is_file():
        raise FileNotFoundError(
            f"{checkpoint} has no {REPORT_NAME}, which says what was pruned: name a "
            "folder that 'fista-prune prune' wrote"
        )
    report = PruningReport.load(checkpoint)
    if report.storage_format != "dense":
        unpack = f"'fista-prune unpack {checkpoint} -o DENSE' gives the dense form"
        if report.storage_format == "dense-legacy":
            unpack = "prune with --format dense"
        raise ValueError(
            f"the weights of {checkpoint} are stored as {report.storage_format}, which "
            f"cannot be trained: {unpack}"
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{checkpoint} is quantised, and rounded weights cannot be trained: prune "
            "without quantisation, recover, and quantise what that writes"
        )
    if not report.operators:
        raise ValueError(f"nothing was pruned in {checkpoint}: there is no recovery")
    return report


def check_teacher(checkpoint: Path, teacher: str) -> None:
    """
    Refuse a teacher that does not suit a checkpoint.

    :param checkpoint: folder of a pruned checkpoint
    :param teacher: folder of the dense model, or its id on the hub
    :raises FileNotFoundError: if there is no such model
    :raises ValueError: if the teacher is of another architecture or vocabulary, or no
        language model, or the checkpoint itself
    """
    config, dense = load_config(str(checkpoint)), load_config(teacher)
    check_not_packed(teacher, dense)
    if Path(teacher).is_dir() and Path(teacher).samefile(checkpoint):
        raise ValueError(
            f"{teacher} cannot teach itself: name the dense model that it was pruned "
            "from"
        )
    check_architecture(config, dense, teacher)
    check_predicts_text(config)
    check_same_vocabulary(
        config,
        load_tokenizer(str(checkpoint)),
        dense,
        load_tokenizer(teacher),
        teacher,
    )


def check_architecture(
    config: PretrainedConfig, dense: PretrainedConfig, teacher: str
) -> None:
    """
    Refuse a teacher of another architecture, and warn of one that is pruned.

    :param config: the configuration of the pruned model
    :param dense: that of the teacher
    :param teacher: folder of the teacher, or its id on the hub
    :raises ValueError: if the architectures differ
    """
    if (Path(teacher) / REPORT_NAME).is_file():
        logger.warning(
            f"{teacher}, the teacher, is a pruned model itself: if you have the dense "
            "model, name that"
        )
    own, other = model_class(config).__name__, model_class(dense).__name__
    if own != other:
        raise ValueError(
            f"{teacher} is a {other} and the pruned model a {own}: name the dense "
            "model that it was pruned from"
        )


def check_unchanged(model: PreTrainedModel, source: str) -> None:
    """
    Refuse a dense model that is no longer what it was loaded from, such as one that was
    fine-tuned or merged with an adapter since: its checkpoint would teach it to forget.
    The first row of each parameter is compared. Nothing is compared where weights are
    stored in other files than safetensors, joined when they are loaded, or of norms
    that the toolkit has replaced.

    :param model: the model before it is pruned
    :param source: folder of the checkpoint that it was loaded from, or its id on the
        hub
    :raises ValueError: if a parameter is another one
    """
    config = cached_file(source, CONFIG_NAME)  # in a folder, or in the hub's cache
    assert config is not None, "it raises where there is none"
    try:
        files, _ = locate(Path(config).parent)
    except FileNotFoundError:
        return
    stored: defaultdict[Path, dict[str, str]] = defaultdict(dict)
    for name, known in (names_in_memory(model, files) or {}).items():
        stored[files[name]][name] = known
    with disable_onloading():
        own = dict(model.named_parameters())
    for name in replaced_norms(model):
        del own[name]
    for file, names in stored.items():
        with safe_open(file, "pt") as opened:
            for name, known in names.items():
                if known not in own or not own[known].ndim:
                    continue
                here = own[known][:1]
                there = opened.get_slice(name)[:1].to(here)
                if not torch.equal(here, there):
                    raise ValueError(
                        f"the model is no longer what {source} holds ({known} differs),"
                        " so that is not its teacher: save the dense model, and name "
                        "its folder in RecoveryModifier's 'teacher'"
                    )
