"""Tables of fields in the documentation are made from the fields."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, Field
from recipe_table import DOCS, PART, field_table, preset_values, rewritten

from fista_modifier import FISTAPruningModifier, MaskedGPTQModifier


class Base(BaseModel):
    index: int | None = None


class Toy(Base):
    share: float | None = Field(None, ge=0, lt=1, description="share of\n    zeros")
    pattern: str = Field("0:0", description='"n:m"', examples=["2:4"])
    targets: str | list[str] = Field(["Linear"], description="what |to| prune")
    kind: Literal["one", "two"] = Field("one", description="which kind")
    steps: int | None = Field(None, ge=1, description="how many steps")
    exact: bool = Field(False, description="whether it is exact")


def test_a_table_has_names_values_defaults_and_descriptions() -> None:
    assert field_table(Toy, Base, ["steps"]).splitlines() == [
        "| field | values | default | meaning |",
        "| --- | --- | --- | --- |",
        "| `share` | number from 0 below 1 | none | share of zeros |",
        '| `pattern` | text, such as `2:4` | `0:0` | "n:m" |',
        '| `targets` | text or list (text) | `["Linear"]` | what \\|to\\| prune |',
        "| `kind` | `one`, `two` | `one` | which kind |",
        "| `steps` | whole number from 1 | by preset | how many steps |",
        "| `exact` | true or false | `false` | whether it is exact |",
    ]


def test_a_field_without_a_description_is_named() -> None:
    with pytest.raises(ValueError, match=r"Base: no Field.* of index"):
        field_table(Base)


def test_presets_have_values_for_the_fields_that_they_stand_for() -> None:
    values = preset_values(FISTAPruningModifier)
    assert values["warm_start"]["paper"] == "sparsegpt"
    assert values["reconstruction_epochs"]["best"] == 2
    assert values["error_correction"]["best"] == "full"
    assert "resume_dir" not in values
    assert not preset_values(MaskedGPTQModifier)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_the_marked_tables_are_those_of_the_fields(page) -> None:
    text = page.read_text(encoding="utf-8")
    assert rewritten(text) == text, "run: python tests/recipe_table.py"
    assert text.count("<!-- end -->") == len(PART.findall(text))
