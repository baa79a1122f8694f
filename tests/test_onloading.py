"""
How much of an offloaded model is on its device at a time. The device is main memory
here, but weights come to it as copies, as they do on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.offload.cache.cpu import CPUCache
from families import tiny_model
from runs import calibration, prune, samples
from torch import Tensor
from transformers import PreTrainedModel

from fista_modifier.evaluation.comparison import _zeros
from fista_modifier.pruning.schedule import Schedule
from fista_modifier.recovery.checks import check_unchanged

VOCABULARY = 4000
"""So many tokens that one matrix of them is larger than all layers together."""


class Device:
    """The bytes of all weights that are on the device, now and at most."""

    def __init__(self) -> None:
        self.held = self.most = 0

    def copy(self, offloaded: Tensor | None) -> Tensor | None:
        if offloaded is None:
            return None
        with torch.no_grad():
            here = offloaded.detach().clone()
        # a parameter stays one, with its attributes
        here.__class__ = offloaded.__class__
        here.__dict__ = dict(offloaded.__dict__)
        self._change(here.nbytes)
        weakref.finalize(here, self._change, -here.nbytes)
        return here

    def _change(self, size: int) -> None:
        self.held += size
        self.most = max(self.most, self.held)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    found = Device()

    def onload(_cache: Any, offloaded: Tensor | None) -> Tensor | None:
        return found.copy(offloaded)

    monkeypatch.setattr(CPUCache, "onload", onload)
    yield found


def sizes(model: PreTrainedModel) -> dict[str, int]:
    with disable_onloading():
        return {name: value.nbytes for name, value in model.named_parameters()}


@pytest.mark.parametrize("fields", [{}, {"preset": "best"}], ids=str)
def test_a_run_has_one_matrix_of_the_vocabulary_on_the_device_and_a_layer(
    fields: dict[str, Any],
    device: Device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one on a model that the toolkit has offloaded before."""
    solve, held = Schedule._pruned, []

    def noting(schedule: Schedule, *arguments: Any) -> Any:
        pruned = solve(schedule, *arguments)
        held.append(device.held)
        return pruned

    monkeypatch.setattr(Schedule, "_pruned", noting)
    model = tiny_model("llama", vocab_size=VOCABULARY)
    matrix = max(sizes(model).values())
    layers = sum(sizes(model.model.layers).values())
    assert layers < matrix
    for number in range(2):
        prune(
            model,
            oneshot_arguments={"dataset": calibration(samples(4, 32, seed=1))},
            resume_dir=str(tmp_path / str(number)),
            **fields,
        )
        assert matrix < device.most <= matrix + layers
        assert not device.held
    assert len(held) == 2 * len(model.model.layers)
    assert max(held[1::2]) < matrix  # the first layer runs with the embedding


def test_what_looks_at_a_whole_model_has_a_weight_at_a_time(
    device: Device, tmp_path: Path
) -> None:
    model = tiny_model("llama", vocab_size=VOCABULARY)
    prune(model, preset="fast")
    model.save_pretrained(tmp_path)
    device.most = device.held
    assert 0 < _zeros(model) < 1
    largest = max(sizes(model.model.layers).values())
    assert 0 < device.most <= 2 * largest  # the last one, until the next is there
    device.most = device.held
    check_unchanged(model, str(tmp_path))
    assert device.most <= largest
