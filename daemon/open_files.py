"""Which processes have a file open or mapped, whoever they are.

Owns the search through /proc.  Slow (it looks at every process), for the rare case in which nothing else tells.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

FileId = tuple[int, int]
"""Device and inode, as `os.stat` gives them."""


def file_id(about: os.stat_result) -> FileId:
    """What names a file as long as somebody has it open."""
    return about.st_dev, about.st_ino


def holders_of(files: Collection[FileId], spared: Collection[int] = ()) -> list[int]:
    """The processes that hold one of these files, but for this one and those that are spared."""
    numbers = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    spared = {os.getpid(), *spared}
    return [pid for pid in numbers if pid not in spared and any(each in files for each in _held_by(pid))]


def _held_by(pid: int) -> Iterator[FileId]:
    process = Path(f"/proc/{pid}")
    # A process may end while it is looked at.
    with suppress(OSError):
        for each in (process / "fd").iterdir():
            with suppress(OSError):
                yield file_id(each.stat())
    with suppress(OSError):
        for line in (process / "maps").read_text().splitlines():
            _, _, _, device, inode = line.split()[:5]
            major, _, minor = device.partition(":")
            yield os.makedev(int(major, 16), int(minor, 16)), int(inode)
