"""``fista-prune eval``: perplexity and lm-eval's tasks, on local data."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from command_line import invoke
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fista_modifier.evaluation import perplexity
from fista_modifier.evaluation.perplexity import block_losses, token_blocks
from fista_modifier.evaluation.tasks import TaskSuite

QUESTIONS = [
    {"question": f"{subject} is", "choices": choices, "label": label}
    for label, choices in enumerate((["blue", "red"], ["deep", "dry"]))
    for subject in ("the sky", "the sea", "a lake", "rain", "ice")
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks that lm-eval finds by their names: water, and its first half."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, questions in (("water", QUESTIONS), ("sky", QUESTIONS[:5])):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in questions))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    return folder


def accuracy(
    model: Path, tokenizer: PreTrainedTokenizerBase, questions: list[dict[str, Any]]
) -> float:
    """Of the choices that the model finds most likely, without lm-eval."""
    network = AutoModelForCausalLM.from_pretrained(model)
    right = 0
    for row in questions:
        scores = []
        for choice in row["choices"]:
            prompt = tokenizer(row["question"])["input_ids"]
            answer = tokenizer(" " + choice)["input_ids"]
            with torch.no_grad():
                logits = network(torch.tensor([prompt + answer])).logits[0]
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            scores.append(sum(logprobs[i, token] for i, token in enumerate(answer)))
        right += int(torch.tensor(scores).argmax()) == row["label"]
    return right / len(questions)


def test_texts_and_tasks_are_measured_for_each_model(
    model: Path,
    text: Path,
    task_folder: Path,
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    twin = shutil.copytree(model, tmp_path / "twin")
    other = tmp_path / "other.txt"
    other.write_text("Sphinx of black quartz, judge my vow. " * 10)
    file, table = tmp_path / "results.json", tmp_path / "results.md"
    arguments: tuple[object, ...] = ("eval", model, twin, "--seq-len", 32)
    arguments += ("--text", text, "--text", other, "--tasks", "water,sky")
    arguments += ("--task-path", task_folder, "--json", file, "--markdown", table)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output

    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 8
    expected = perplexity(
        AutoModelForCausalLM.from_pretrained(model),
        tiny_tokenizer,
        text.read_text(),
        seq_len=32,
    )
    share = accuracy(model, tiny_tokenizer, QUESTIONS)
    assert 0 < share < 1
    spread = math.sqrt(share * (1 - share) / (len(QUESTIONS) - 1))
    for folder in (str(model), str(twin)):
        own = {
            row.get("text") or row["task"]: row
            for row in rows
            if row["model"] == folder
        }
        assert own["text"]["value"] == pytest.approx(expected.value)
        assert own["text"]["stderr"] == pytest.approx(expected.stderr)
        assert own["water"]["metrics"]["acc"]["value"] == pytest.approx(share)
        assert own["water"]["metrics"]["acc"]["stderr"] == pytest.approx(spread)
        assert (own["water"]["examples"], own["sky"]["examples"]) == (10, 5)
    [header, _, line, *_] = table.read_text().splitlines()
    columns = "model", "text, ppl", "other, ppl", "water, acc", "sky, acc"
    assert header == f"| {' | '.join(columns)} | mean of the tasks |"
    cells = line.strip("| ").split(" | ")
    assert cells[0] == str(model)
    assert cells[1] == f"{expected.value:.3f} ± {expected.stderr:.3f}"
    assert cells[3] == f"{share:.3f} ± {spread:.3f}"
    sky = accuracy(model, tiny_tokenizer, QUESTIONS[:5])
    both = math.hypot(spread, math.sqrt(sky * (1 - sky) / 4)) / 2
    assert cells[5] == f"{(share + sky) / 2:.3f} ± {both:.3f}"
    assert f"{expected.value:.3f}" in result.output


def test_blocks_may_begin_as_in_published_tables(
    model: Path, text: Path, tmp_path: Path, starting_tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = shutil.copytree(model, tmp_path / "starting")
    starting_tokenizer.save_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for option in ("--bos", "--no-bos"):
        file = tmp_path / f"results{option}.json"
        arguments = ("eval", folder, "--text", text, "--seq-len", 32, "--json", file)
        result = invoke(*arguments, option)
        assert result.exit_code == 0
        told = "without the token" in " ".join(result.output.split())
        assert told == (option == "--no-bos")
        [row] = json.loads(file.read_text())["rows"]
        blocks = token_blocks(
            starting_tokenizer, text.read_text(), 32, bos=option == "--bos"
        )
        assert row["value"] == pytest.approx(
            math.exp(fmean(block_losses(network, blocks)))
        )
        found.append(row["value"])
    assert found[0] != found[1]
    mixed = invoke(*arguments, "--bos")
    assert mixed.exit_code == 1
    assert "bos False, not True" in " ".join(mixed.output.split())


def test_what_is_measured_is_kept_until_checkpoint_or_text_change(
    model: Path, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    arguments = ("eval", model, "--text", text, "--seq-len", 32, "--json", file)
    assert invoke(*arguments).exit_code == 0
    content = json.loads(file.read_text())
    measured = content["rows"][0]["value"]
    content["rows"][0]["value"] = 12345.0
    file.write_text(json.dumps(content))
    assert "12345.000" in invoke(*arguments).output

    other = tmp_path / "other.txt"
    other.write_text("Sphinx of black quartz, judge my vow. " * 10)
    beside = invoke("eval", model, "--text", other, *arguments[4:])
    assert "12345.000" in beside.output and "other, ppl" in beside.output
    other.write_text("Pack my box with five dozen liquor jugs. " * 10)
    again = invoke("eval", model, "--text", other, *arguments[4:])
    rows = json.loads(file.read_text())["rows"]
    assert "12345.000" in again.output
    assert [row["text"] for row in rows] == ["text", "other"]
    assert f"{rows[1]['value']:.3f}" not in beside.output

    refused = invoke(*arguments, "--max-tokens", 64)
    assert refused.exit_code == 1
    assert "max_tokens None, not 64" in " ".join(refused.output.split())

    network = AutoModelForCausalLM.from_pretrained(model)
    network.lm_head.weight.data.zero_()
    network.save_pretrained(model)
    assert invoke(*arguments).exit_code == 0
    [row] = json.loads(file.read_text())["rows"]  # that of the other text is gone too
    assert row["value"] != pytest.approx(measured)
    assert row["value"] == pytest.approx(network.config.vocab_size, rel=1e-4)


def test_tasks_of_another_limit_are_others(
    model: Path, text: Path, task_folder: Path, tmp_path: Path
) -> None:
    file, table = tmp_path / "results.json", tmp_path / "results.md"
    kept = ("--seq-len", 32, "--json", file, "--markdown", table)
    tasks = ("--tasks", "water", "--task-path", task_folder)
    for arguments in ((*tasks, "--limit", 4), ("--text", text), tasks):
        result = invoke("eval", model, *arguments, *kept)
        assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    first, _, whole = content["rows"]
    assert (first["limit"], first["examples"]) == (4, 4)
    assert (whole["limit"], whole["examples"]) == (None, 10)

    first["metrics"]["acc"]["value"] = 12345.0
    file.write_text(json.dumps(content))
    both = (*tasks[:1], "water,sky", *tasks[2:], "--limit", 4)
    result = invoke("eval", model, *both, *kept)
    assert result.exit_code == 0, result.output
    [header, _, line, *_] = table.read_text().splitlines()
    columns = "text, ppl", "water (first 4), acc", "water, acc", "sky (first 4), acc"
    assert header == f"| model | {' | '.join(columns)} |"
    score = f"{whole['metrics']['acc']['value']:.3f}"
    cells = line.strip("| ").split(" | ")
    assert cells[2].startswith("12345.000") and cells[3].startswith(score)


def test_tasks_that_are_defined_anew_are_measured_anew(
    model: Path, task_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    tasks = ("--tasks", "water", "--task-path", task_folder)
    arguments = ("eval", model, *tasks, "--json", file)
    assert invoke(*arguments).exit_code == 0
    content = json.loads(file.read_text())
    content["rows"][0]["metrics"]["acc"]["value"] = 12345.0
    file.write_text(json.dumps(content))
    assert invoke(*arguments).exit_code == 0
    [row] = json.loads(file.read_text())["rows"]
    assert row["metrics"]["acc"]["value"] == 12345.0, "nothing has changed"
    others = ("eval", model, "--tasks", "sky", *arguments[4:])
    assert invoke(*others).exit_code == 0
    kept, sky = json.loads(file.read_text())["rows"]
    assert kept == row and sky["task"] == "sky"
    with (task_folder / "water.yaml").open("a") as definition:
        definition.write("\n# another one\n")
    assert invoke(*arguments).exit_code == 0
    assert invoke(*arguments).exit_code == 0
    rows = {row["task"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["water"]["metrics"]["acc"]["value"] <= 1


GROUP = """
group: {name}
task: [water, sky]
aggregate_metric_list:
  - metric: {metric}
