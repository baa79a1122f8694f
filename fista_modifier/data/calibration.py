"""
The way from texts to calibration tokens.

The rule is the same for every source. The documents are tokenised in turn and joined
into one stream with the tokenizer's end-of-text token between two of them, the stream
is cut into contiguous blocks, and a seeded choice of the blocks is the calibration
set. Thus no sample is padded, none overlaps another and short documents are not lost.
Where the tokenizer puts a token at the beginning of each text, each sample begins with
it, as each prompt does when the model is used.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from loguru import logger
from tqdm.auto import tqdm

from fista_modifier.data.chat import RefusedChatError, check_template, render
from fista_modifier.data.records import (
    Record,
    hub_records,
    is_local,
    is_plain_text,
    local_records,
    read_plain_text,
)

__all__ = [
    "calibration_dataset",
    "cut_into_blocks",
    "load_text",
    "max_sequence_length",
    "start_tokens",
]

C4 = "allenai/c4"
"""
The hub id of the paper's calibration corpus. Only its first shard is read, as in the
paper.
"""
C4_FIRST_SHARD = "en/c4-train.00000-of-01024.json.gz"

TEXT_COLUMN = "text"
CHAT_COLUMNS = ("messages", "conversations")
CHUNK_CHARACTERS = 1 << 16
"""
The characters after which a text is cut, at the next end of a line, to be tokenised in
chunks. For some very long strings a tokenizer takes far longer than linear time.
"""


def load_text(
    source: str,
    *,
    text_column: str | None = None,
    split: str = "train",
    seed: int | None = None,
    tokenizer: Any = None,
    keep_empty: bool = False,
) -> Iterator[str]:
    """
    Read the documents of a local file or of a data set on the Hugging Face hub.

    Records without text are left out, and a warning says how many. Conversations are
    rendered by the tokenizer's chat template.

    :param source: a local text file (one document); a local ``.jsonl``, ``.json``,
        ``.csv``, ``.tsv`` or ``.parquet`` file (one document a record); any of these
        but parquet with ``.gz`` after its name; a folder of ``save_to_disk``; or the id
        of a data set on the hub, optionally with a configuration: ``id:configuration``.
        Hub data sets are streamed.
    :param text_column: the field of a record that holds its text or conversation;
        None is "text" or else "messages" or "conversations". A text file has none.
    :param split: the split of a data set on the hub or a folder; a local file has none
    :param seed: shuffles a data set on the hub; None keeps its order. Local data are
        always read in order.
    :param tokenizer: the model's tokenizer (Hugging Face), for conversations
    :param keep_empty: whether an empty text is a document, too
    :return: the documents, read as they are asked for
    :raises FileNotFoundError: if ``source`` names a local file that is not there
    :raises ValueError: if a local file cannot be read, no record has a text, or there
        are conversations and no template for them
    :raises ConnectionError: if the data set cannot be downloaded
    """
    if not is_local(source):
        records = _hub_records(source, split, seed)
    elif not Path(source).exists():
        raise FileNotFoundError(f"text file {source} does not exist")
    elif is_plain_text(source):
        return iter([read_plain_text(source)])
    else:
        columns = [text_column] if text_column else [TEXT_COLUMN, *CHAT_COLUMNS]
        records = local_records(source, split, columns)
    return _texts(source, records, text_column, tokenizer, keep_empty)


def _hub_records(source: str, split: str, seed: int | None) -> Iterator[Record]:
    name, _, configuration = source.partition(":")
    is_c4 = name == C4 and not configuration and split == "train"
    shard = C4_FIRST_SHARD if is_c4 else None
    return hub_records(name, configuration or None, split, data_file=shard, seed=seed)


def _texts(
    source: str,
    records: Iterable[Record],
    column: str | None,
    tokenizer: Any,
    keep_empty: bool,
) -> Iterator[str]:
    """
    Yield the texts of records. A warning counts the records that are left out.

    :raises ValueError: if no record has a text, or one cannot be read
    """
    used = 0
    skipped: Counter[str] = Counter()
    try:
        for number, record in enumerate(records, start=1):
            if number == 1:
                column = _column(source, record, column)
            assert column is not None  # the first record has it
            try:
                text = _text(record.get(column), column, tokenizer)
            except RefusedChatError as error:
                skipped[f"refused by the chat template: {error}"] += 1
                continue
            except ValueError as error:
                raise ValueError(f"record {number} of {source}: {error}") from error
            if text or (keep_empty and text is not None):
                used += 1
                yield text
            else:
                skipped["empty"] += 1
    finally:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        total = used + skipped.total()
        if used and skipped:
            logger.warning(
                f"{skipped.total()} of {total} records of {source} are left out "
                f"({counts})"
            )
    if skipped and not used:
        raise ValueError(
            f"none of the {total} records of {source} has a text in '{column}' "
            f"({counts}): name another column by --text-column, or other data"
        )


def _column(source: str, record: Record, wanted: str | None) -> str:
    """
    Choose the field to read: the user's, or the first of those that usually hold text.

    :raises ValueError: if the record has no such field, or a field for chats holds text
    """
    for column in [wanted] if wanted else [TEXT_COLUMN, *CHAT_COLUMNS]:
        if column not in record:
            continue
        if isinstance(record[column], str) and not wanted and column in CHAT_COLUMNS:
            raise ValueError(
                f"'{column}' of {source} holds text in place of a list of messages: "
                f"store the messages as lists, or, if the text is meant, name it by "
                f"--text-column {column}"
            )
        return column
    missing = repr(wanted or TEXT_COLUMN)
    if not wanted:
        missing += f", nor a chat in {' or '.join(CHAT_COLUMNS)}"
    raise ValueError(
        f"record 1 of {source} has no text in a field {missing}; found "
        f"{sorted(record)}: name the field that holds the text (--text-column)"
    )


def _text(value: Any, column: str, tokenizer: Any) -> str | None:
    """
    Return the text of a field.

    :return: the text, None if the field is empty
    :raises RefusedChatError: if the chat template does not take it
    :raises ValueError: if it is neither text nor a conversation
    """
    if isinstance(value, str) or value is None:
        return value
    if not isinstance(value, list):
        raise ValueError(f"'{column}' holds no text but {reprlib.repr(value)}")

    if not value:
        return None
    check_template(tokenizer)
    text = render(value, tokenizer)
    if tokenizer.bos_token_id in start_tokens(tokenizer):
        return text.removeprefix(tokenizer.bos_token)  # each sample begins with it
    return text


def calibration_dataset(
    source: str,
    tokenizer: Any,
    *,
    samples: int = 128,
    seq_len: int,
    seed: int = 0,
    text_column: str | None = None,
    progress: bool = True,
) -> Dataset:
    """
    Choose calibration samples of equal length from a text.

    The paper takes 128 samples of the model's maximum length from the first shard of
    C4. A data set on the hub is read in shuffled order, and only as far as the samples
    need. The samples of a local file are chosen among all its blocks.

    :param source: a file or data set, as for :func:`load_text`
    :param tokenizer: the model's tokenizer (Hugging Face)
    :param samples: number of samples
    :param seq_len: tokens in each sample, with those that the tokenizer puts before and
        after a text (:func:`start_tokens`, :func:`end_tokens`)
    :param seed: the same seed gives the same samples
    :param text_column: the field of a record that holds its text or conversation, as
        for :func:`load_text`
    :param progress: whether to show a progress bar
    :return: ``samples`` rows of ``input_ids`` and ``attention_mask`` (all ones), each
        ``seq_len`` long
    :raises ValueError: if ``samples`` or ``seq_len`` is not positive, or the text is
        too short for them
    :raises FileNotFoundError: if ``source`` names a local file that is not there
    :raises ConnectionError: if the data set cannot be downloaded
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; at least 1 is needed")
    start, end = start_tokens(tokenizer), end_tokens(tokenizer)
    added = len(start) + len(end)
    own = seq_len - added
    if own < 1:
        raise ValueError(f"seq_len is {seq_len}; at least {1 + added} is needed")
    needed = samples * own
    documents = load_text(
        source, text_column=text_column, seed=seed, tokenizer=tokenizer
    )
    enough = None if is_local(source) else needed
    tokens = _join(documents, tokenizer, enough, progress)
    if len(tokens) < needed:
        raise ValueError(
            f"{source} has {len(tokens)} tokens, but {samples} samples of {own} "
            f"need {needed}: use a longer text, fewer --samples or a shorter --seq-len"
        )
    blocks = cut_into_blocks(tokens, seq_len, start, end)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    chosen = blocks[order[:samples]]
    return Dataset.from_dict(
        {
            "input_ids": chosen.tolist(),
            "attention_mask": torch.ones_like(chosen).tolist(),
        }
    )


