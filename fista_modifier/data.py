"""From text to calibration tokens.

The rule is the same for every source. The documents are tokenised in turn and joined
into one stream with the tokenizer's end-of-text token between two of them, the stream
is cut into contiguous blocks, and a seeded choice of the blocks is the calibration
set. So no sample is padded, none overlaps another and short documents are not lost.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import torch
from datasets import Dataset, load_dataset
from tqdm.auto import tqdm

C4 = "allenai/c4"
"""The paper's calibration corpus; its first shard is read, as in the paper."""
C4_FIRST_SHARD = {"train": "en/c4-train.00000-of-01024.json.gz"}

JSON_SUFFIXES = {".json", ".jsonl"}
LOCAL_SUFFIXES = JSON_SUFFIXES | {".txt"}
# Documents held at a time to shuffle a corpus that is read as a stream.
SHUFFLE_BUFFER = 4096
# A tokenizer takes far longer than linear time for some very long strings.
CHUNK_CHARACTERS = 1 << 16


def load_text(
    source: str,
    *,
    text_column: str = "text",
    split: str = "train",
    seed: int | None = None,
) -> Iterator[str]:
    """Read the documents of a local file or of a data set on the Hugging Face hub.

    :param source: a local text file (one document), a local ``.jsonl`` or ``.json``
        file (one document a record), or the id of a data set on the hub, optionally
        with a configuration: ``id:configuration``. Hub data sets are streamed.
    :param text_column: the field of a record that holds its text.
    :param split: the split of a data set on the hub; a local file has none.
    :param seed: shuffles a data set on the hub; ``None`` keeps its order. A local file
        is always read in order.
    :return: the documents, read as they are asked for.
    :raises FileNotFoundError: if ``source`` names a local file that is not there.
    :raises ValueError: if a local file is not UTF-8 text or lacks ``text_column``.
    :raises ConnectionError: if the data set cannot be downloaded.
    """
    path = Path(source)
    if path.suffix.lower() not in LOCAL_SUFFIXES and not path.is_file():
        return _hub_documents(source, text_column, split, seed)
    if not path.is_file():
        raise FileNotFoundError(f"text file {source} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}") from error
    if path.suffix.lower() in JSON_SUFFIXES:
        return _json_documents(source, text, text_column)
    return iter([text])


def _json_documents(source: str, text: str, column: str) -> Iterator[str]:
    """Read a JSON list of records, or one record a line."""
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{source} is neither one JSON record a line nor a JSON list: {error}"
        ) from error
    return _texts(source, records, column)


def _hub_documents(
    source: str, column: str, split: str, seed: int | None
) -> Iterator[str]:
    name, _, configuration = source.partition(":")
    is_c4 = name == C4 and not configuration and split == "train"
    try:
        records = load_dataset(
            name,
            configuration or None,
            data_files=C4_FIRST_SHARD if is_c4 else None,
            split=split,
            streaming=True,
        )
        if seed is not None:
            records = records.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        yield from _texts(source, records, column)
    except (OSError, httpx.HTTPError) as error:
        raise ConnectionError(
            f"the data set {source} could not be downloaded ({error}); check its name "
            "and the network, or use a local text instead: --dataset FILE.txt or "
            "--dataset FILE.jsonl"
        ) from error


def _texts(source: str, records: Iterable[Any], column: str) -> Iterator[str]:
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not isinstance(record.get(column), str):
            found = sorted(record) if isinstance(record, dict) else record
            raise ValueError(
                f"record {number} of {source} has no text in a field {column!r}; "
                f"found {found}: name the field that holds the text"
            )
        yield record[column]


def calibration_dataset(
    source: str,
    tokenizer: Any,
    *,
    samples: int = 128,
    seq_len: int,
    seed: int = 0,
    text_column: str = "text",
    progress: bool = True,
) -> Dataset:
    """Choose calibration samples of equal length from a text.

    The paper takes 128 samples of the model's maximum length from the first shard of
    C4. Of a data set on the hub only as much is read as the samples need, in shuffled
    order; of a local file the samples are chosen among all its blocks.

    :param source: a file or data set, as for :func:`load_text`.
    :param tokenizer: the model's tokenizer (Hugging Face).
    :param samples: number of samples.
    :param seq_len: tokens in each sample.
    :param seed: the same seed gives the same samples.
    :param text_column: the field of a record that holds its text.
    :param progress: whether to show a progress bar.
    :return: ``samples`` rows of ``input_ids`` and ``attention_mask`` (all ones), each
        ``seq_len`` long.
    :raises ValueError: if ``samples`` or ``seq_len`` is not positive, or the text is
        too short for them.
    :raises FileNotFoundError: if ``source`` names a local file that is not there.
    :raises ConnectionError: if the data set cannot be downloaded.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; at least 1 is needed")
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; at least 1 is needed")
    needed = samples * seq_len
    documents = load_text(source, text_column=text_column, seed=seed)
    is_local = Path(source).is_file()
    tokens = _join(documents, tokenizer, None if is_local else needed, progress)
    if len(tokens) < needed:
        raise ValueError(
            f"{source} has {len(tokens)} tokens, but {samples} samples of {seq_len} "
            f"need {needed}: use a longer text, fewer --samples or a shorter --seq-len"
        )
    blocks = torch.tensor(tokens[: len(tokens) // seq_len * seq_len])
    blocks = blocks.view(-1, seq_len)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    chosen = blocks[order[:samples]]
    return Dataset.from_dict(
        {
            "input_ids": chosen.tolist(),
            "attention_mask": torch.ones_like(chosen).tolist(),
        }
    )


def _join(
    documents: Iterable[str], tokenizer: Any, needed: int | None, progress: bool
) -> list[int]:
    """Tokenise documents into one stream, no further than ``needed`` tokens."""
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
    """Find the length of the calibration samples that suits a model.

    The paper uses the model's maximum length. Newer models take 100 000 tokens and
    more, so it is capped, at the maximum of the paper's OPT and first LLaMA models.

    :param config: the model's configuration (Hugging Face).
    :param cap: the largest length to return, in tokens.
    :return: a number of tokens; ``cap`` if the configuration names no maximum.
    """
    maximum = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(maximum or cap, cap)
