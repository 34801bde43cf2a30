import os
import threading
from pathlib import Path

import pytest

from gateway.files import MAX_BYTES, Files, inode_of, places_of, stamp_of


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


def test_a_pipe_that_takes_the_place_of_a_file_a_moment_ago_holds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, said = tmp_path / "pipe", []
    os.mkfifo(pipe)
    monkeypatch.setattr(Path, "is_file", lambda _path: True)

    def read() -> None:
        with pytest.raises(OSError, match="cannot be read again") as raised:
            Files(again=True).read(pipe)
        said.append(raised)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(30)
    assert said


@pytest.mark.parametrize("again", [False, True])
def test_a_file_of_any_size_takes_no_memory(tmp_path: Path, *, again: bool) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"a" * MAX_BYTES)
    assert len(Files(again=again).read(file)) == MAX_BYTES
    with file.open("ab") as more:
        more.truncate(1 << 40)
    with pytest.raises(OSError, match="more than 1048576 bytes"):
        Files(again=again).read(file)
    if not again:
        with pytest.raises(OSError, match="more than 1048576 bytes"):
            Files().read(Path("/dev/zero"))


def test_a_folder_is_no_file_and_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for again in (False, True):
        with pytest.raises(IsADirectoryError):
            Files(again=again).read(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


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
