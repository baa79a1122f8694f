"""Times of methods, each in processes of its own."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import speed


def test_a_process_that_fails_is_an_error_and_not_a_missing_row(tmp_path: Path) -> None:
    args = Namespace(model=str(tmp_path / "no model"), layers=1)
    with pytest.raises(RuntimeError, match="wanda, 1 threads: process 1 of 1 failed"):
        speed.measure(args, "wanda", 1, 1)
