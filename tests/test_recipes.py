"""What the toolkit would drop from a recipe is an error that says how to write it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import tiny_model
from llmcompressor.recipe import Recipe
from runs import run, weights

from fista_modifier import FISTAPruningModifier
from fista_modifier.modifiers.recipes import read_recipe

GOOD = """
pruning_stage:
  run_type: oneshot
  pruning_modifiers:
    FISTAPruningModifier:
      mask_structure: "2:4"
"""
MODIFIER = FISTAPruningModifier(mask_structure="2:4")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", GOOD),
        ("a.yml", "# a remark\nversion: 1\nargs: {share: 0.5}\n" + GOOD),
        ("a.md", f"---{GOOD}---\n# Card\n"),
        (
            "a.json",
            json.dumps(
                {
                    "a_stage": {
                        "b_modifiers": {
                            "FISTAPruningModifier": {"mask_structure": "2:4"}
                        }
                    }
                }
            ),
        ),
        ("a.yaml", "\ufeff" + GOOD),
    ],
)
def test_files_and_texts_are_read(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    sources = [file, str(file)] if name.endswith(".md") else [file, str(file), text]
    for source in sources:
        (modifier,) = read_recipe(source).modifiers
        assert modifier.mask_structure == "2:4"


def test_modifiers_are_a_recipe() -> None:
    assert read_recipe(MODIFIER).modifiers == [MODIFIER]
    assert read_recipe((MODIFIER,)).modifiers == [MODIFIER]
    assert read_recipe(Recipe.create_instance(GOOD)).modifiers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# nothing but a remark", "is empty"),
        ("{}", "no modifiers"),
        ("version: 1", "no modifiers"),
        ("- a", "is no recipe but .*'a'"),
        ("pruning_stage: {", "is not YAML, line 1"),
        ("a: b\n  c: d: e", "is not YAML, line 2: mapping values"),
        ("a: \x00", "is not YAML"),
        (GOOD.replace("pruning_stage", "pruning"), "'pruning' .*'pruning_stage'"),
        (GOOD.replace("pruning_stage", "pruning_stages"), "write 'pruning_stage'"),
        (
            GOOD.replace("pruning_modifiers", "pruning"),
            "'pruning' in 'pruning_stage'.*'pruning_modifiers'",
        ),
        (GOOD.replace("modifiers", "modifier"), "write 'pruning_modifiers'"),
        ("FISTAPruningModifier: {}", "'FISTAPruningModifier' .*write 'pruning_stage'"),
        ("pruning_stage:", "nothing in 'pruning_stage'"),
        ("pruning_stage: {pruning_modifiers: }", "nothing in 'pruning_modifiers'"),
        ("a_stage: {b_modifiers: [X]}", r"\['X'\] in 'b_modifiers'"),
        (
            "a_stage: {b_modifiers: {FISTAPruningModifier: }}",
            r"nothing after 'FISTAPruningModifier:'.*'FISTAPruningModifier: \{\}'",
        ),
        (
            "a_stage: {b_modifiers: {FISTAPruningModifier: '2:4'}}",
            "'2:4' after 'FISTAPruningModifier:'",
        ),
        (GOOD + "pruning_stage: {}", "'pruning_stage' is there twice"),
        ("a_stage: {b_modifiers: {X: {}}}", "No modifier of type 'X'"),
        ("a_stage: {b_modifiers: {FISTAPruningModifier: {}}}", "sparsity is missing"),
    ],
)
def test_what_would_have_no_effect_is_named(
    tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_recipe(file)
    with pytest.raises(ValueError, match=words):
        read_recipe(text)


def test_a_name_that_is_twice_in_json_is_named() -> None:
    step = '"a_stage": {"b_modifiers": {"FISTAPruningModifier": {"sparsity": 0.5}}}'
    assert len(read_recipe(f"{{{step}}}").modifiers) == 1
    with pytest.raises(ValueError, match="'a_stage' is there twice"):
        read_recipe(f"{{{step}, {step}}}")


def test_no_modifier_is_no_recipe() -> None:
    with pytest.raises(ValueError, match="no modifiers"):
        read_recipe([])


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="missing.yaml"):
        read_recipe(Path("missing.yaml"))
    with pytest.raises(ValueError, match="'missing.yaml', nor is there such a file"):
        read_recipe("missing.yaml")


def test_other_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xe9")
    with pytest.raises(ValueError, match="a.yaml is not UTF-8"):
        read_recipe(file)
    file = tmp_path / "a.md"
    file.write_text("# no front matter")
    with pytest.raises(ValueError, match="a.md has no front matter"):
        read_recipe(file)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "16:32", "2:2", "1:59"])
def test_a_pattern_needs_no_quotes(pattern: str) -> None:
    text = GOOD.replace('"2:4"', pattern)
    for recipe in (read_recipe(text), Recipe.create_instance(text)):
        assert recipe.modifiers[0].mask_structure == pattern


def test_unstructured_needs_no_quotes() -> None:
    text = GOOD.replace('"2:4"', "0:0\n      sparsity: 0.5")
    assert read_recipe(text).modifiers[0].mask_structure == "0:0"
    assert FISTAPruningModifier(mask_structure=0, sparsity=0.5).mask_structure == "0:0"


@pytest.mark.parametrize("value", ["4:2", "2:4:8", "24", "-2:4"])
def test_a_number_that_is_no_pattern_is_to_be_quoted(value: str) -> None:
    with pytest.raises(ValueError, match=r"mask_structure is the number .*: quote n:m"):
        read_recipe(GOOD.replace('"2:4"', value))


@pytest.mark.parametrize(
    ("part", "instead"),
    [("pruning_stage", "pruning"), ("pruning_modifiers", "pruners")],
)
def test_oneshot_refuses_a_modifier_that_the_toolkit_would_drop(
    part: str, instead: str
) -> None:
    model = tiny_model("llama")
    before = weights(model)
    with pytest.raises(ValueError, match=f"has '{instead}'.* write '"):
        run(model, GOOD.replace(part, instead))
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name])


def test_other_recipes_are_left_to_the_toolkit() -> None:
    dropped = GOOD.replace("FISTAPruning", "SparseGPT").replace("_stage", "")
    assert not Recipe.create_instance(dropped).modifiers
