"""
Tables of recipe fields for the documentation, made from the fields themselves.

    python tests/recipe_table.py

rewrites the marked parts of ``docs/*.md``. A part begins with a line
``<!-- fields of NAME -->``, of a modifier that the package exports, or with
``<!-- values of the presets -->``, and ends with ``<!-- end -->``. Each field of a
modifier needs a ``Field(description=...)`` in Markdown; ``examples=[...]`` is shown
with its type.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmcompressor.modifiers import Modifier
from pydantic import BaseModel

import fista_modifier
from fista_modifier.pruning.presets import PRESETS
from fista_modifier.pruning.sparse import SparseProcedure

DOCS = Path(__file__).resolve().parents[1] / "docs"
PART = re.compile(
    r"(<!-- (fields of \w+|values of the presets) -->\n).*?(<!-- end -->)", re.S
)
# fields that have another name, or another place, in a procedure
RENAMED = {
    "warm_start": "solver.start",
    "error_correction": "error_correction",
    "reconstruction_epochs": "reconstruction.epochs",
    "reconstruction_rate": "reconstruction.rate",
}
BY_PRESET = "by preset"


def main() -> None:
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        page.write_text(rewritten(text), encoding="utf-8")


def rewritten(page: str) -> str:
    """
    :param page: Markdown
    :return: the same, with its marked parts made anew
    """

    def part(match: re.Match[str]) -> str:
        what = match[2]
        if what.startswith("fields of "):
            modifier = getattr(fista_modifier, what.rpartition(" ")[2])
            table = field_table(modifier, Modifier, preset_values(modifier))
        else:
            table = preset_table(fista_modifier.FISTAPruningModifier)
        return f"{match[1]}{table}\n{match[3]}"

    return PART.sub(part, page)


def field_table(
    model: type[BaseModel],
    base: type[BaseModel] = BaseModel,
    by_preset: Iterable[str] = (),
) -> str:
    """
    :param model: whose fields are described
    :param base: whose fields are left out
    :param by_preset: fields whose default depends on the preset
    :return: Markdown: name, values, default and meaning of each field
    :raises ValueError: naming fields without a description
    """
    schema = model.model_json_schema()
    own = {*model.__annotations__}
    fields = {
        name: field
        for name, field in sorted(
            model.model_fields.items(), key=lambda one: one[0] not in own
        )
        if name not in base.model_fields
    }
    undescribed = [name for name, field in fields.items() if not field.description]
    if undescribed:
        raise ValueError(
            f"{model.__name__}: no Field(description=...) of {', '.join(undescribed)}"
        )
    rows = []
    for name, field in fields.items():
        described = resolved(schema["properties"][name], schema)
        kind = values(described)
        if field.examples:
            kind += f", such as {', '.join(map(code, field.examples))}"
        default = "required"
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            default = "none" if value is None else code(value)
        rows.append(
            [f"`{name}`", kind, BY_PRESET if name in by_preset else default]
            + [" ".join(str(field.description).split())]
        )
    return markdown(["field", "values", "default", "meaning"], rows)


def preset_table(model: type[BaseModel]) -> str:
    """
    :param model: FISTAPruner's modifier
    :return: Markdown: the values that each preset gives to the fields left out
    """
    values = preset_values(model)
    rows = [
        [f"`{name}`", *(code(of_preset[preset]) for preset in PRESETS)]
        for name, of_preset in values.items()
    ]
    return markdown(["field", *(f"`{preset}`" for preset in PRESETS)], rows)


def preset_values(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """
    :param model: a modifier
    :return: of each of its fields that a preset has a value for, the value by preset
    """
    if "preset" not in model.model_fields:
        return {}
    found = {}
    for name, field in model.model_fields.items():
        if name in Modifier.model_fields or field.default is not None:
            continue
        try:
            found[name] = {
                preset: value_in(procedure, RENAMED.get(name, f"solver.{name}"))
                for preset, procedure in PRESETS.items()
            }
        except AttributeError:
            continue  # no preset has a value for it
    return found


def value_in(procedure: SparseProcedure, path: str) -> Any:
    value: Any = procedure
    for name in path.split("."):
        value = getattr(value, name)
    return value


def resolved(described: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a JSON schema, with what it refers to."""
    reference = described.get("$ref")
    if reference is None:
        return dict(described)
    return dict(schema["$defs"][reference.rpartition("/")[2]])


def values(described: Mapping[str, Any]) -> str:
    """
    :param described: JSON schema of a field
    :return: what it may be, in words
    """
    options = described.get("anyOf")
    if options:
        return " or ".join(
            values(option) for option in options if option.get("type") != "null"
        )
    if "enum" in described or "const" in described:
        known = described.get("enum") or [described["const"]]
        return ", ".join(map(code, known))
    match described.get("type"):
        case "boolean":
            return "true or false"
        case "integer":
            return "whole number" + bounds(described)
        case "number":
            return "number" + bounds(described)
        case "array":
            return f"list ({values(described.get('items', {}))})"
        case "object":
            return "mapping"
        case _:
            return "text"


def bounds(described: Mapping[str, Any]) -> str:
    words = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "below",
    }
    return "".join(
        f" {word} {described[key]:g}" for key, word in words.items() if key in described
    )


def code(value: object) -> str:
    """A value as a recipe has it."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    if isinstance(value, list):
        return "`[" + ", ".join(f'"{one}"' for one in value) + "]`"
    return f"`{value}`"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line) + " |"
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
