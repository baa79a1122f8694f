"""The committed results can be read and continued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fista_modifier.evaluation.comparison import comparison_table
from fista_modifier.evaluation.results import Results

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("name", "pattern", "seeds"),
    [
        *(
            (
                "compare",
                pattern,
                {
                    "sparsegpt": 3,
                    "fista": 3,
                    "fista-best": 3,
                    "fista-fast": 2,
                    "fista-paper": 1,
                },
            )
            for pattern in ("2:4", "0.5")
        ),
        *(
            ("compare-32", pattern, {"sparsegpt": 1, "fista": 1, "fista-paper": 1})
            for pattern in ("0.5", "0.6", "0.7", "2:4", "4:8")
        ),
    ],
)
def test_a_comparison_is_continued_where_it_ended(
    name: str, pattern: str, seeds: dict[str, int]
) -> None:
    file = RESULTS / f"{name}.json"
    setup = json.loads(file.read_text())["setup"]
    results = Results.resume(file, setup)
    for method, count in seeds.items():
        for seed in range(count):
            assert results.find(method=method, pattern=pattern, seed=seed)
    assert file.with_suffix(".md").read_text() == comparison_table(results)
