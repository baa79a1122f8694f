"""The examples run, on a tiny model and a short text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 258}


@pytest.fixture
def model(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(checkpoint("llama", **WIDE)).save_pretrained(
        path
    )
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "example, recipe",
    [
        ("prune/prune.py", "fista-2of4"),
        ("prune_and_quantize/prune_and_quantize.py", "fista-2of4-gptq-w4a16"),
    ],
)
def test_an_example_runs_and_shows_its_zeros(
    example: str, recipe: str, model: Path, tmp_path: Path
) -> None:
    output = run_example(example, recipe, model, tmp_path)
    assert 50 <= percentage(output, "zeros: ") < 65


@pytest.mark.parametrize(
    "recipe, zeros", [("fasp", 0), ("spap", 0), ("fasp-recovery", 0), ("fasp-2of4", 50)]
)
def test_the_structured_example_shows_what_left(
    recipe: str, zeros: float, model: Path, tmp_path: Path
) -> None:
    output = run_example("structured/structured.py", recipe, model, tmp_path)
    # 64 of 256 channels of the MLPs, in multiples of 64
    assert 15 < percentage(output, "left the decoder layers: ") < 18
    assert percentage(output, "zeros: ") == pytest.approx(zeros, abs=0.1)


def percentage(output: str, label: str) -> float:
    [line] = [line for line in output.splitlines() if line.startswith(label)]
    return float(line.removeprefix(label).rstrip("%"))


def run_example(example: str, recipe: str, model: Path, tmp_path: Path) -> str:
    """
    :param example: in its folder
    :param recipe: of the recipes' folder
    :param model: a checkpoint
    :param tmp_path: for its text and its output
    :return: what it printed, with an answer of the pruned model
    """
    text = tmp_path / "text.txt"
    text.write_text("A sparse weight is one with many zeros in it. " * 40)
    process = subprocess.run(
        [
            sys.executable,
            ROOT / "examples" / example,
            model,
            text,
            tmp_path / "out",
            *("--recipe", ROOT / "recipes" / f"{recipe}.yaml"),
            *("--samples", "8", "--seq-len", "32"),
        ],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "The capital of France is" in process.stdout
    return process.stdout
