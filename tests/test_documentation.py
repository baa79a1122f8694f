"""What README and docs say can be done, done."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import invoke
from llmcompressor.recipe import Recipe

import fista_modifier

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# what other tests run: installations, servers, several processes
ELSEWHERE = ("pip ", "python3 examples/bootstrap.py", "vllm ", "torchrun ")
SMALL = ["--dataset", "my-text.txt", "--samples", "4", "--seq-len", "16"]


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, code)
        for page in PAGES
        for found, code in BLOCK.findall(page.read_text(encoding="utf-8"))
        if found == language
    ]


def test_every_block_has_a_language_that_is_tested() -> None:
    found = {
        language
        for page in PAGES
        for language, _ in BLOCK.findall(page.read_text(encoding="utf-8"))
    }
    assert found == {"bash", "python", "yaml"}
    indented = re.compile(r"^ {4}(fista-prune|torchrun|pip|python3?|vllm) ", re.M)
    assert not [page.name for page in PAGES if indented.search(page.read_text())]


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_recipes_are_read(page: str, text: str) -> None:
    assert yaml.safe_load(text)
    assert Recipe.create_instance(text).modifiers


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_code_runs(
    page: str, code: str, model: Path, text: Path, tmp_path: Path
) -> None:
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model))
    code = code.replace('dataset="open_platypus"', f'dataset=load("{text}")')
    code = code.replace("max_seq_length=2048", "max_seq_length=16")
    code = code.replace("SmolLM2-135M-Instruct-2of4", str(tmp_path / "out"))
    code = code.replace("recipes/", f"{ROOT}/recipes/")
    loader = (
        "from datasets import load_dataset\n"
        "load = lambda file: load_dataset('text', data_files=file, split='train')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", loader + code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("page", "script"), blocks("bash"))
def test_commands_run(
    page: str,
    script: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for name in ("my-text.txt", "some-text.txt", "my.txt"):
        (tmp_path / name).write_text(text.read_text())
    made = invoke("prune", str(model), "-o", "OUT", "--pattern", "2:4", *SMALL)
    assert made.exit_code == 0, made.output
    lines = [line.partition("  #")[0] for line in script.splitlines() if line]
    for line in lines:
        if line.startswith(ELSEWHERE):
            continue
        words = [str(model) if word == "MODEL" else word for word in shlex.split(line)]
        assert words[0] == "fista-prune", line
        result = invoke(*adapted(words[1:]))
        assert result.exit_code == 0, f"{line}\n{result.output}"


def adapted(words: list[str]) -> list[str]:
    """A command of the documentation on small local data, and as often as one likes."""
    if words[0] == "eval":
        words = without(words, "--tasks", "--text")
        words += ["--text", "my-text.txt"]
    if words[0] in ("prune", "recover", "compare"):
        words = without(words, "--dataset", "--samples")
        words += SMALL
    if words[0] == "prune":
        halves = {"0-39": "0", "40-79": "1"}
        words = [halves.get(word, word) for word in words] + ["--overwrite"]
    if "--method" in words:  # the model is narrower than 64
        words += ["--multiple-of", "4"]
    if words[0] == "compare":  # each method takes a process of its own
        words = without(words, "--pattern")
        words += [
            "--pattern",
            "2:4",
            "--methods",
            "fista-fast",
            "--text",
            "my-text.txt",
        ]
    return words


def without(words: list[str], *options: str) -> list[str]:
    """A command without options and their values."""
    for option in options:
        if option in words:
            at = words.index(option)
            words = words[:at] + words[at + 2 :]
    return without(words, *options) if set(options) & set(words) else words


def test_tables_name_no_field_that_is_not_there() -> None:
    """That all fields are there, test_recipe_table.py sees."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert "<!-- fields of FISTAPruningModifier -->" in page
    modifiers = (
        getattr(fista_modifier, name)
        for name in fista_modifier.__all__
        if name.endswith("Modifier")
    )
    fields = {name for modifier in modifiers for name in modifier.model_fields}
    first = " ".join(re.findall(r"^\| (.*?) \|", page, re.MULTILINE))
    assert set(re.findall(r"`([a-z_]+)`", first)) <= fields


@pytest.mark.parametrize("name", ["architecture", "special-cases"])
def test_files_that_the_map_names_exist(name: str) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    files = re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", page)
    assert files
    for file in files:
        folder = ROOT if file.startswith("tests/") else ROOT / "fista_modifier"
        assert (folder / file).is_file(), f"{name}.md: {file}"


def test_messages_of_troubleshooting_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    source = " ".join(
        re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8"))
        for file in (ROOT / "fista_modifier").rglob("*.py")
    )
    ours = [
        part
        for line in re.findall(r"^\*{2,3}.*\*\*$", page, re.MULTILINE)
        if "llm-compressor" not in line and "vLLM" not in line
        for part in re.findall(r"`([^`]+)`", line)
    ]
    assert len(ours) >= 8
    for part in ours:
        assert part.strip(" '") in source, part


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
