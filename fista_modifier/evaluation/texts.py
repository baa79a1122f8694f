"""
The texts that perplexity is measured on, joined as the literature joins them.

SparseGPT, Wanda and FISTAPruner share a protocol: WikiText-2's raw test split with a
blank line between its records, the Penn Treebank's test split with a space between its
sentences, and the first 256 blocks of the first 1100 documents, joined by spaces, of
C4's first validation shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from fista_modifier.data import load_text
from fista_modifier.data.records import hub_records, is_local
from fista_modifier.evaluation.perplexity import token_blocks

__all__ = ["PAPER_TEXTS", "Corpus", "Text", "load_texts"]


@dataclass(frozen=True)
class Text:
    """
    One text to measure a perplexity on.

    :param name: the text's name in tables
    :param content: the whole text
    :param max_blocks: number of blocks of it that the protocol takes; None takes all
    """

    name: str
    content: str
    max_blocks: int | None = None

    def token_limit(self, seq_len: int, max_tokens: int | None) -> int | None:
        """
        Return how many tokens of the text are to be used.

        :param seq_len: tokens in a block
        :param max_tokens: the user's own limit; None for none
        :return: the lower limit of the protocol's and the user's; None for all tokens
        """
        own = None if self.max_blocks is None else self.max_blocks * seq_len
        limits = [limit for limit in (own, max_tokens) if limit is not None]
        return min(limits, default=None)

    def blocks(
        self,
        tokenizer: Any,
        seq_len: int,
        max_tokens: int | None = None,
        *,
        bos: bool = True,
    ) -> Tensor:
        """
        Return the blocks of the text that are predicted, as of
        :func:`~fista_modifier.evaluation.perplexity.token_blocks`.

        :param tokenizer: the tokenizer of the model to measure
        :param seq_len: tokens in a block
        :param max_tokens: the user's own limit; None for none
        :param bos: whether each block begins with what the tokenizer puts at the
            beginning of a text
        :return: token ids, blocks×seq_len
        :raises ValueError: if ``seq_len`` leaves nothing to predict, or the text is
            shorter than one block
        """
        limit = self.token_limit(seq_len, max_tokens)
        try:
            blocks = token_blocks(tokenizer, self.content, seq_len, limit, bos=bos)
        except ValueError as error:
            model = tokenizer.name_or_path
            raise ValueError(f"{self.name}, {model}: {error}") from None
        # with a token at its beginning, a block has fewer of the text's own
        return blocks[: self.max_blocks]


@dataclass(frozen=True)
class Corpus:
    """
    A text of the literature, on the Hugging Face hub.

    :param path: the data set's id
    :param configuration: its configuration; None for the default
    :param data_file: the only file of it that is read; None reads all
    :param revision: its revision; None for the default
    :param split: the split that is read
    :param column: the column that holds a record's text
    :param separator: the text between two records
    :param documents: number of records that are read, from the first; None reads all
    :param max_blocks: number of blocks of them that are used; None uses all
    """

    path: str
    configuration: str | None = None
    data_file: str | None = None
    revision: str | None = None
    split: str = "test"
    column: str = "text"
    separator: str = "\n\n"
    documents: int | None = None
    max_blocks: int | None = None

    def read(self, name: str) -> Text:
        """
        Read the text from the hub.

        :param name: the text's name in tables
        :return: the text
        :raises ConnectionError: if it cannot be downloaded
        """
        records = hub_records(
            self.path,
            self.configuration,
            self.split,
            data_file=self.data_file,
            revision=self.revision,
        )
        documents = [row[self.column] for row in islice(records, self.documents)]
        return Text(name, self.separator.join(documents), self.max_blocks)


PAPER_TEXTS = {
    "wikitext2": Corpus("Salesforce/wikitext", "wikitext-2-raw-v1"),
    # It was published as a script, which data sets may no longer be: the hub has a copy
    "ptb": Corpus(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        revision="refs/convert/parquet",
        column="sentence",
        separator=" ",
    ),
    "c4": Corpus(
        "allenai/c4",
        data_file="en/c4-validation.00000-of-00008.json.gz",
        split="validation",
        separator=" ",
        documents=1100,
        max_blocks=256,
    ),
}
"""The texts on which the paper measures perplexity, by their short names."""


def load_texts(sources: Sequence[str]) -> list[Text]:
    """
    Read the texts to measure perplexities on.

    :param sources: each is one of ``PAPER_TEXTS`` (its name or its hub id), a local
        file, or another data set on the hub (``id`` or ``id:configuration``), whose
        test split is read
    :return: the texts
    :raises FileNotFoundError: if a local file is not there
    :raises ValueError: if a file has no text, or two texts have the same name
    :raises ConnectionError: if a text cannot be downloaded
    """
    names = [_name(source) for source in sources]
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{count} texts are called '{name}': rename the files")
    return [_load(*pair) for pair in zip(names, sources, strict=True)]


def _name(source: str) -> str:
    if is_local(source):
        return Path(source).stem
    for name, corpus in PAPER_TEXTS.items():
        if source in (corpus.path, f"{corpus.path}:{corpus.configuration}"):
            return name
    return source


def _load(name: str, source: str) -> Text:
    if name in PAPER_TEXTS and not is_local(source):
        return PAPER_TEXTS[name].read(name)
    # an empty record is a blank line of the text
    documents = load_text(source, split="test", keep_empty=True)
    return Text(name, "\n\n".join(documents))
