"""The code is typed and in one style."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "tool",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=" ".join,
)
def test_the_code_is_clean(tool: list[str], request: pytest.FixtureRequest) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *tool],
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
