"""Recipes from files and texts, with a message for what the toolkit would pass over.

The toolkit reads stages whose names end in ``_stage`` and groups whose names end in
``_modifiers``, and drops the rest without a word.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe

__all__ = ["notice_what_is_dropped", "read_recipe"]

EXAMPLE = "pruning_stage: pruning_modifiers: FISTAPruningModifier: …"


def read_recipe(recipe: str | Path | Recipe | Modifier | Sequence[Modifier]) -> Recipe:
    """
    Read a recipe.

    :param recipe: a YAML, JSON or Markdown file, YAML text, or modifiers
    :return: the recipe, with one modifier at least
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is no recipe, or a part of it would have no effect
    """
    if isinstance(recipe, Path) and not recipe.is_file():
        raise FileNotFoundError(f"the recipe {recipe} does not exist")
    if isinstance(recipe, str) and not _is_file(recipe):
        read = _parsed(recipe, "the recipe", "")
    elif isinstance(recipe, str | Path):
        file = Path(recipe)
        name = f"the recipe {file}"
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 text: {error}") from error
        read = _parsed(text, name, file.suffix.lower())
    else:
        given = recipe if isinstance(recipe, Recipe | Modifier) else list(recipe)
        read = Recipe.create_instance(given)
    if not read.modifiers:
        raise ValueError(f"the recipe has no modifiers; it needs {EXAMPLE}")
    return read


def notice_what_is_dropped(modifiers: Sequence[type[Modifier]]) -> None:
    """
    Make the toolkit refuse a recipe that names a modifier of this package where the
    toolkit would pass over it. This also holds for the recipe of ``oneshot()``.

    :param modifiers: the modifiers of this package
    """
    read = Recipe.from_dict.__func__
    names = {modifier.__name__ for modifier in modifiers}

    def from_dict(cls: type[Recipe], recipe_dict: dict[str, Any]) -> Recipe:
        recipe: Recipe = read(cls, recipe_dict)
        found = [one for one in recipe.modifiers if type(one).__name__ in names]
        if len(found) < _count(recipe_dict, names):
            _check(recipe_dict, "the recipe")
        return recipe

    Recipe.from_dict = classmethod(from_dict)


def _count(content: Any, names: set[str]) -> int:
    """Count how often one of the names is a key of nested mappings."""
    if not isinstance(content, dict):
        return 0
    return sum((key in names) + _count(one, names) for key, one in content.items())


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # it is too long for a name, or not one at all
        return False


def _parsed(text: str, name: str, ending: str) -> Recipe:
    if ending == ".md":
        text = _front_matter(text, name)
    try:
        # JSON comes first, as in the toolkit: not all that is JSON is YAML, too
        content = _json(text, name) or yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{name} is not YAML{where}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {error}") from error
    if content is None:
        raise ValueError(f"{name} is empty; it needs {EXAMPLE}")
    if not isinstance(content, dict):
        hint = "" if ending else ", nor is there such a file"
        raise ValueError(
            f"{name} is no recipe but {str(content)[:60]!r}{hint}; it needs {EXAMPLE}"
        )
    _check(content, name)
    return Recipe.from_dict(content)


def _json(text: str, name: str) -> Any:
    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise ValueError(
                    f"{name}: '{key}' is there twice, and only one would count"
                )
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=each_once)
    except json.JSONDecodeError:
        return None


def _front_matter(text: str, name: str) -> str:
    match = re.search(r"^\s*(?:---|\+\+\+)(.*?)(?:---|\+\+\+)", text, re.S | re.M)
    if match is None:
        raise ValueError(f"{name} has no front matter between two lines of ---")
    return match[1]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A loader of YAML that refuses a name given twice: only one would count."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                continue
            if key.value in names:
                raise yaml.constructor.ConstructorError(
                    problem=f"'{key.value}' is there twice, and only one would count",
                    problem_mark=key.start_mark,
                )
            names.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _check(content: dict[Any, Any], name: str) -> None:
    """
    Refuse a recipe of which the toolkit would drop a part.

    :raises ValueError: if there is such a part; the message names it
    """
    for stage, groups in content.items():
        if not str(stage).endswith("_stage"):
            # variables and remarks have no effect of their own
            if stage != "args" and (isinstance(groups, dict | list) or groups is None):
                raise ValueError(
                    f"{name} has '{stage}' where a stage must be, and the names of "
                    f"stages end in _stage: write '{_renamed(stage, '_stage')}', as in "
                    f"{EXAMPLE}"
                )
            continue
        for group, modifiers in _entries(groups, name, stage):
            if not str(group).endswith("_modifiers"):
                if isinstance(modifiers, dict | list) or modifiers is None:
                    raise ValueError(
                        f"{name} has '{group}' in '{stage}', where the names of groups "
                        f"end in _modifiers: write '{_renamed(group, '_modifiers')}', "
                        f"as in {EXAMPLE}"
                    )
                continue
            for modifier, fields in _entries(modifiers, name, group):
                _check_fields(modifier, fields, name)


def _entries(value: Any, name: str, key: str) -> list[tuple[Any, Any]]:
    if not isinstance(value, dict) or not value:
        raise ValueError(
            f"{name} has {'nothing' if not value else repr(value)} in '{key}'; it "
            f"needs {EXAMPLE}"
        )
    return list(value.items())


def _check_fields(modifier: Any, fields: Any, name: str) -> None:
    if fields is None:
        raise ValueError(
            f"{name} has nothing after '{modifier}:': write its fields below it, "
            f"indented, or '{modifier}: {{}}' if it is to have none"
        )
    if not isinstance(fields, dict):
        raise ValueError(
            f"{name} has {fields!r} after '{modifier}:', where its fields must be: "
            "one a line, with the field's name, a colon and the value"
        )


def _renamed(key: Any, ending: str) -> str:
    base = re.sub(r"(_?stages?|_?modifiers?)$", "", str(key), flags=re.IGNORECASE)
    is_modifier = str(key).endswith("Modifier")
    return f"{'pruning' if is_modifier or not base else base}{ending}"
