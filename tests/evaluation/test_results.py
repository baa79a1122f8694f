"""Results survive interruptions and are never mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fista_modifier.evaluation.formatting import markdown_table, with_error
from fista_modifier.evaluation.results import Results

SETUP = {"seq_len": 32, "lengths": (1, 2)}


def test_each_row_is_on_disk_at_once_and_found_again(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "results.json"
    results = Results.resume(file, SETUP)
    results.add({"model": "a", "value": 1.5})
    assert json.loads(file.read_text())["rows"] == [{"model": "a", "value": 1.5}]
    results.add({"model": "b", "text": None})
    again = Results.resume(file, SETUP)
    assert again.find(model="a") == {"model": "a", "value": 1.5}
    assert again.find(model="c") is None
    assert again.find(model="a", text=None) is None
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]


def test_a_file_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Results.resume(tmp_path / "file" / "results.json", SETUP)


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    Results.resume(file, SETUP).add({"model": "a"})
    before = file.read_text()
    with pytest.raises(ValueError, match=r"results.json .* seq_len 32, not 64: name"):
        Results.resume(file, SETUP | {"seq_len": 64})
    with pytest.raises(ValueError, match=r"dtype None, not auto"):
        Results.resume(file, SETUP | {"dtype": "auto"})
    assert file.read_text() == before


@pytest.mark.parametrize("content", ["", "[]", '{"setup": {}}', '{"rows": 3}'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="results.json holds no results"):
        Results.resume(file, SETUP)
    assert file.read_text() == content


def test_a_table_has_all_cells() -> None:
    assert markdown_table(["a", "b|c"], [["1"], ["2", "3"]]) == (
        "| a | b\\|c |\n| --- | --- |\n| 1 |  |\n| 2 | 3 |"
    )
    assert with_error(1.23456, 0.01) == "1.235 ± 0.010"
    assert with_error(1.23456, None) == "1.235"
