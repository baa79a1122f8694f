"""Several processes give the weights of one, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from ranks import outputs, start
from runs import prune, weights


@pytest.mark.parametrize(
    ("size", "family", "fields"),
    [
        (2, "mixtral", {"permute_channels": True}),
        (3, "llama", {"sparsity": 0.5, "mask_structure": "0:0"}),
        (3, "llama", {"distribute": "data", "preset": "fast"}),
        (2, "llama", {"error_correction": "full", "preset": "fast"}),
        # experts with more tokens than inputs: with fewer, rounding decides
        (2, "qwen3_moe", {"distribute": "data", "preset": "fast"}),
    ],
)
def test_several_ranks_give_the_weights_of_one(
    size: int, family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    processes = start(size, tmp_path, family, fields)
    for process, output in zip(processes, outputs(processes), strict=True):
        assert process.returncode == 0, output
    alone = tiny_model(family)
    modifier = prune(alone, **fields)
    by_layers = not {"distribute", "error_correction"} & fields.keys()
    expected = weights(alone)
    for rank in range(size):
        found, names = torch.load(tmp_path / f"{rank}.pt")
        assert names == [result.name for result in modifier.results]
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            assert torch.equal(weight == 0, expected[name] == 0), name
            if by_layers:
                assert torch.equal(weight, expected[name]), name
            else:  # without reconstruction, whose Adam would amplify the rounding
                torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


def test_layers_are_pruned_though_another_is_not_reached(tmp_path: Path) -> None:
    """Of two layers, both wait for a third in vain."""
    processes = start(3, tmp_path, "llama", {"preset": "fast"}, "unreached")
    for process, output in zip(processes, outputs(processes), strict=True):
        assert process.returncode == 0, output
        assert "do not reach 1 layers" in output
    alone = tiny_model("llama")
    prune(alone, preset="fast")
    found, _ = torch.load(tmp_path / "2.pt")
    for name, weight in weights(alone).items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("distribute", ["data", "layers"])
def test_a_layer_that_one_rank_reaches_is_pruned_with_its_data(
    distribute: str, tmp_path: Path
) -> None:
    """As a vision tower is where one rank has all images."""
    fields = {"preset": "fast", "distribute": distribute}
    processes = start(2, tmp_path, "llama", fields, "one reaches")
    for process, output in zip(processes, outputs(processes), strict=True):
        assert process.returncode == 0, output
    (one, names), (other, same) = (torch.load(tmp_path / f"{n}.pt") for n in (0, 1))
    assert names == same
    assert sum(name.startswith("tower.0.") for name in names) == 7
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def test_ranks_go_on_from_what_one_process_left(tmp_path: Path) -> None:
    """Qwen 2 leaves out the mask of a whole batch, all but the first of each rank."""
    fields = {"preset": "fast", "resume_dir": str(tmp_path / "layers")}
    alone = tiny_model("qwen2")
    prune(alone, layers="0", **fields)
    processes = start(2, tmp_path, "qwen2", fields)
    for process, output in zip(processes, outputs(processes), strict=True):
        assert process.returncode == 0, output
        assert "Resuming: 1 layers" in output


def test_ranks_go_on_from_what_ranks_left(tmp_path: Path) -> None:
    """Embeddings are tied, of which only the first rank's model knows as it loads."""
    fields = {"preset": "fast", "resume_dir": str(tmp_path / "layers")}
    for _ in range(2):
        processes = start(2, tmp_path, "gemma2", fields)
        texts = outputs(processes)
        assert [process.returncode for process in processes] == [0, 0], texts
    assert all("Resuming: 2 layers" in text for text in texts)


def test_each_rank_can_read_what_was_saved(tmp_path: Path) -> None:
    """Though the first one, which alone writes, is slow."""
    processes = start(2, tmp_path, "llama", {"preset": "fast"}, "reads")
    for process, output in zip(processes, outputs(processes), strict=True):
        assert process.returncode == 0, output


@pytest.mark.parametrize("fields", [{}, {"distribute": "data"}], ids=str)
@pytest.mark.parametrize("dies", ["killed", "fails"])
def test_a_rank_that_dies_ends_the_run_on_all(
    tmp_path: Path, dies: str, fields: dict[str, Any]
) -> None:
    processes = start(3, tmp_path, "llama", fields, dies)
    texts = outputs(processes)
    assert all(process.returncode != 0 for process in processes), texts
    assert not list(tmp_path.iterdir())
    if dies == "fails" and not fields:
        assert "rank 1 failed: ValueError: no more" in texts[2]


def test_ranks_that_were_given_the_same_data_say_so(tmp_path: Path) -> None:
    processes = start(2, tmp_path, "llama", {}, "same data")
    for process, output in zip(processes, outputs(processes), strict=True):
        assert process.returncode != 0
        assert "all calibration data of rank 0 are among those of rank 1" in output
