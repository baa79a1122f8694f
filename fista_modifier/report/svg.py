"""
Matplotlib's figures as parts of a page. They take the page's colours, so that one
drawing suits light and dark, and say what they show to those who cannot see it.

Matplotlib has settings that keep text as text and ids stable. It has none for variables
of CSS, for tooltips, or for the title and the description of a figure. These are put
into its SVG here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

__all__ = [
    "GRID",
    "MUTED",
    "SOLVER",
    "START",
    "STORED",
    "TEXT",
    "heat",
    "inline_svg",
    "style",
]

# Placeholders: matplotlib knows no CSS, so each stands for a variable of the page.
TEXT, MUTED, GRID = "#000001", "#000002", "#000003"
START, SOLVER, STORED = "#000004", "#000005", "#000006"
VARIABLES = {
    TEXT: "--text",
    MUTED: "--muted",
    GRID: "--grid",
    START: "--start",
    SOLVER: "--solver",
    STORED: "--stored",
}
HEAT = re.compile("#0001([0-9a-f]{2})")


def heat(share: float) -> str:
    """
    Return the placeholder of a colour of a heat map.

    :param share: a share from 0 to 1
    :return: the placeholder of a colour from the page's ``--low`` to its ``--high``
    """
    return f"#0001{round(100 * min(max(share, 0.0), 1.0)):02x}"


@contextmanager
def style() -> Iterator[None]:
    """Make matplotlib draw in placeholders of colours, with text that stays text."""
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "text.parse_math": False,
            "font.size": 9,
            "text.color": TEXT,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "axes.edgecolor": GRID,
            "axes.labelcolor": MUTED,
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": GRID,
            "grid.linewidth": 0.6,
            "xtick.color": GRID,
            "ytick.color": GRID,
            "xtick.labelcolor": MUTED,
            "ytick.labelcolor": MUTED,
            "legend.frameon": False,
            "lines.linewidth": 1.5,
        }
    ):
        yield


def inline_svg(
    figure: Figure,
    name: str,
    title: str,
    description: str,
    tooltips: Mapping[str, str] | None = None,
) -> str:
    """
    Turn a figure into a part of a page.

    :param figure: a figure that was drawn in :func:`style`
    :param name: a name that is unique on the page
    :param title: the title, which a screen reader says first
    :param description: what the figure shows, in words
    :param tooltips: texts to show over artists, by their gids
    :return: an ``svg`` element for HTML, as wide as there is room
    """
    written = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(written, format="svg")
    root = ElementTree.fromstring(written.getvalue())
    for element in root.iter():
        _as_html(element, name, tooltips or {})
    # the style sheet would hold for the whole page, and nobody reads the metadata
    for unwanted in (root.find("metadata"), root.find("defs")):
        if unwanted is not None:
            root.remove(unwanted)
    labels = {"title": title, "desc": description}
    for position, (tag, text) in enumerate(labels.items()):
        label = ElementTree.Element(tag, id=f"{name}-{tag}")
        label.text = text
        root.insert(position, label)
    view = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib |= {
        "viewBox": view,
        "role": "img",
        "aria-labelledby": f"{name}-title",
        "aria-describedby": f"{name}-desc",
        "stroke-linejoin": "round",
    }
    return _in_page_colours(ElementTree.tostring(root, encoding="unicode"))


def _as_html(
    element: ElementTree.Element, name: str, tooltips: Mapping[str, str]
) -> None:
    """
    Drop an element's namespaces, and ids that another figure may have. Add its tooltip.
    """
    element.tag = element.tag.rpartition("}")[2]
    for attribute in list(element.attrib):
        value = element.attrib.pop(attribute)
        element.attrib[attribute.rpartition("}")[2]] = value
    if element.tag == "g" and (identity := element.attrib.pop("id", None)) in tooltips:
        tooltip = ElementTree.Element("title")
        tooltip.text = tooltips[str(identity)]
        element.insert(0, tooltip)


def _in_page_colours(svg: str) -> str:
    for placeholder, variable in VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")

    def mixed(found: re.Match[str]) -> str:
        share = int(found[1], 16)
        return f"color-mix(in oklab, var(--high) {share}%, var(--low))"

    return HEAT.sub(mixed, svg)