def start_tokens(tokenizer: Any) -> list[int]:
    """
    Return what the tokenizer puts before each text. A model that was trained so may not
    work without: Gemma-3-270M's perplexity is three times as high.

    :param tokenizer: the model's tokenizer (Hugging Face)
    :return: tokens, mostly one or none
    """
    return _added_tokens(tokenizer)[0]


def end_tokens(tokenizer: Any) -> list[int]:
    """
    Return what the tokenizer puts after each text if that is its separator, as BERT's
    and RoBERTa's do. The token for the end of a text is none: calibration samples are
    parts of longer texts.

    :param tokenizer: the model's tokenizer (Hugging Face)
    :return: one token, or none
    """
    after = _added_tokens(tokenizer)[1]
    return after if after == [getattr(tokenizer, "sep_token_id", None)] else []


def _added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what the tokenizer puts before and after each text."""
    whole = tokenizer("a")["input_ids"]
    own = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(own) + 1):
        end = start + len(own)
        if whole[start:end] == own:
            return whole[:start], whole[end:]
    return [], []


def cut_into_blocks(
    tokens: Sequence[int],
    seq_len: int,
    start: Sequence[int],
    end: Sequence[int] = (),
) -> torch.Tensor:
    """
    Cut a stream of tokens into contiguous blocks. What remains after the last whole
    block is left out.

    :param tokens: the stream
    :param seq_len: tokens in a block, with those that it begins and ends with
    :param start: the tokens that each block begins with
    :param end: the tokens that each block ends with; with ``start``, fewer than
        ``seq_len``
    :return: token ids, long, blocks×``seq_len``
    """
    own = seq_len - len(start) - len(end)
    count = len(tokens) // own
    blocks = torch.tensor(tokens[: count * own], dtype=torch.long).view(count, own)
    before, after = (
        torch.tensor(list(added), dtype=torch.long).expand(count, -1)
        for added in (start, end)
    )
    return torch.cat([before, blocks, after], 1)


def _join(
    documents: Iterable[str], tokenizer: Any, needed: int | None, progress: bool
) -> list[int]:
    """
    Tokenise documents into one stream. It ends with the document that brings it to
    ``needed`` tokens, or with the last one if ``needed`` is None.
    """
    end = tokenizer.eos_token_id
    tokens: list[int] = []
    with tqdm(
        desc="Tokenising",
        total=needed,
        unit="token",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for document in documents:
            between = [end] if tokens and end is not None else []
            for piece in chain([between], _tokenise(document, tokenizer)):
                tokens += piece
                bar.update(len(piece))
            if needed is not None and len(tokens) >= needed:
                break
    return tokens


def _tokenise(document: str, tokenizer: Any) -> Iterator[list[int]]:
    for chunk in _chunks(document):
        # verbose=False: the stream may be longer than the model's maximum length.
        yield tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]


def _chunks(document: str) -> Iterator[str]:
    """Cut a long text between lines."""
    chunk: list[str] = []
    size = 0
    for line in document.splitlines(keepends=True):
        chunk.append(line)
        size += len(line)
        if size >= CHUNK_CHARACTERS:
            yield "".join(chunk)
            chunk, size = [], 0
    if chunk:
        yield "".join(chunk)


def max_sequence_length(config: Any, cap: int = 2048) -> int:
    """
    Find the length of the calibration samples that suits a model.

    The paper uses the model's maximum length. Newer models take 100 000 tokens and
    more, so it is capped, at the maximum of the paper's OPT and first LLaMA models.

    :param config: the model's configuration (Hugging Face)
    :param cap: the largest length to return, in tokens
    :return: a number of tokens; ``cap`` if the configuration names no maximum
    """
    maximum = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(maximum or cap, cap)
