"""The direction of imports: docs/architecture.md has the same table of folders."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fista_modifier"
# from the bottom: a part imports itself and the parts of the lines above its own
ORDER = [
    ["version"],
    ["files", "host", "distributed"],
    ["solver", "data"],
    ["models", "structured"],
    ["calibration"],
    ["channels"],
    ["pruning"],
    ["checkpoint", "cost", "report"],
    ["modifiers", "serving"],
    ["pipeline"],
    ["evaluation"],
    ["recovery"],
    ["cli"],
]
HEIGHT = {part: height for height, parts in enumerate(ORDER) for part in parts}
# modules that are of use where llm-compressor is not installed
ALONE = ["solver", "data", "pruning.results", "checkpoint.packing", "serving", "report"]


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """The parts of the package that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: an import that starts with a dot"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("fista_modifier."):
                yield name.split(".")[1]


def against_the_order() -> set[tuple[str, str]]:
    found = set()
    for file in PACKAGE.rglob("*.py"):
        part = part_of(file)
        if file == PACKAGE / "__init__.py":
            continue  # it makes the modifiers known, and everything imports it
        for other in imported(file):
            allowed = other == part or HEIGHT[other] < HEIGHT[part]
            if not allowed:
                found.add((file.relative_to(PACKAGE).as_posix(), other))
    return found


def test_imports_go_downwards() -> None:
    assert not against_the_order()


def test_every_part_has_a_place_and_every_folder_says_what_it_is_for() -> None:
    parts = {part_of(file) for file in PACKAGE.rglob("*.py")} - {"__init__"}
    assert parts <= set(HEIGHT)
    for part in parts:
        if (PACKAGE / part).is_dir():
            source = (PACKAGE / part / "__init__.py").read_text(encoding="utf-8")
            docstring = ast.get_docstring(ast.parse(source)) or ""
            assert "may import" in " ".join(docstring.split()), part


def test_what_serves_and_reads_is_imported_without_the_toolkit() -> None:
    script = (
        "import importlib, sys\n"
        "sys.modules['llmcompressor'] = None  # importing it raises\n"
        f"for module in {ALONE}:\n"
        "    importlib.import_module(f'fista_modifier.{module}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_table_of_folders_is_that_of_this_test() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)/?` \|", page, re.M)
    heights = [HEIGHT[part] for part in rows]
    assert heights == sorted(heights)
    assert set(rows) == set(HEIGHT)
