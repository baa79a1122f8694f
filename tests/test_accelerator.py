"""What runs on another device than the CPU: see accelerator.cpp."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerator_main import (
    BLOCK,
    CASES,
    IN_BLOCKS,
    MEASURED,
    SMALLER,
    TOKENS,
    WIDE,
    pruned,
    quantised,
    smaller,
)
from families import tiny_model
from torch.utils import cpp_extension

from fista_modifier.cost import LayerShape, peak_device_memory, shape_of
from fista_modifier.pruning.presets import PRESETS

TESTS = Path(__file__).resolve().parent
COMPILER = shutil.which("c++")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None, reason="no C++ compiler"
)


def library(cache: Path) -> Path:
    """The device, compiled once for each version of torch and of its source."""
    source = TESTS / "accelerator.cpp"
    made_of = source.read_bytes() + torch.__version__.encode()
    built = cache / f"accelerator-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    if not built.exists():
        subprocess.run(
            [
                *(str(COMPILER), "-std=c++20", "-O0", "-fPIC", "-shared"),
                *(f"-I{folder}" for folder in cpp_extension.include_paths()),
                *(f"-L{folder}" for folder in cpp_extension.library_paths()),
                *(str(source), "-o", str(built.with_suffix(".part"))),
                *("-lc10", "-ltorch_cpu", "-ltorch"),
            ],
            check=True,
        )
        built.with_suffix(".part").rename(built)
    return built


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("accelerator") / "results.pt"
    process = subprocess.run(
        [sys.executable, "accelerator_main.py", str(library(cache)), str(output)],
        cwd=TESTS,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    found: dict[str, Any] = torch.load(output)
    return found


def test_the_device_refuses_tensors_of_another(results: dict[str, Any]) -> None:
    assert "device" in results["mixed"]


def test_what_the_toolkit_keeps_is_not_kept_again(results: dict[str, Any]) -> None:
    assert results["kept once"]


def test_a_piece_is_cut_before_it_is_fetched(results: dict[str, Any]) -> None:
    whole, quarter = results["fetched"]
    assert whole == 4096 * 8 * 4
    assert quarter == (1024 + 1) * 8 * 4  # the first token is before it


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_cpu(results: dict[str, Any], case: str) -> None:
    found = results["weights"][case]  # tied weights have two names when dispatched
    for name, weight in pruned(*CASES[case]).items():
        assert torch.equal(found[name] == 0, weight == 0), name
        assert torch.allclose(found[name], weight, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("case", SMALLER)
def test_smaller_weights_are_those_of_the_cpu(
    results: dict[str, Any], case: str
) -> None:
    found = results["smaller"][case]
    for name, weight in smaller(*SMALLER[case]).items():
        assert torch.equal(found[name] == 0, weight == 0), name
        # conjugate gradients amplify rounding
        assert float((found[name] - weight).norm() / weight.norm()) < 5e-3, name


def test_a_chain_ends_with_the_weights_of_the_cpu(results: dict[str, Any]) -> None:
    found = results["quantised"]
    for name, weight in quantised().items():
        assert torch.equal(found[name] == 0, weight == 0), name
        step = weight.abs().amax() / 127
        assert bool(((found[name] - weight).abs() <= 1.01 * step).all()), name


@pytest.fixture(scope="module")
def shape() -> LayerShape:
    return shape_of(tiny_model("llama", **WIDE).config, TOKENS)


def planned(shape: LayerShape, case: str) -> float:
    fields = MEASURED[case]
    return peak_device_memory(
        shape,
        PRESETS[fields.get("preset", "default")],
        offload_hessians=fields.get("offload_hessians", False),
    )


@pytest.mark.parametrize("case", MEASURED)
def test_the_plan_knows_the_memory_on_the_device(
    results: dict[str, Any], shape: LayerShape, case: str
) -> None:
    assert planned(shape, case) == pytest.approx(results["memory"][case], rel=0.15)


@pytest.mark.parametrize("case", IN_BLOCKS)
def test_of_large_weights_only_some_rows_are_at_work(
    results: dict[str, Any],
    shape: LayerShape,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fista_modifier.cost.solvers.ENTRIES", BLOCK)
    measured = results["memory in blocks"][case]
    assert planned(shape, case) == pytest.approx(measured, rel=0.15)
    assert measured < results["memory"][case]


@pytest.mark.parametrize("case", MEASURED)
def test_memory_is_sparsegpts_and_a_stages_sums_and_the_layers_weights(
    results: dict[str, Any], shape: LayerShape, case: str
) -> None:
    down = shape.stages[-1]
    sums = torch.float32.itemsize * (down.columns**2 + down.weights)  # and its drift
    weights = torch.bfloat16.itemsize * shape.weights
    assert results["memory"][case] <= results["sparsegpt's memory"] + sums + weights
