"""The committed results can be read and continued, by the scripts that made them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import ablations
import compare
import pytest
import recovery
import recovery_ideas
import structured

from fista_modifier.evaluation.comparison import comparison_table
from fista_modifier.evaluation.results import Results

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SEEDS = {
    "compare": {
        "sparsegpt": 3,
        "fista": 3,
        "fista-best": 3,
        "fista-fast": 2,
        "fista-paper": 1,
    },
    "compare-32": {"sparsegpt": 1, "fista": 1, "fista-paper": 1},
}
PATTERNS = {
    "compare": ["2:4", "0.5"],
    "compare-32": ["0.5", "0.6", "0.7", "2:4", "4:8"],
}
SCRIPTS = {
    "structured": structured,
    "structured-512": structured,
    "structured-gemma": structured,
    "structured-heldout": structured,
    "structured-heldout-gemma": structured,
    "structured-peers": structured,
    "recovery": recovery,
    "recovery-gemma": recovery,
    "recovery-headline": recovery,
    "recovery-ideas": recovery_ideas,
    "recovery-pieces": recovery_ideas,
    "recovery-pieces-gemma": recovery_ideas,
}


def continued(name: str, script: ModuleType) -> Results:
    """As by the script with the same arguments, on the machine of the results."""
    file = RESULTS / f"{name}.json"
    committed = json.loads(file.read_text())["setup"]
    setup = script.setup(Namespace(**committed))
    if "versions" in setup:
        assert list(setup["versions"]) == list(committed["versions"])
        setup |= {key: committed[key] for key in ("cpus", "versions")}
    assert setup.keys() == committed.keys()
    return Results.resume(file, setup)


@pytest.mark.parametrize("name", SEEDS)
def test_a_comparison_is_continued_where_it_ended(name: str) -> None:
    results = continued(name, compare)
    for pattern in PATTERNS[name]:
        for method, count in SEEDS[name].items():
            for seed in range(count):
                assert results.find(method=method, pattern=pattern, seed=seed)
    table = (RESULTS / f"{name}.md").read_text()
    assert table == comparison_table(results)


def test_ablations_are_continued_where_they_ended() -> None:
    results = continued("ablations", ablations)
    for variant in (None, *sum(ablations.VARIANTS.values(), [])):
        assert results.find(variant=variant), variant
    assert (RESULTS / "ablations.md").read_text() == ablations.table(results)


@pytest.mark.parametrize("name", ["headline", "headline-gemma"])
def test_a_headline_is_the_table_of_its_results(name: str) -> None:
    table = (RESULTS / f"{name}.md").read_text()
    assert table == comparison_table(continued(name, compare))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_table_is_that_of_its_results(name: str) -> None:
    setup = json.loads((RESULTS / f"{name}.json").read_text())["setup"]
    results = Results.resume(RESULTS / f"{name}.json", setup)
    table = (RESULTS / f"{name}.md").read_text()
    assert table == SCRIPTS[name].table(Namespace(**setup), results)
