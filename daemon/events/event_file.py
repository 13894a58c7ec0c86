"""The events' two files in the state directory: `events.jsonl` and, older, `events.old.jsonl`.

Owns their bound and what a kill leaves.  Lines are appended; a file that has reached half of the bound takes the place
of the older one with rename(2).  So each file is whole at any moment, but for a last line that was cut short: a reader
leaves it out, and the next append removes it.  On a full file system the older file goes, for its blocks.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ublkpool.daemon.events.event import LINE_BYTES_MAX, Event, decode

NAME, OLD_NAME = "events.jsonl", "events.old.jsonl"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Append:
    """Appends lines durably.  Runs in a process of its own, since a file system may keep its caller waiting."""

    def __init__(self, directory: Path, lines: Sequence[bytes], bytes_max: int) -> None:
        """`bytes_max` bounds both files together; the lines have less than half of it."""
        self._new, self._old = directory / NAME, directory / OLD_NAME
        self._text = b"".join(lines)
        self._bytes_max = bytes_max

    def __call__(self) -> None:
        """Raises `OSError`; then the files have all of the lines or none."""
        try:
            self._append()
        except OSError as error:
            if error.errno not in _FULL or not self._old.exists():
                raise
            self._old.unlink()
            self._append()

    def _append(self) -> None:
        with _opened(self._new, os.O_RDWR | os.O_CREAT | os.O_APPEND) as fd:
            size = _mend(fd)
            is_full = size and size + len(self._text) > self._bytes_max // 2
            if not is_full:
                self._write(fd, size)
                return
        self._new.replace(self._old)
        with _opened(self._new, os.O_RDWR | os.O_CREAT | os.O_APPEND) as fd:
            self._write(fd, 0)

    def _write(self, fd: int, size: int) -> None:
        try:
            left = memoryview(self._text)
            while left:
                left = left[os.write(fd, left) :]
            os.fdatasync(fd)
        except OSError:
            with suppress(OSError):
                os.ftruncate(fd, size)
            raise


def load(directory: Path, bytes_max: int) -> list[Event]:
    """The events of the directory in the order of their numbers, at most `bytes_max` of the newest.

    Without files there are none.  Raises `OSError` if a file cannot be read, or is no regular file.
    """
    found: dict[int, Event] = {}
    for name in (OLD_NAME, NAME):
        with suppress(FileNotFoundError):
            found.update((each.seq, each) for each in _events(_tail(directory / name, bytes_max)))
    return [found[seq] for seq in sorted(found)]


def has_events(directory: Path) -> bool:
    """Whether a daemon has kept events here.  Raises `OSError` if that cannot be seen."""
    names = {each.name for each in directory.iterdir()} if directory.exists() else set()
    return bool(names & {NAME, OLD_NAME})


def _events(text: bytes) -> Iterable[Event]:
    """The events of whole lines: what follows the last newline was cut short."""
    for line in text.split(b"\n")[:-1]:
        if (event := decode(line)) is not None:
            yield event


def _tail(path: Path, bytes_max: int) -> bytes:
    with _opened(path, os.O_RDONLY) as fd:
        size = os.fstat(fd).st_size
        return os.pread(fd, bytes_max, max(0, size - bytes_max))


def _mend(fd: int) -> int:
    """Remove a last line that was cut short; the file's size then."""
    size = os.fstat(fd).st_size
    start = max(0, size - LINE_BYTES_MAX)
    end = os.pread(fd, size - start, start)
    whole = start + end.rfind(b"\n") + 1
    if whole < size:
        os.ftruncate(fd, whole)
    return whole


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A regular file.  Raises `OSError`."""
    fd = os.open(path, flags | _FLAGS, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield fd
    finally:
        os.close(fd)
