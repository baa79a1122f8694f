"""
Records of local files and folders and of the hub, read by the ``datasets`` library.

Files are read as streams, so that nothing is cached and a file that has changed is
read anew. Data sets of the hub are streams, too.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import httpx
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.utils import logging

__all__ = [
    "Record",
    "hub_records",
    "is_local",
    "is_plain_text",
    "local_records",
    "read_plain_text",
]

Record = dict[str, Any]

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""
The builders of ``datasets`` that read a file, by the ending of its name. The name may
have .gz after this ending.
"""
PLAIN = ".txt"
SHUFFLE_BUFFER = 4096
"""
The number of records that are held at a time to shuffle a data set that is read as a
stream.
"""


def is_local(source: str) -> bool:
    """
    Say whether a source is local.

    :param source: what a user named
    :return: whether it can only be a local file, or a folder of ``save_to_disk``
    """
    path = Path(source)
    ending = _ending(path)
    return ending == PLAIN or ending in BUILDERS or path.is_file() or _is_saved(path)


def recorded_name(source: str) -> str:
    """
    Return the name of a source for the records. A local folder such as ``org/name``
    would be taken for an id on the hub where it does not exist.

    :param source: what a user named, a local source or an id on the hub
    :return: the same, with a leading ``./`` if it is a relative path
    """
    path = Path(source)
    if not source or path.is_absolute() or not path.exists():
        return source
    return f"./{path.as_posix()}"


def is_plain_text(source: str) -> bool:
    """
    Say whether a local source is plain text.

    :param source: a local file or folder
    :return: whether it is text without records
    """
    path = Path(source)
    return not _is_saved(path) and _ending(path) not in BUILDERS


def read_plain_text(source: str) -> str:
    """
    Read a text file.

    :param source: a local file of text, also a compressed one
    :return: its whole text
    :raises ValueError: if it is not UTF-8 text
    """
    try:
        with _opened(Path(source)) as file:
            return io.TextIOWrapper(file, encoding="utf-8-sig").read()
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}") from error


def local_records(
    source: str, split: str, text_columns: Iterable[str]
) -> Iterator[Record]:
    """
    Read the records of a local file or folder.

    :param source: a JSON, JSON lines, CSV or parquet file, or a folder of
        ``save_to_disk``
    :param split: the split to read, if a folder has several
    :param text_columns: columns of a CSV file in which numbers are text, too
    :return: its records, in order
    :raises ValueError: if it cannot be read; the message names the line if one is bad.
        It is raised at once if the beginning cannot be read
    """
    path = Path(source)
    try:
        if _is_saved(path):
            return iter(_saved(path, split))
        builder = BUILDERS[_ending(path)]
        options: dict[str, Any] = {}
        if builder == "json":
            # The whole file gets one schema: records may differ in their fields.
            size = _size(path)
            if not size:
                return iter(())
            options["chunksize"] = size
        elif builder == "csv":
            separator = "\t" if _ending(path) == ".tsv" else ","
            _check_header(path, separator)
            options = {
                "sep": separator,
                "converters": dict.fromkeys(text_columns, str),
                "keep_default_na": False,  # "None" and "NA" are words
            }
        with _own_message():
            records = iter(_stream(builder, path, options))
            first = list(islice(records, 1))
    except Exception as error:
        raise _unreadable(source, error) from None  # the new error says it all
    return _checked(source, chain(first, records))


def hub_records(
    name: str,
    configuration: str | None,
    split: str,
    *,
    data_file: str | None = None,
    revision: str | None = None,
    seed: int | None = None,
) -> Iterator[Record]:
    """
    Read the records of a data set on the hub.

    :param name: id of the data set
    :param configuration: its configuration; None for the default
    :param split: the split to read
    :param data_file: the only file to read; None reads all
    :param revision: its revision; None for the default
    :param seed: shuffles the records; None keeps their order
    :return: the records, read as they are asked for
    :raises ConnectionError: if they cannot be downloaded
    :raises ValueError: if a local folder has this name and is no data set
    """
    try:
        records = load_dataset(
            name,
            configuration,
            data_files={split: data_file} if data_file else None,
            revision=revision,
            split=split,
            streaming=True,
        )
        if seed is not None:
            records = records.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        yield from records
    except (OSError, httpx.HTTPError) as error:
        if Path(name).is_dir():
            raise ValueError(f"the folder {name} is no data set: {error}") from error
        raise ConnectionError(
            f"the data set {name} could not be downloaded ({error}); check its name "
            "and the network, or name a local file instead, such as FILE.txt or "
            "FILE.jsonl"
        ) from error


def _ending(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _is_saved(path: Path) -> bool:
    return any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))


def _saved(path: Path, split: str) -> Dataset:
    data = load_from_disk(str(path))
    if not isinstance(data, DatasetDict):
        return data
    if split in data:
        return data[split]
    if len(data) == 1:
        return next(iter(data.values()))
    raise ValueError(
        f"it has the splits {', '.join(data)} and none that is called '{split}': name "
        "the folder of one of them"
    )


def _stream(builder: str, path: Path, options: dict[str, Any]) -> Iterable[Record]:
    with tempfile.TemporaryDirectory() as cache:  # it holds the builder's lock
        records: Iterable[Record] = load_dataset(
            builder,
            data_files=glob.escape(str(path)),
            split="train",
            streaming=True,
            cache_dir=cache,
            **options,
        )
        return records


def _opened(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _size(path: Path) -> int:
    """Return the size of a file in bytes, once it is decompressed."""
    with _opened(path) as file:
        return file.seek(0, io.SEEK_END)


def _check_header(path: Path, separator: str) -> None:
    """
    Refuse a table whose records have more fields than its header has names: the first
    field of each would be taken for the name of a row, and all others for the next
    column.

    :raises ValueError: if its first record has more
    """
    with _opened(path) as file, suppress(csv.Error):  # a field may be too long for it
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        rows = filter(None, csv.reader(text, delimiter=separator))
        header, first = next(rows, []), next(rows, [])
        if len(first) > len(header):
            raise ValueError(
                f"its header names {len(header)} columns, and its first record has "
                f"{len(first)} fields"
            )


@contextmanager
def _own_message() -> Iterator[None]:
    """Keep ``datasets`` from logging an error that is raised as well."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _checked(source: str, records: Iterable[Record]) -> Iterator[Record]:
    try:
        yield from records
    except Exception as error:
        raise _unreadable(source, error) from None  # the new error says it all


def _unreadable(source: str, error: Exception) -> ValueError:
    if isinstance(error, UnicodeDecodeError):
        return ValueError(f"{source} is not UTF-8 text: {error}")
    path = Path(source)
    reason = BUILDERS.get(_ending(path)) == "json" and _json_fault(path)
    if reason:
        return ValueError(
            f"{source} is neither one JSON record a line nor a JSON list: {reason}"
        )
    return ValueError(f"{source} cannot be read: {error}")


def _json_fault(path: Path) -> str | None:
    """
    Find the line of a fault in a JSON file; None if there is none. The messages of
    ``datasets`` do not name it: they count records from the start of a block.
    """
    try:
        text = read_plain_text(str(path))
    except ValueError:
        return None
    lines = [pair for pair in enumerate(text.split("\n"), start=1) if pair[1].strip()]
    if _ending(path) == ".json" and lines and _fault(lines[0][1]):
        lines = [(1, text)]  # the file is one value over several lines
    for number, line in lines:
        if error := _fault(line):
            return f"line {number + error.lineno - 1}: {error.msg}"
    return None


def _fault(text: str) -> json.JSONDecodeError | None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error
    return None
