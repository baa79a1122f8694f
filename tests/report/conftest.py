"""A real browser, and reports of a real pruning."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, checkpoint
from playwright.sync_api import Browser, sync_playwright
from runs import prune
from transformers import AutoModelForCausalLM

from fista_modifier.pruning.results import Calibration, PruningReport

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """
    The Chromium on PATH, without a window. Where there is none, its tests are skipped,
    unless FISTA_REQUIRE_CHROMIUM is set.
    """
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        missing = f"no {' or '.join(NAMES)} on PATH"
        if os.environ.get("FISTA_REQUIRE_CHROMIUM"):
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=found, args=["--disable-quic"]
        )
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def reports() -> dict[str, PruningReport]:
    """Of a tiny LLaMA, by preset: with a search, with a reconstruction too, bare."""
    made = {}
    for preset in ("paper", "default", "fast"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
        with torch.random.fork_rng():
            modifier = prune(model, preset=preset)
        made[preset] = PruningReport(
            "tiny",
            Calibration("text.txt", 6, 12, 0),
            2.5,
            modifier.results,
            modifier.reconstructions,
            recipe="stage:\n  modifiers: <none>\n",
        )
    return made


@pytest.fixture
def report(reports: dict[str, PruningReport]) -> PruningReport:
    """The richest of them."""
    return replace(reports["default"])


@pytest.fixture
def operators() -> set[str]:
    """Names of the pruned operators."""
    return FAMILIES["llama"].operators
