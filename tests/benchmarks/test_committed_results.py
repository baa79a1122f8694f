"""The committed results can be read and continued."""

from __future__ import annotations

import json
from pathlib import Path

from fista_modifier.evaluation.comparison import comparison_table
from fista_modifier.evaluation.results import Results

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_the_comparison_is_continued_where_it_ended() -> None:
    file = RESULTS / "compare.json"
    setup = json.loads(file.read_text())["setup"]
    results = Results.resume(file, setup)
    found = results.find(method="fista", pattern="2:4", seed=0)
    assert found is not None
    value = found["perplexity"]["wikitext2-raw-test"]
    assert f"| 2:4 | fista | {value:.2f} |" in comparison_table(results)
