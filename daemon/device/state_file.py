"""Replacing one file of the state directory durably, and room for that on a full file system.

Owns the order of the steps: a file is replaced as a whole and synced with its directory, so that a power failure leaves
the earlier or the later one.  Owns the files `.room-N` of the directory too: allocated blocks that a state is written
into when the file system has no others, so that a generation can rise there and a backend can attach.
"""

import errno
import itertools
import os
from contextlib import suppress
from pathlib import Path

ROOM_FILES = 4
ROOM_BYTES = 8192
_FULL = (errno.ENOSPC, errno.EDQUOT)
_attempts = itertools.count()


class Write:
    """Replaces one file so that a power failure leaves the earlier or the later content, whole."""

    def __init__(self, path: Path, content: bytes) -> None:
        self._path, self._content = path, content
        # A name of its own: an earlier attempt that hung may still write to its file.
        self._fresh = path.with_name(f".{path.name}.{os.getpid()}-{next(_attempts)}.new")

    def __call__(self) -> None:
        """Raises `OSError`; then the file is unchanged, or replaced in a way that may not survive a power failure."""
        try:
            self._write_somewhere()
            self._fresh.replace(self._path)
        except BaseException:
            self._fresh.unlink(missing_ok=True)
            raise
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        # The replaced file's blocks are free now.
        keep_room(self._path.parent)

    def _write_somewhere(self) -> None:
        """Write a new file, or one of the allocated ones if the file system is full."""
        try:
            self._write(os.O_CREAT | os.O_EXCL)
        except OSError as error:
            self._fresh.unlink(missing_ok=True)
            if error.errno not in _FULL or not self._take_room():
                raise
            self._write(0)

    def _take_room(self) -> bool:
        """Give one of the allocated files this attempt's name: no other attempt writes to it, however late."""
        for each in _rooms(self._path.parent):
            with suppress(OSError):
                each.rename(self._fresh)
                return True
        return False

    def _write(self, flags: int) -> None:
        fd = os.open(self._fresh, flags | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            left = memoryview(self._content)
            while left:
                left = left[os.write(fd, left) :]
            os.ftruncate(fd, len(self._content))
            os.fsync(fd)
        finally:
            os.close(fd)


def keep_room(directory: Path) -> None:
    """Allocate the files that are missing, as far as there is room."""
    with suppress(OSError):
        for each in _rooms(directory):
            _allocate(each)


def _rooms(directory: Path) -> list[Path]:
    return [directory / f".room-{number}" for number in range(ROOM_FILES)]


def _allocate(path: Path) -> None:
    """Raises `OSError`; then the file does not exist."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return
    try:
        os.posix_fallocate(fd, 0, ROOM_BYTES)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
