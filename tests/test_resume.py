"""Nothing that was finished is lost, and nothing of another run is taken for it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from families import checkpoint, tiny_model
from runs import calibration, prune, run, samples, weights
from torch import Tensor

from fista_modifier import FASPPruningModifier, FISTAPruningModifier

TESTS = Path(__file__).resolve().parent


def pruned(**fields: Any) -> dict[str, Tensor]:
    model = tiny_model("llama")
    prune(model, **fields)
    return weights(model)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Tensor]:
    return pruned()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended."""
    folder = tmp_path_factory.mktemp("finished")
    pruned(resume_dir=str(folder))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "layers"))


def prune_with(resume_dir: str, limit: int | None) -> None:
    checkpoint("llama")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    pruned(resume_dir=resume_dir)


def in_another_process(resume_dir: Path, limit: int | None = None) -> subprocess.Popen:
    """
    :param resume_dir: of the run
    :param limit: size of a file, in bytes, after which its disk is full
    """
    call = f"prune_with({str(resume_dir)!r}, {limit})"
    return subprocess.Popen(
        [sys.executable, "-c", f"from test_resume import prune_with; {call}"],
        cwd=TESTS,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("layers_done", [0, 1])
def test_a_killed_run_goes_on_from_the_last_finished_layer(
    tmp_path: Path, uninterrupted: dict[str, Tensor], layers_done: int
) -> None:
    process = in_another_process(tmp_path)
    wanted = tmp_path / ["run.json", "model.layers.0.safetensors"][layers_done]
    while not wanted.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert len(kept) >= layers_done
    assert_same(pruned(resume_dir=str(tmp_path)), uninterrupted)
    assert all(file.stat().st_mtime_ns == before for file, before in kept.items())


def test_a_finished_run_is_only_read(
    folder: Path, uninterrupted: dict[str, Tensor]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    model = tiny_model("llama")
    modifier = prune(model, resume_dir=str(folder))
    assert_same(weights(model), uninterrupted)
    assert len(modifier.results) == 14
    assert len(modifier.reconstructions) == 2
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


@pytest.mark.parametrize("correction", ["none", "full"])
def test_other_error_corrections_resume_too(tmp_path: Path, correction: str) -> None:
    fields = {"error_correction": correction, "resume_dir": str(tmp_path)}
    whole = pruned(**fields)
    (tmp_path / "model.layers.1.safetensors").unlink()
    assert_same(pruned(**fields), whole)


def test_processes_share_the_layers_of_a_model(
    tmp_path: Path, uninterrupted: dict[str, Tensor]
) -> None:
    for layers, left in [("0", "model.layers.1"), ("1", None)]:
        modifier = prune(tiny_model("llama"), resume_dir=str(tmp_path), layers=layers)
        assert modifier.unfinished == ([left] if left else [])
    assert_same(pruned(resume_dir=str(tmp_path)), uninterrupted)


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({"mask_structure": "1:4"}, {}, "recipe: mask_structure was 2:4 and is 1:4"),
        ({"admm_steps": 4}, {}, "recipe: admm_steps was None and is 4"),
        ({}, {"initializer_range": 0.1}, "model: model.embed_tokens.weight was"),
        ({}, {"rms_norm_eps": 0.5}, "config: rms_norm_eps was 1e-06 and is 0.5"),
    ],
)
def test_layers_of_another_run_are_refused(
    folder: Path, fields: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    model = tiny_model("llama", **changes)
    dense = weights(model)
    with pytest.raises(ValueError, match="holds layers of another run") as error:
        prune(model, resume_dir=str(folder), **fields)
    assert message in str(error.value)
    assert_same(weights(model), dense)


def test_layers_that_follow_another_step_are_refused(tmp_path: Path) -> None:
    def chain(selector: str) -> None:
        first = FASPPruningModifier(
            sparsity=0.2, multiple_of=4, selector=selector, preset="paper"
        )
        then = FISTAPruningModifier(mask_structure="2:4", resume_dir=str(tmp_path))
        run(tiny_model("llama"), [first, then])

    chain("fasp")
    chain("fasp")
    with pytest.raises(ValueError, match=r"(?s)steps before it .*fasp.* is .*greedy"):
        chain("greedy")


def test_steps_have_folders_of_their_own(tmp_path: Path) -> None:
    steps = [
        FISTAPruningModifier(
            mask_structure="2:4", targets=[part], resume_dir=str(tmp_path)
        )
        for part in ("re:.*self_attn.*", "re:.*mlp.*")
    ]
    model = tiny_model("llama")
    before = weights(model)
    with pytest.raises(ValueError, match="name another folder for each step"):
        run(model, steps)
    assert all(torch.equal(weights(model)[one], before[one]) for one in before)


def test_other_calibration_data_are_refused(folder: Path) -> None:
    other = {"dataset": calibration(samples().flip(0))}
    with pytest.raises(ValueError, match="calibration data: contents and order was"):
        prune(tiny_model("llama"), resume_dir=str(folder), oneshot_arguments=other)


def test_another_version_is_refused(folder: Path) -> None:
    file = folder / "run.json"
    run = json.loads(file.read_text())
    run["versions"]["llmcompressor"] = "0.13.0"
    file.write_text(json.dumps(run))
    with pytest.raises(ValueError, match="versions: llmcompressor was 0.13.0 and is"):
        pruned(resume_dir=str(folder))


@pytest.mark.parametrize("name", ["run.json", "model.layers.1.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_file_is_named(folder: Path, name: str, share: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        pruned(resume_dir=str(folder))


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    process = in_another_process(tmp_path, limit=16_000)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"could not write {tmp_path}/model.layers.0.safetensors" in output
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("2", "there is no '2': the model's 2 decoder layers are 0-1"),
        ("1-0", "there is no '1-0'"),
        ("all", "'all' is neither a number nor a range"),
        ("", "'' is neither a number nor a range"),
    ],
)
def test_layers_that_do_not_exist_are_refused(
    tmp_path: Path, layers: str, message: str
) -> None:
    with pytest.raises(ValueError, match="^layers: ") as error:
        pruned(layers=layers, resume_dir=str(tmp_path))
    assert message in str(error.value)
