"""What is written is there as a whole, or what was there stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fista_modifier import files
from fista_modifier.files import BEFORE, LOCK, scratch, whole, write_whole


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_leads_to_the_new_folder(tmp_path: Path, exists: bool) -> None:
    disk, link = tmp_path / "disk" / "model", tmp_path / "link"
    link.symlink_to(disk)
    if exists:
        disk.mkdir(parents=True)
        (disk / "old").touch()
    with whole(link) as unfinished:
        unfinished.mkdir()
        (unfinished / "new").touch()
    assert link.is_symlink()
    assert [file.name for file in disk.iterdir()] == ["new"]


def test_a_link_to_a_file_stays(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    write_whole(link, "text")
    assert link.is_symlink()
    assert file.read_text() == "text"


def test_what_was_there_stays_if_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, move = tmp_path / "folder", os.replace
    folder.mkdir()
    (folder / "old").touch()

    def fails_for_new(source: Path, target: Path) -> None:
        if source.name == "folder" and target.name == "folder":
            raise OSError("no")
        move(source, target)

    monkeypatch.setattr(os, "replace", fails_for_new)
    with pytest.raises(OSError, match="no"), whole(folder) as unfinished:
        unfinished.mkdir()
    assert [file.name for file in folder.iterdir()] == ["old"]


HOLD = """
import sys, time
from pathlib import Path
from fista_modifier.files import scratch
with scratch(Path(sys.argv[1]), ".model-") as folder:
    (folder / "weights").write_text("much")
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def process_with_scratch(parent: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    command = [sys.executable, "-c", HOLD, str(parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("held"))
        (folder,) = parent.glob(".model-*")
        yield process, folder
        process.kill()


def make_old(folder: Path) -> None:
    before = time.time() - 2 * files.NEW
    os.utime(folder / LOCK, (before, before))


def test_what_a_killed_process_left_is_deleted(tmp_path: Path) -> None:
    other = tmp_path / ".models-of-somebody"
    other.mkdir()
    with process_with_scratch(tmp_path) as (process, folder):
        make_old(folder)
        with scratch(tmp_path, ".model-"):
            assert (folder / "weights").exists(), "its process lives"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (folder / "weights").exists()
        with scratch(tmp_path, ".model-") as own:
            assert {*tmp_path.iterdir()} == {own, other}
    assert [*tmp_path.iterdir()] == [other]


def test_what_a_kill_between_two_moves_left_is_kept(tmp_path: Path) -> None:
    with process_with_scratch(tmp_path) as (process, folder):
        (folder / BEFORE).mkdir()
        make_old(folder)
        process.kill()
        process.wait()
        with scratch(tmp_path, ".model-"):
            pass
        assert (folder / "weights").exists() and (folder / BEFORE).exists()
        (folder / "weights").unlink()  # the new one has taken its place
        with scratch(tmp_path, ".model-"):
            pass
        assert not folder.exists()


def test_read_only_files_are_written(tmp_path: Path) -> None:
    with whole(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        (unfinished / "file").write_text("text")
        (unfinished / "file").chmod(0o444)
    assert (tmp_path / "folder" / "file").read_text() == "text"


def test_a_file_system_without_locks_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(files.FileLock, "acquire", refused)
    with scratch(tmp_path, ".model-") as folder:
        assert not (folder / LOCK).exists()
    write_whole(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
