"""``fista-prune compare``: methods side by side, and the table."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from command_line import invoke
from families import FAMILIES, MIXTURES, checkpoint
from runs import calibration
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fista_modifier.evaluation.comparison import check_methods, comparison_table
from fista_modifier.evaluation.methods import METHODS, pruner
from fista_modifier.evaluation.results import Results
from fista_modifier.models.targets import IGNORE, TARGETS, find_operators
from fista_modifier.solver import NofM, SparsityPattern, Unstructured


@pytest.mark.parametrize("pattern", [NofM(1, 4), Unstructured(0.25)], ids=str)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "dense"])
def test_every_method_prunes_the_same_operators_to_the_pattern(
    method: str, pattern: SparsityPattern, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    pruner(method, pattern)(model, tiny_tokenizer, calibration())
    for name in FAMILIES["llama"].operators:
        weight = model.get_submodule(name).weight
        zeros = float((weight == 0).float().mean())
        # SparseGPT rounds the number of zeros block by block
        assert zeros == pytest.approx(pattern.sparsity, abs=2e-3)
        if isinstance(pattern, NofM):
            assert pattern.holds(weight)
        if method == "magnitude":
            kept = weight != 0
            was = dense[f"{name}.weight"]
            assert torch.equal(weight[kept], was[kept])
            if isinstance(pattern, Unstructured):
                assert was[kept].abs().min() >= was[~kept].abs().max()
    assert torch.equal(model.lm_head.weight, dense["lm_head.weight"])


@pytest.mark.parametrize("family", MIXTURES)
def test_magnitude_prunes_experts_too(
    family: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family))
    pruner("magnitude", NofM(2, 4))(model, tiny_tokenizer, calibration())
    operators = find_operators(model, TARGETS, IGNORE)
    assert sum(".experts." in operator.name for operator in operators) == 2 * 4 * 3
    assert all(NofM(2, 4).holds(operator.weight) for operator in operators)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_peers_leave_routers_alone(
    method: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen2_moe"))
    pruner(method, NofM(2, 4))(model, tiny_tokenizer, calibration())
    operators = find_operators(model, TARGETS, IGNORE)
    assert all(NofM(2, 4).holds(operator.weight) for operator in operators)
    gate = model.get_submodule("model.layers.0.mlp.shared_expert_gate")
    assert bool((gate.weight != 0).all())


def test_experts_that_cannot_have_the_pattern_are_refused_at_once() -> None:
    narrow = str(checkpoint("qwen3_moe", moe_intermediate_size=18))
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj: .*18"):
        check_methods(narrow, ["magnitude"], [NofM(2, 4)])


def test_a_comparison_is_kept_and_continued(
    model: Path, text: Path, tmp_path: Path
) -> None:
    file, table = tmp_path / "results.json", tmp_path / "results.md"
    arguments: tuple[object, ...] = ("compare", model, "--pattern", "2:4")
    arguments += ("--dataset", text, "--samples", 4, "--seq-len", 16, "--text", text)
    arguments += ("--json", file, "--markdown", table, "--methods")
    result = invoke(*arguments, "dense")
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    [dense] = content["rows"]
    assert dense["method"] == "dense"
    assert dense["perplexity_stderr"]["text"] > 0
    assert f"{dense['perplexity']['text']:.2f}" in table.read_text()

    dense["perplexity"]["text"] = 12345.0
    file.write_text(json.dumps(content))
    result = invoke(*arguments, "magnitude")
    assert result.exit_code == 0, result.output
    kept, magnitude = json.loads(file.read_text())["rows"]
    assert kept == dense
    assert (magnitude["method"], magnitude["pattern"]) == ("magnitude", "2:4")
    assert magnitude["zeros"] == pytest.approx(0.5)
    assert magnitude["peak_memory_bytes"] > 1e8
    assert f"{magnitude['perplexity']['text']:.2f}" in table.read_text()
    assert "divergence" not in dense
    assert f"{magnitude['divergence']['text']:.4f}" in table.read_text()
    assert f"{100 * magnitude['same_token']['text']:.2f} %" in table.read_text()

    refused = invoke(*arguments, "magnitude", "--samples", 5)
    assert refused.exit_code == 1
    assert "samples 4, not 5" in " ".join(refused.output.split())

    before = text.read_text()
    text.write_text(before.swapcase())  # another text by the same name
    refused = invoke(*arguments, "magnitude")
    assert refused.exit_code == 1
    assert "calibration_digest" in refused.output and "texts_digest" in refused.output
    text.write_text(before)

    versions = content["setup"]["versions"]
    assert versions["fista-modifier"] == version("fista-modifier")
    versions["fista-modifier"] = "0.0.1"
    file.write_text(json.dumps(content))
    refused = invoke(*arguments, "magnitude")
    assert refused.exit_code == 1
    assert "'fista-modifier': '0.0.1'" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "fistaa"], ["fistaa", "fista-paper"]),
        (["--pattern", "2:3"], ["q_proj", "32"]),
        (["--pattern", "half"], ["half", "2:4"]),
        (["--text", "missing.txt"], ["missing.txt"]),
        (["--eval-seq-len", "4000"], ["model: the text", "4000"]),
        (["--samples", "4000"], ["4000", "--samples"]),
    ],
)
def test_bad_arguments_are_a_message_before_anything_runs(
    model: Path, text: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    file = tmp_path / "results.json"
    common: tuple[object, ...] = ("--pattern", "2:4", "--dataset", text)
    common += ("--text", text, "--seq-len", 16, "--json", file)
    result = invoke("compare", model, *common, *arguments)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output
    assert not file.exists()


def test_what_the_toolkit_would_leave_dense_is_refused() -> None:
    gpt2 = str(checkpoint("gpt2"))
    check_methods(gpt2, ["magnitude", "fista"], [NofM(2, 4)])
    with pytest.raises(ValueError, match="sparsegpt and wanda leave the Conv1D"):
        check_methods(gpt2, ["wanda", "sparsegpt", "fista"], [NofM(2, 4)])


def row(method: str, seed: int | None, one: float, two: float, seconds: float):
    return {
        "method": method,
        "pattern": "2:4",
        "seed": seed,
        "seconds": seconds,
        "zeros": 0.5,
        "peak_memory_bytes": 2**30,
        "perplexity": {"one": math.exp(one), "two": math.exp(two)},
    }


SETUP = {
    "model": "m",
    "calibration": "c",
    "samples": 1,
    "seq_len": 2,
    "eval_seq_len": 3,
    "eval_tokens": None,
    "cpus": 4,
    "versions": {},
}


def cells(results: Results, method: str) -> dict[str, str]:
    header, _, *lines = comparison_table(results).splitlines()
    split = [line.strip("|").split("|") for line in (header, *lines) if "|" in line]
    names, *rows = [[cell.strip() for cell in line] for line in split]
    [chosen] = [line for line in rows if line[1] == method]
    return dict(zip(names, chosen, strict=True))


def test_excess_and_time_are_shares_of_sparsegpts() -> None:
    dense = row("dense", None, 1.0, 2.0, 0.0)
    rows = [row("sparsegpt", 0, 2.0, 4.0, 10.0), row("fista", 0, 1.5, 3.5, 25.0)]
    found = cells(Results(SETUP, [dense, *rows], None), "fista")
    assert found["excess, one"] == "0.500"
    assert found["excess, two"] == "0.750"
    assert found["excess"] == "0.625"
    assert found["time"] == "2.50"
    assert "processor time" not in found
    assert found["one"] == f"{math.exp(1.5):.2f}"
    assert "seeds" not in found

    seeds = [row("sparsegpt", 1, 3.0, 4.0, 10.0), row("fista", 1, 1.5, 3.5, 5.0)]
    found = cells(Results(SETUP, [dense, *rows, *seeds], None), "fista")
    assert found["seeds"] == "2"
    assert found["its range"] == "0.500–0.625"
    assert found["time"] == "1.50"
    seeds[1]["seconds"] = None  # it ran beside others
    found = cells(Results(SETUP, [dense, *rows, *seeds], None), "fista")
    for measured, seconds in zip(rows + seeds, (8.0, 16.0, 4.0, 2.0), strict=True):
        measured["processor_seconds"] = seconds
    found = cells(Results(SETUP, [dense, *rows, *seeds], None), "fista")
    assert (found["its range"], found["time"]) == ("0.500–0.625", "")
    assert found["processor time"] == "1.25"


def test_without_a_meaningful_reference_there_is_no_share() -> None:
    dense = row("dense", None, 1.0, 2.0, 0.0)
    fista = row("fista", 0, 1.5, 3.5, 25.0)
    alone = cells(Results(SETUP, [dense, fista], None), "fista")
    assert (alone["excess"], alone["time"]) == ("", "")
    better = row("sparsegpt", 0, 0.5, 4.0, 10.0)  # than the dense model
    beside = cells(Results(SETUP, [dense, better, fista], None), "fista")
    assert (beside["excess"], beside["time"]) == ("", "2.50")
