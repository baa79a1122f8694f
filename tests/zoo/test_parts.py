"""Models of several parts, such as an encoder and a decoder, or with images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run, weights
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from zoo import Specimen

from fista_modifier import FISTAPruningModifier

IGNORE = ["re:.*lm_head$"]


def pruned(
    specimen: Specimen, data: Any = None, **fields: Any
) -> tuple[PreTrainedModel, FISTAPruningModifier]:
    model = specimen.load()
    settings = {"mask_structure": "2:4", "preset": "fast", "ignore": IGNORE} | fields
    modifier = FISTAPruningModifier(**settings)
    run(model, modifier, **arguments(specimen, data))
    return model, modifier


def arguments(specimen: Specimen, data: Any = None) -> dict[str, Any]:
    dataset = specimen.dataset if data is None else data
    basic = {"pipeline": "basic"} if specimen.case.get("basic") else {}
    return {"dataset": dataset} | basic


@pytest.mark.parametrize("name", ["bart_s2s", "llava_image"])
def test_layers_that_the_pipeline_does_not_leave_are_read_again(
    name: str, tmp_path: Path
) -> None:
    """It runs some of them within a function of its own."""
    specimen, folder = Specimen(name), str(tmp_path)
    first, done = pruned(specimen, resume_dir=folder)
    again, read = pruned(specimen, resume_dir=folder)
    assert read.unfinished == []
    assert {one.name for one in read.results} == {one.name for one in done.results}
    expected = weights(first)
    for parameter, value in weights(again).items():
        assert torch.equal(value, expected[parameter]), parameter


def test_parts_of_the_layers_are_put_together(tmp_path: Path) -> None:
    specimen = Specimen("bart_s2s")
    for layers in ("0-1", "2-3"):
        pruned(specimen, resume_dir=str(tmp_path), layers=layers)
    model, modifier = pruned(specimen, resume_dir=str(tmp_path))
    assert modifier.unfinished == []
    expected = weights(pruned(specimen)[0])
    for parameter, value in weights(model).items():
        assert torch.equal(value, expected[parameter]), parameter


def other(batches: list[dict[str, Tensor]], what: str) -> DataLoader[Any]:
    """The same batches but for one argument."""
    changed = [batch | {what: batch[what].flip(-1)} for batch in batches]
    return DataLoader(
        changed,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=lambda batch: batch,
    )


@pytest.mark.parametrize(
    ("name", "what"), [("t5_s2s", "input_ids"), ("llava_image", "pixel_values")]
)
def test_other_data_are_known_by_any_argument_of_the_model(
    name: str, what: str, tmp_path: Path
) -> None:
    specimen = Specimen(name)
    pruned(specimen, resume_dir=str(tmp_path))
    data = other(specimen.batches, what)
    with pytest.raises(ValueError, match="calibration data: contents and order was"):
        pruned(specimen, data, resume_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["t5_s2s", "bart_s2s", "llava_image"])
def test_the_pruned_model_is_followed_through_one_part_only(name: str) -> None:
    specimen = Specimen(name)
    model = specimen.load()
    before = weights(model)
    full = {"preset": "fast", "error_correction": "full", "mask_structure": "2:4"}
    with pytest.raises(ValueError, match="are of different parts of the model"):
        run(
            model,
            FISTAPruningModifier(ignore=IGNORE, **full),
            **arguments(specimen),
        )
    assert all(torch.equal(weights(model)[one], before[one]) for one in before)


def test_the_pruned_model_is_followed_where_images_are_left_alone() -> None:
    ignore = [*IGNORE, "re:.*vision_tower.*", "re:.*projector.*"]
    _, modifier = pruned(
        Specimen("llava_image"), error_correction="full", ignore=ignore
    )
    assert len(modifier.results) == 14


@pytest.mark.parametrize("name", ["t5_s2s", "bart_s2s"])
@pytest.mark.parametrize("other", ["encoder", "decoder"])
def test_the_pruned_model_is_followed_through_one_part_beside_another(
    name: str, other: str
) -> None:
    def errors(error_correction: str) -> dict[str, float]:
        _, modifier = pruned(
            Specimen(name),
            error_correction=error_correction,
            preset="fast",
            ignore=[*IGNORE, f"re:.*{other}.*"],
        )
        return {result.name: result.relative_error for result in modifier.results}

    layerwise, followed = errors("intra"), errors("full")
    assert list(followed) == list(layerwise)
    # The keys and values of cross-attention come from the dense encoder.
    dense_input = r"\.(block|layers)\.0\.|(EncDecAttention|encoder_attn)\.[kv]"
    same = {one for one in followed if followed[one] == layerwise[one]}
    assert same == {one for one in followed if re.search(dense_input, one)}
