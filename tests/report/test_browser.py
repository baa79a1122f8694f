"""The page of a report, as a reader sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from fista_modifier.pruning.results import PruningReport
from fista_modifier.report import render

Scheme = Literal["light", "dark"]


@dataclass
class Opened:
    """
    :param page: in the browser
    :param complaints: what its console said
    :param requests: what it asked for
    """

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Callable[..., Opened]:
    """Open the page of a report in a light or a dark browser."""

    def open_page(
        report: PruningReport, scheme: Scheme = "light", width: int = 1280
    ) -> Opened:
        file = tmp_path / "page.html"
        file.write_text(render(report), encoding="utf-8")
        opened = Opened(
            browser.new_page(
                color_scheme=scheme, viewport={"width": width, "height": 900}
            )
        )
        opened.page.on(
            "console", lambda message: opened.complaints.append(str(message))
        )
        opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.goto(file.as_uri())
        return opened

    return open_page


def image(screenshot: bytes) -> Image.Image:
    return Image.open(BytesIO(screenshot)).convert("RGB")


def luminance(colour: tuple[int, ...]) -> float:
    """Relative luminance of WCAG 2."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_can_be_read(
    scheme: Scheme, show: Callable[..., Opened], report: PruningReport
) -> None:
    opened = show(report, scheme)
    assert opened.complaints == []
    assert len(opened.requests) == 1  # the page itself
    figures = opened.page.locator("figure svg").all()
    assert len(figures) == 5
    for figure in figures:
        seen = image(figure.screenshot())
        colours = seen.getcolors(maxcolors=seen.width * seen.height)
        assert colours is not None and len(colours) > 50
        background = seen.getpixel((1, 1))
        assert (luminance(background) > 0.5) == (scheme == "light")
        assert max(contrast(colour, background) for _, colour in colours) > 4
        fills = figure.locator("text").evaluate_all(
            "all => [...new Set(all.map(text => getComputedStyle(text).fill))]"
        )
        for fill in fills:
            written = tuple(int(channel) for channel in fill[4:-1].split(","))
            assert contrast(written, background) > 4.5


def test_nothing_in_a_figure_is_cut_off(
    show: Callable[..., Opened], report: PruningReport
) -> None:
    outside = show(report).page.evaluate(
        """() => [...document.querySelectorAll("figure svg")].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll("text")].filter(text => {
                const box = text.getBoundingClientRect();
                return box.left < frame.left - 2 || box.right > frame.right + 2
                    || box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
            }).map(text => text.textContent);
        })"""
    )
    assert outside == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_no_wider_than_its_window(
    width: int, show: Callable[..., Opened], report: PruningReport
) -> None:
    page = show(report, width=width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.filterwarnings("ignore:constrained_layout")  # of endless names
def test_what_the_report_says_is_never_run(
    show: Callable[..., Opened], report: PruningReport
) -> None:
    evil = "<script>document.title='ran'</script><img src=x onerror=alert(1)>$x$ & co"
    opened = show(
        replace(
            report,
            model=evil,
            recipe=f"</pre>{evil}",
            calibration=replace(report.calibration, dataset=evil),
            versions={evil: evil},
            storage_format=evil,
            operators=[
                replace(operator, name=operator.name + evil, pattern=evil)
                for operator in report.operators
            ],
            layers={name + evil: layer for name, layer in report.layers.items()},
        )
    )
    # the page's policy would block it, too, but not without a complaint
    assert opened.complaints == []
    assert len(opened.requests) == 1
    assert opened.page.title() != "ran"
    assert opened.page.locator("script, img").count() == 0
    assert evil in opened.page.locator("pre").inner_text()
    assert evil in opened.page.locator("figure svg").first.text_content()