"""


def test_a_group_is_measured_as_a_whole(
    model: Path,
    task_folder: Path,
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    (task_folder / "lakes.yaml").write_text(GROUP.format(name="lakes", metric="acc"))
    file = tmp_path / "results.json"
    arguments = ("--task-path", task_folder, "--json", file)
    result = invoke("eval", model, "--tasks", "lakes", *arguments)
    assert result.exit_code == 0, result.output
    [row] = json.loads(file.read_text())["rows"]
    expected = accuracy(model, tiny_tokenizer, [*QUESTIONS, *QUESTIONS[:5]])
    assert row["metrics"]["acc"]["value"] == pytest.approx(expected)
    assert row["examples"] == 15


def test_a_group_without_a_score_is_refused(task_folder: Path) -> None:
    definition = GROUP.format(name="rivers", metric="acc").partition("aggregate")[0]
    (task_folder / "rivers.yaml").write_text(definition)
    with pytest.raises(ValueError, match="'rivers' as a whole: .* as water, sky"):
        TaskSuite(["rivers"], task_folder)


def test_a_group_that_turns_out_to_have_no_score_is_not_kept(
    model: Path, text: Path, task_folder: Path, tmp_path: Path
) -> None:
    (task_folder / "seas.yaml").write_text(GROUP.format(name="seas", metric="f1"))
    file = tmp_path / "results.json"
    arguments = ("eval", model, "--text", text, "--json", file)
    refused = invoke(*arguments, "--tasks", "seas", "--task-path", task_folder)
    assert refused.exit_code == 1
    assert "no metric of 'seas'" in " ".join(refused.output.split())
    assert invoke(*arguments).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "wather"], ["wather", "water"]),
        (["--tasks", "no-data"], ["no-data", "missing.jsonl", "--task-path"]),
        ([], ["--tasks"]),
    ],
)
def test_bad_tasks_are_a_message(
    model: Path, task_folder: Path, arguments: list[str], words: list[str]
) -> None:
    definition = TASK.format(name="no-data", data=task_folder / "missing.jsonl")
    (task_folder / "no-data.yaml").write_text(definition)
    text = [] if arguments else ["--text", "text.txt"]
    result = invoke("eval", model, *text, *arguments, "--task-path", task_folder)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "water", "--task-path", "nowhere"], ["nowhere"]),
        (["--text", "missing.txt"], ["missing.txt"]),
        (["--seq-len", "4000"], ["text, ", "4000", "--seq-len"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--max-tokens", "0"], ["--max-tokens"]),
        (["--limit", "0"], ["--limit"]),
        (["--limit", "3"], ["--limit has no effect without --tasks"]),
        (["--backend", "vllm"], ["vllm", "--backend transformers"]),
    ],
)
def test_bad_arguments_are_a_message_before_anything_runs(
    model: Path, text: Path, arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    result = invoke("eval", model, "--text", text, "--json", file, *arguments)
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output
    assert not file.exists()


def test_without_lm_eval_the_extra_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    result = invoke("eval", model, "--tasks", "paper")
    assert result.exit_code == 1
    assert "fista-modifier[eval]" in result.output
