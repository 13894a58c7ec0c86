"""Which processes have a file open or mapped, and whether any process has.

The search through /proc is slow, since it reads every process, and finds some of them, never all: descriptors in flight
and in io_uring's tables do not show there.  Only the kernel knows that a file has no other open file; it is asked by
`is_open_elsewhere`, for files that were handed out by `reopened`.
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
    """What identifies a file as long as it is open anywhere."""
    return about.st_dev, about.st_ino


def reopened(fd: int) -> int:
    """Another open file of the same memfd, close-on-exec, which the kernel counts: see `is_open_elsewhere`."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def is_open_elsewhere(fd: int) -> bool:
    """Whether a process has a memfd that came from `reopened` or was opened through /proc; true if in doubt.

    A write lease is granted only if the file has no other open file that the inode counts (`check_conflicting_open`,
    fs/locks.c), wherever that is: in a process, mapped and closed, in flight over a socket, in an io_uring's table.
    Not counted are the open file of `memfd_create`, whose duplicates workers and the holder have, and pages that were
    pinned (io_uring's registered buffers, vmsplice) before every descriptor was closed.
    """
    own = reopened(fd)
    # A process that opens the file meanwhile breaks the lease, and the lease's owner gets SIGIO.
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return True
    finally:
        # Closed before the handler is restored, so that no SIGIO can follow.
        os.close(own)
        signal.signal(signal.SIGIO, before)
    return False


def processes_with(files: Collection[FileId], spared: Collection[int] = ()) -> list[int]:
    """The processes that have one of these files open or mapped, except this one and `spared`."""
    numbers = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    spared = {os.getpid(), *spared}
    return [pid for pid in numbers if pid not in spared and any(each in files for each in _files_of(pid))]


def _files_of(pid: int) -> Iterator[FileId]:
    process = Path(f"/proc/{pid}")
    # The process may end meanwhile.
    with suppress(OSError):
        for each in (process / "fd").iterdir():
            with suppress(OSError):
                yield file_id(each.stat())
    with suppress(OSError):
        for line in (process / "maps").read_text().splitlines():
            _, _, _, device, inode = line.split()[:5]
            major, _, minor = device.partition(":")
            yield os.makedev(int(major, 16), int(minor, 16)), int(inode)
