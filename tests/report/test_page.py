"""The page of a report, as text."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from fista_modifier.cli import app
from fista_modifier.pruning.results import Calibration, PruningReport, RecoveryResult
from fista_modifier.report import render
from fista_modifier.report.figures import _known
from fista_modifier.report.grid import OperatorGrid

PACKAGE = "fista_modifier.report"


@pytest.mark.parametrize("preset", ["paper", "default", "fast"])
def test_the_page_has_the_figures_that_the_report_has_data_for(
    preset: str, reports: dict[str, PruningReport]
) -> None:
    page = render(reports[preset])
    assert page.count("<svg") == (4 if preset == "fast" else 5)
    assert ("No λ was tried" in page) == (preset == "fast")
    assert ("mean layer error" in page) == (preset == "default")


def test_calibration_data_may_be_unknown(report: PruningReport) -> None:
    page = render(replace(report, calibration=None))
    assert f"{report.tokens:,}<small>tokens</small>" in page
    assert "data set" in render(report) and "data set" not in page


def test_every_operator_is_in_the_table_and_on_the_map(report: PruningReport) -> None:
    page = render(report)
    for operator in report.operators:
        assert f'<th scope="row">{operator.name}</th>' in page
        layer = operator.name.split(".")[2]
        tooltip = f"layer {layer}, {operator.kind}: {operator.stored_error:.2%}"
        assert f"<title>{tooltip}</title>" in page


def test_the_figures_are_well_formed_named_and_in_the_colours_of_the_page(
    report: PruningReport,
) -> None:
    ids: list[str] = []
    figures = render(report).split("<svg")[1:]
    for figure in figures:
        root = ElementTree.fromstring("<svg" + figure.split("</svg>")[0] + "</svg>")
        assert root.attrib["role"] == "img"
        labels = {element.get("id"): element.text for element in root[:2]}
        assert labels[root.attrib["aria-labelledby"]]
        assert labels[root.attrib["aria-describedby"]]
        ids += [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
        assert not [e for e in root.iter() if e.tag == "style"]
        assert "var(--text)" in figure and "#0000" not in figure
    assert len(ids) == len(set(ids))


def test_a_search_is_reported_relative_to_the_output(
    reports: dict[str, PruningReport],
) -> None:
    for operator in reports["paper"].operators:
        assert len(operator.search) == operator.trials > 0
        errors = [operator.relative_start_error]
        for step in operator.search:
            errors.append(step.error)
            assert step.best_error == pytest.approx(min(errors))
        assert operator.penalty in {0.0, *(step.penalty for step in operator.search)}
        # entries that were still free were filled after the search
        assert operator.relative_error <= min(errors) * (1 + 1e-5)


def test_a_report_of_an_older_version_is_drawn_all_the_same(
    report: PruningReport, tmp_path: Path
) -> None:
    report.save(tmp_path)
    assert PruningReport.load(tmp_path) == report
    file = tmp_path / "pruning_report.json"
    content = json.loads(file.read_text())
    del content["recipe"]
    for operator in content["operators"]:
        del operator["search"]
    file.write_text(json.dumps(content))
    assert render(PruningReport.load(tmp_path)).count("older version") == 2


def test_operators_are_placed_by_layer_and_kind(report: PruningReport) -> None:
    one = report.operators[0]

    def grid(*names: str) -> OperatorGrid:
        return OperatorGrid.of([replace(one, name=name) for name in names])

    gpt2 = grid("h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.mlp.c_proj", "lm_head")
    assert gpt2.kinds == ["attn.c_proj", "mlp.c_proj", "lm_head"]
    assert gpt2.kind_labels == gpt2.kinds  # their last parts are ambiguous
    assert gpt2.layers == ["h.0", "h.1", ""]
    assert gpt2.layer_labels == ["0", "1", ""]
    experts = grid("layers.3.experts.0.up_proj", "layers.3.experts.1.up_proj")
    assert experts.kind_labels == ["up_proj"]
    assert len(experts.of_kind("experts.up_proj")) == 2
    towers = grid("text.layers.0.q_proj", "image.layers.0.q_proj")
    assert towers.layer_labels == ["text.layers.0", "image.layers.0"]


def test_the_last_step_of_a_recipe_is_drawn(report: PruningReport) -> None:
    first = replace(report.operators[0], name="layers.0.down_proj", zeros=0, seconds=2)
    last = replace(first, zeros=first.shape[0] * first.shape[1], seconds=3)
    (drawn,) = OperatorGrid.of([first, last]).operators
    assert (drawn.sparsity, drawn.seconds) == (1, 5)


def test_an_expert_that_no_token_reaches_has_no_error(report: PruningReport) -> None:
    one = replace(report.operators[0], name="layers.0.experts.0.up", relative_error=0.4)
    other = replace(one, name="layers.0.experts.1.up", tokens=0, relative_error=0.0)
    grid = OperatorGrid.of([one, other])
    error = _known("relative_error")
    assert grid.along_layers("experts.up", error) == [0.4]
    assert grid.along_layers("experts.up", lambda one: one.sparsity) == [one.sparsity]


def test_the_command_writes_the_page_beside_the_report_or_where_asked(
    report: PruningReport, tmp_path: Path
) -> None:
    report.save(tmp_path)
    elsewhere = tmp_path / "page.html"
    for arguments in ([], ["--output", str(elsewhere)]):
        result = CliRunner().invoke(app, ["report", str(tmp_path), *arguments])
        assert result.exit_code == 0, result.output
    assert elsewhere.read_text() == (tmp_path / "pruning_report.html").read_text()


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(app, ["report", str(tmp_path)], env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert "needs matplotlib: pip install 'fista-modifier[report]'" in result.output


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "has no pruning_report.json"),
        ("{", "not a pruning report"),
        ({"operators": [{"name": "q_proj"}]}, "operators.0.shape"),
        ({"operators": []}, "no pruned operator"),
        ({"seconds": "long"}, "seconds"),
    ],
)
def test_what_is_not_a_report_is_a_message(
    content: dict[str, object] | str | None,
    word: str,
    report: PruningReport,
    tmp_path: Path,
) -> None:
    file = tmp_path / "pruning_report.json"
    if content is not None:
        report.save(tmp_path)
        changed = json.loads(file.read_text()) | content if content != "{" else "{"
        file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    result = CliRunner().invoke(app, ["report", str(tmp_path)], env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert "error:" in result.output and word in result.output
    assert not (tmp_path / "pruning_report.html").exists()


def test_a_smaller_model_has_its_share_and_no_sparsity(report: PruningReport) -> None:
    smaller = [
        replace(one, pattern="32 of 48 columns", zeros=0, search=(), trials=0)
        for one in report.operators
    ]
    page = render(replace(report, operators=smaller, removed_share=0.19834))
    assert "<dd>19.83 %<small>of the decoder layers’ parameters" in page
    assert "<dt>sparsity</dt>" not in page
    assert "Channels that leave are chosen without one." in page
    assert "<dt>sparsity</dt>" in render(report)


def test_a_recovery_is_beside_the_errors_that_were_before_it(
    report: PruningReport,
) -> None:
    data = Calibration("text.txt", 32, 512, 0)
    recovery = RecoveryResult(
        "dense", data, 15872, 511, 2.0, 2e-4, 4, 8, 0.41, 0.22, 60.0
    )
    page = render(replace(report, recovery=[recovery]))
    assert "<dt>recovery</dt><dd>0.2200<small>nats" in page and "0.4100 before" in page
    before = replace(recovery, pruned_after=True)
    assert "more was pruned after" in render(replace(report, recovery=[before]))
    assert "recovery" not in render(report)
