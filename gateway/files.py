"""The files that a configuration is read from, and what tells that one of them has changed."""

import os
from errno import EFBIG, EINVAL
from pathlib import Path
from stat import S_ISREG

MAX_BYTES = 1 << 20
"""Of one file: what would take minutes to read as YAML, or all memory, is none that anybody meant."""
MAX_LINKS = 40
"""Symbolic links on the way to a file; the system follows no more (path_resolution(7))."""

Stamp = tuple[int, ...] | None
"""What changes with a file's content: device, number, size and the instants of its changes; None: it is not there."""


class Files:
    """Reads files, and notes which.

    Args:
        again: they have been read before. What can be read only once, such as a pipe, is then refused: a read would
            wait for ever.

    Attributes:
        stamps: of each file, taken just before it was read for the first time.
    """

    def __init__(self, *, again: bool = False) -> None:
        self._again = again
        self.stamps: dict[Path, Stamp] = {}

    def read(self, path: Path) -> bytes:
        """Return the content of a file. Raises: OSError, ValueError: its name cannot be one."""
        path = path.absolute()
        self.stamps.setdefault(path, stamp_of(path))
        # Opened first and looked at then: a pipe may take the place of what was looked at before.
        with open(path, "rb", opener=_open_at_once if self._again else None) as file:
            if self._again and not S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(EINVAL, "this is no regular file, and cannot be read again")
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise OSError(EFBIG, f"it has more than {MAX_BYTES} bytes")
        return content


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for who writes into it."""
    return os.open(path, flags | os.O_NONBLOCK)


def stamp_of(path: Path) -> Stamp:
    """Return the stamp of a file."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def places_of(path: Path) -> set[Path]:
    """Return what must be watched to notice each change of a file: itself, and each folder with an entry on the way.

    So a link that is set anew is noticed wherever it stands, as in the folders that Kubernetes mounts; and so is a file
    that has only been mounted at its place, whose folder sees no writes.
    """
    places = {path} if path.is_file() else set()
    ways = [path.absolute()]
    for way in ways:
        link = next((each for each in (*reversed(way.parents), way) if each.is_symlink()), None)
        if link is None:
            places.add(next(folder for folder in way.parents if folder.is_dir()))
        else:
            places.add(link.parent)
            if len(ways) < MAX_LINKS:
                ways.append((link.parent / link.readlink() / way.relative_to(link)).absolute())
    return places


def inode_of(path: Path) -> tuple[int, int] | None:
    """Return what a path leads to; None: nothing."""
    found = stamp_of(path)
    return (found[0], found[1]) if found is not None else None
