"""Where a memfd is open, and whether any process has it open or mapped.

The search through /proc reads every process, and does not find all: mappings without a descriptor, descriptors in
flight and in io_uring's tables do not show there.  Only the kernel knows that a file has no other open file; it is
asked by `is_open_elsewhere`, for files that were handed out by `reopened`.
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


def open_memfds(name: str, spared: Collection[int] = ()) -> Iterator[Path]:
    """Where in /proc each open file of a memfd with this name is, in all processes but this one and `spared`.

    The links are read and nothing behind them, so that no file system can make the caller wait.
    """
    link = f"/memfd:{name} (deleted)"
    with os.scandir("/proc") as processes:
        pids = [int(each.name) for each in processes if each.name.isdigit()]
    for pid in pids:
        if pid in spared or pid == os.getpid():
            continue
        # The process, or its descriptor, may end meanwhile.
        with suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
                path = f"/proc/{pid}/fd/{number}"
                with suppress(OSError):
                    if os.readlink(path) == link:  # noqa: PTH115
                        yield Path(path)
