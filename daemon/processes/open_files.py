"""Which processes have a file open or mapped, and whether any process has.

Owns the search through /proc, which is slow (it looks at every process) and finds some of them, never all: descriptors
in flight and in io_uring's tables do not show.  Whether a file has no
other open file is the kernel's word (`is_open_elsewhere`), for files that were handed out by `reopened`.
"""

import fcntl
import os
import signal
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

FileId = tuple[int, int]
"""Device and inode, as `os.stat` gives them."""


def file_id(about: os.stat_result) -> FileId:
    """What names a file as long as somebody has it open."""
    return about.st_dev, about.st_ino


def reopened(fd: int) -> int:
    """Another open file of the same memfd, close-on-exec, which the kernel counts: see `is_open_elsewhere`."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def is_open_elsewhere(fd: int) -> bool:
    """Whether a process has a memfd that came from `reopened` or was opened through /proc; a doubt is a yes.

    A write lease is granted only if the file has no other open file that the inode counts (`check_conflicting_open`,
    fs/locks.c), wherever that is: in a process, mapped and closed, in flight over a socket, in an io_uring's table.
    The open file of `memfd_create`, whose duplicates workers and the holder have, is not among those counted.  Pages
    that were pinned (io_uring's registered buffers, vmsplice) before everything was closed are not seen either.
    """
    own = reopened(fd)
    # A process that opens the file in this moment breaks the lease, which is a SIGIO for the owner of the lease.
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return True
    finally:
        # Closed first, so that no SIGIO can follow.
        os.close(own)
        signal.signal(signal.SIGIO, before)
    return False


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
