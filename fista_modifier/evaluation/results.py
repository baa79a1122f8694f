"""The results of long measurements, in a JSON file that grows row by row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from fista_modifier.files import write_whole

__all__ = ["Results", "Row", "digest", "state_of_checkpoint"]

Row = dict[str, Any]


class Results:
    """
    Rows measured with the same settings. Each is on disk as soon as it is measured.

    :param setup: the settings, plain JSON
    :param rows: the rows that are measured already
    :param file: the file that keeps settings and rows; None keeps them in memory
    """

    def __init__(self, setup: Row, rows: list[Row], file: Path | None) -> None:
        self.setup, self.rows, self.file = setup, rows, file

    @classmethod
    def resume(cls, file: Path | None, setup: Row) -> Results:
        """
        Load what an earlier run has measured.

        :param file: the file of the earlier run, or a new one; None for no file
        :param setup: the settings of this run
        :return: the results, to be continued
        :raises ValueError: if the file holds something else, or other settings
        :raises OSError: if it cannot be read or written
        """
        setup = json.loads(json.dumps(setup))
        if file is None or not file.exists():
            results = cls(setup, [], file)
            results._write()  # now, and not after the first measurement
            return results
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            earlier, rows = dict(content["setup"]), list(content["rows"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file} holds no results to continue ({error!r}): name another file"
            ) from error
        changes = [
            f"{key} {earlier.get(key)}, not {setup.get(key)}"
            for key in sorted(earlier.keys() | setup.keys())
            if earlier.get(key) != setup.get(key)
        ]
        if changes:
            raise ValueError(
                f"{file} was measured with {'; '.join(changes)}: name another file, or "
                "use the same settings"
            )
        return cls(setup, rows, file)

    def find(self, **identity: Any) -> Row | None:
        """
        Find the first row with certain values.

        :param identity: keys and their values
        :return: the row that has them, or None
        """
        for row in self.rows:
            if all(key in row and row[key] == identity[key] for key in identity):
                return row
        return None

    def missing(self, identities: Iterable[Row]) -> Iterator[Row]:
        """
        Find rows that are not measured yet.

        :param identities: keys and their values, for each row that is wanted
        :return: the identities without a row; each is looked for when its turn comes
        """
        return (one for one in identities if self.find(**one) is None)

    def add(self, row: Row) -> None:
        """
        Add a row and save it at once.

        :param row: plain JSON
        """
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        if self.file is not None:
            content = {"setup": self.setup, "rows": self.rows}
            write_whole(self.file, json.dumps(content, indent=2) + "\n")


def digest(content: object) -> str:
    """
    Return a digest of data. Different data have different digests.

    :param content: data whose ``repr`` shows all of them
    :return: the digest
    """
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def state_of_checkpoint(model: str) -> str:
    """
    Return a text that changes with the contents of a checkpoint.

    :param model: folder of a checkpoint, or its id on the hub
    :return: the commit of a model on the hub; for a folder, a digest of the dates and
        sizes of its configuration and weights, which another pruning into the same
        folder changes
    """
    folder = Path(model)
    if not folder.is_dir():
        return str(AutoConfig.from_pretrained(model)._commit_hash)
    files = [
        folder / "config.json",
        *folder.glob("*.safetensors"),
        *folder.glob("*.bin"),
    ]
    stats = [(file.name, file.stat()) for file in sorted(files)]
    return digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
