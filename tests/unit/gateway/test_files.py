import os
from pathlib import Path

import pytest

from gateway.files import Files, inode_of, places_of, stamp_of


def test_a_file_is_read_and_noted_as_it_was_before_it_was_read(tmp_path: Path) -> None:
    file, absent = tmp_path / "a", tmp_path / "b"
    file.write_text("1")
    files = Files()
    assert files.read(file) == b"1"
    with pytest.raises(FileNotFoundError):
        files.read(absent)
    before = dict(files.stamps)
    assert before == {file: stamp_of(file), absent: None}
    file.write_text("22")
    assert files.read(file) == b"22"
    assert files.stamps == before, "a change between two reads is one that is yet to be noticed"
    assert stamp_of(file) != before[file]


def test_a_pipe_is_read_once_only(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR)
    os.write(end, b"1")
    with pytest.raises(OSError, match="cannot be read again"):
        Files(again=True).read(pipe)
    os.close(end)


def test_every_folder_on_the_way_to_a_file_is_watched(tmp_path: Path) -> None:
    real, links = tmp_path / "real" / "v1", tmp_path / "links"
    for folder in (real, links):
        folder.mkdir(parents=True)
    (real / "file").write_text("")
    (links / "current").symlink_to("../real/v1")
    (tmp_path / "entry").symlink_to(links / "current" / "file")

    found = {place.resolve() for place in places_of(tmp_path / "entry")}
    assert found == {real / "file", real, links, tmp_path}


def test_of_a_file_that_is_not_there_the_folder_that_is_there_is_watched(tmp_path: Path) -> None:
    assert places_of(tmp_path / "a" / "b" / "c") == {tmp_path}
    assert inode_of(tmp_path / "a") is None


def test_links_that_lead_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert places_of(tmp_path / "a") == {tmp_path}
