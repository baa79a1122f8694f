"""The sparsity of a model in compressed-tensors' vocabulary, in its ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressed_tensors.config import SparsityCompressionConfig
from transformers import PreTrainedModel

from fista_modifier.layer import OperatorResult
from fista_modifier.solver import NofM, SparsityPattern

__all__ = ["record_sparsity", "write_legacy_sparsity"]

KEY = "sparsity_config"


def record_sparsity(
    model: PreTrainedModel, results: Sequence[OperatorResult], pattern: SparsityPattern
) -> None:
    """
    Add ``sparsity_config`` to the model's configuration, from where every
    ``save_pretrained`` takes it. At the top level of ``config.json`` it is read by
    nobody who does not look for it: inside ``quantization_config``, transformers would
    insist on compressed-tensors, and with targets vLLM (since 0.22) on a format that
    it no longer has.

    :param model: that was pruned
    :param results: what became of its operators
    :param pattern: the pattern that they have
    """
    structure = str(pattern) if isinstance(pattern, NofM) else "unstructured"
    entries = sum(parameter.numel() for parameter in model.parameters())
    sparsity = sum(result.zeros for result in results) / entries
    earlier = getattr(model.config, KEY, None)
    if earlier:  # another modifier of the recipe has pruned other operators
        sparsity += earlier["global_sparsity"]
        if earlier["sparsity_structure"] != structure:
            structure = "unstructured"
    config = SparsityCompressionConfig(
        format="dense",
        targets=[],
        ignore=[],
        global_sparsity=round(sparsity, 6),
        sparsity_structure=structure,
    )
    setattr(model.config, KEY, config.model_dump())


def write_legacy_sparsity(folder: Path, operators: Sequence[str]) -> None:
    """
    Move ``sparsity_config`` to where compressed-tensors up to 0.14 and vLLM up to 0.18
    look for it, with the operators as targets. Current vLLM refuses such a checkpoint.

    :param folder: of a checkpoint that is not quantised
    :param operators: names of the pruned operators
    :raises ValueError: if the checkpoint has no sparsity, or is quantised
    """
    file = folder / "config.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if KEY not in content:
        raise ValueError(f"{file} has no '{KEY}': the checkpoint was not pruned here")
    if "quantization_config" in content:
        raise ValueError(f"{file} is that of a quantised checkpoint: leave it as it is")
    sparsity = content.pop(KEY) | {"targets": list(operators)}
    content["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        KEY: sparsity,
    }
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
