"""What is written is there as a whole, or what was there stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fista_modifier.files import whole, write_whole


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
