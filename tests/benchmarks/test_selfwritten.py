"""The benchmark of calibration text that the dense model writes itself."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import selfwritten


def test_each_source_has_its_tokens(model: Path, text: Path) -> None:
    options = {"model": str(model), "calibration": str(text), "samples": 3}
    args = argparse.Namespace(**options, seq_len=16, times=2, prompt=4)
    found = {
        source: selfwritten.tokens(args, source)["input_ids"]
        for source in selfwritten.SOURCES
    }
    given, both, own, more = found.values()
    assert [len(one) for one in found.values()] == [3, 6, 6, 6]
    assert {len(row) for rows in found.values() for row in rows} == {16}
    assert both == [*given, *own[:3]]
    for place, row in enumerate(own):
        beginning = given[place % 3]
        assert row[:4] == beginning[:4]
        assert row[4:] != beginning[4:]
    assert own[:3] != own[3:]  # two texts from the same beginning
    assert len({tuple(row) for row in more}) == 6


def test_it_writes_its_table(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["selfwritten.py", "--model", model, "--calibration", text, "--text", text]
    words += ["--samples", 4, "--seq-len", 16, "--eval-seq-len", 16, "--prompt", 4]
    words += ["--eval-tokens", 160, "--methods", "fista-fast", "--out", out]
    words += ["--sources", "given", "own"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    selfwritten.main()
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    found = [(row["source"], row["recovered"]) for row in rows[1:]]
    assert found == [(one, trained) for one in ("given", "own") for trained in (0, 1)]
    losses = {tuple(row["divergence"].values()) for row in rows[1:]}
    assert len(losses) == 4
    assert "| 1.000 |" in out.with_suffix(".md").read_text()
