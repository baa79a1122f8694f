"""The model card beside a pruned checkpoint: README.md, as the hub reads it."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

from huggingface_hub import ModelCardData

from fista_modifier.checkpoint.report import PruningReport

__all__ = ["CARD_NAME", "model_card"]

CARD_NAME = "README.md"
LOADING = {
    "dense": "It loads like any dense checkpoint, in transformers and in vLLM.",
    "dense-legacy": "Its configuration is for engines of 2025; `fista-prune unpack` "
    "makes it one for those of today.",
    "sparse-bitmask": "Its weights are packed: `fista-prune unpack` makes them dense; "
    "vLLM with the fista_modifier plugin reads them with `--load-format "
    "sparse-bitmask`.",
}
LOADING["sparse-24-bitmask"] = LOADING["sparse-bitmask"]


def model_card(report: PruningReport, name: str) -> str:
    """
    :param report: what was done to the model
    :param name: of the checkpoint
    :return: Markdown with the hub's YAML metadata: base model, library, tags
    """
    pattern = ", ".join(sorted({operator.pattern for operator in report.operators}))
    data = report.calibration
    versions = [f"{package} {one}" for package, one in report.versions.items()]
    facts = {
        "pruned operators": len(report.operators),
        "pattern": pattern,
        "zeros in them": f"{100 * _sparsity(report):.2f} %",
        "mean ‖W\\*X\\* − WX‖ / ‖WX‖ of the solver": f"{_error(report):.4f}",
        "calibration": f"{data.samples} × {data.seq_len} tokens of "
        f"{Path(data.dataset).name}, seed {data.seed}",
        "made with": ", ".join(versions),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    base = Path(report.model)
    return f"""---
{_metadata(report).to_yaml()}
---

# {name}

`{base.name}`, pruned by FISTAPruner (Zhao et al., EMNLP 2025) with fista_modifier, a
plugin of llm-compressor. It has seen the calibration text and no other training.

| | |
|---|---|
{rows}

{LOADING[report.storage_format]} `pruning_report.json`
has the errors of every operator, and `fista-prune verify` checks that all zeros are in
place.
"""


def _metadata(report: PruningReport) -> ModelCardData:
    on_disk = Path(report.model).exists()  # a folder is no model of the hub
    return ModelCardData(
        base_model=None if on_disk else report.model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparse", "pruned", "fista-pruner", "llm-compressor"],
    )


def _sparsity(report: PruningReport) -> float:
    zeros = sum(operator.zeros for operator in report.operators)
    return zeros / sum(math.prod(operator.shape) for operator in report.operators)


def _error(report: PruningReport) -> float:
    return fmean(operator.relative_error for operator in report.operators)
