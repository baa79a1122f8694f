"""Ten thousand recipes end in a modifier or in an error that names a field."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import yaml
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from pydantic import ValidationError

from fista_modifier import FISTAPruningModifier, MaskedGPTQModifier

NUMBERS = [0, 1, -1, 2, 128, 0.5, 1e-9, 0.999999, 1.0, 1e300, 10**400, -0.0]
NUMBERS += [float("nan"), float("inf"), float("-inf"), True, False]
TEXTS = [
    "",
    "0.5",
    "2:4",
    "0:0",
    "4:2",
    "1:1",
    "-1:4",
    "2:4:8",
    "a:b",
    "2:",
    ":",
    "²:4",
]
TEXTS += [
    "Linear",
    "re:(",
    "re:.*",
    "paper",
    "fast",
    "admm",
    "full",
    "0-1",
    "9-0",
    "é\x00",
]
OTHERS: list[Any] = [
    None,
    [],
    {},
    [1],
    ["Linear", None],
    {"a": 1},
    [[]],
    b"2:4",
    (1, 2),
]
LIKELY: dict[str, list[Any]] = {
    "sparsity": [0.5, 0.0, 0.75, None, [0.5, 0.25], [0.5, 2.0]],
    "sparsity_profile": ["owl", "OWL", None],
    "owl_m": [5, None],
    "owl_lmbda": [0.08, None],
    "patterns": [{"Linear": "2:4"}, {"re:.*mlp": 0.5, "a": 124}, {"a": "5:4"}],
    "mask_structure": ["2:4", "0:0", "1:4"],
    "preset": ["default", "best", "fast", "paper"],
    "error_correction": ["none", "intra", "full"],
    "warm_start": ["dense", "admm", "wanda"],
    "distribute": ["layers", "data"],
    "layers": ["0", "0-1"],
    "activations_dir": ["folder"],
    "resume_dir": ["folder"],
    "lambda_init": [1e-5, 0.1],
    "lambda_max": [100, 1e6],
    "targets": ["Linear", ["Linear"]],
    "ignore": [[], ["lm_head"]],
    "patience": [0, 1],
    "refit": [True, False],
    "offload_hessians": [True, False],
    "reconstruction_epochs": [0, 0.5],
}


def own_fields(modifier: type[Modifier]) -> list[str]:
    return sorted(set(modifier.model_fields) - set(Modifier.model_fields))


def random_recipe(generator: random.Random, names: list[str]) -> dict[str, Any]:
    """Some fields, mostly likely values and else anything."""
    recipe: dict[str, Any] = {"sparsity": 0.5} if "sparsity" in names else {}
    for name in generator.sample(names, generator.randint(0, 6)):
        likely = LIKELY.get(name, [])
        anything = generator.choice([NUMBERS, TEXTS, OTHERS])
        pool = likely if likely and generator.random() < 0.8 else anything
        recipe[name] = generator.choice(pool)
    if generator.random() < 0.05:
        recipe[generator.choice(["sparsty", "n", "", "model", "_method"])] = 1
    return recipe


def assert_names_a_field(error: ValidationError, names: list[str]) -> None:
    for one in error.errors():
        where = {*map(str, one["loc"])}
        message = one["msg"]
        assert where & {*names} or any(
            re.search(rf"\b{name}\b", message) for name in names if name
        ), one


@pytest.mark.parametrize(
    ("modifier", "count"), [(FISTAPruningModifier, 10_000), (MaskedGPTQModifier, 1_000)]
)
def test_random_fields_make_a_modifier_or_an_error_that_names_one(
    modifier: type[Modifier], count: int
) -> None:
    generator = random.Random(0)
    names = own_fields(modifier)
    made = 0
    for _ in range(count):
        recipe = random_recipe(generator, names)
        try:
            modifier(**recipe)
        except ValidationError as error:
            assert_names_a_field(error, [*names, *recipe])
        else:
            made += 1
    assert count / 50 < made < count  # neither all nor none


def test_random_yaml_makes_a_recipe_or_an_error_that_names_a_field() -> None:
    generator = random.Random(1)
    names = own_fields(FISTAPruningModifier)
    for _ in range(500):
        recipe = random_recipe(generator, names)
        recipe = {
            name: value
            for name, value in recipe.items()
            if not isinstance(value, (bytes, tuple)) and value != 10**400
        }
        text = yaml.safe_dump(
            {"stage": {"group_modifiers": {"FISTAPruningModifier": recipe}}}
        )
        text = text.replace("stage:", "pruning_stage:", 1)
        try:
            assert Recipe.create_instance(text).modifiers
        except ValidationError as error:
            assert_names_a_field(error, [*names, *recipe])
