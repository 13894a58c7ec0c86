"""Error texts that name the way out: which resource is exhausted, its limit, and how to raise it.

Pure except for reading this process's limits and the kernel's settings.
"""

import errno
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SOCKET_PATH_BYTES_MAX = 107
"""`sun_path` of unix(7) has 108 bytes, the last of them 0."""
QUEUE_SOCKET = "/queues/9999.999.ring"
"""The longest name of a socket below the run directory that does not depend on a device's name."""
RUN_DIR_BYTES_MAX = SOCKET_PATH_BYTES_MAX - len(QUEUE_SOCKET)
_IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")
_IO_URING_GROUP = Path("/proc/sys/kernel/io_uring_group")


def explain(error: OSError) -> str:
    """The error's text, with the way out where the errno alone determines it."""
    text = error.strerror or str(error)
    hint = _hint(error.errno)
    return f"{text}: {hint}" if hint else text


def _hint(number: int | None) -> str:
    match number:
        case errno.EMFILE:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            command = " ".join(["ublkpool", *sys.argv[1:2]])
            return (
                f"process {os.getpid()} ({command}) has all {limit} files open that RLIMIT_NOFILE lets it: "
                f"start it with a higher limit (ulimit -n, LimitNOFILE= in its unit)"
            )
        case errno.ENFILE:
            return "the whole machine has as many files open as fs.file-max lets it: raise it with sysctl"
        case errno.ENOSPC:
            return "its file system is full: free some space or inodes there (df, df -i)"
        case errno.EDQUOT:
            return "the quota on its file system is used up: free some, or raise it"
    return ""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an `OSError` from within that has none, as those of full file systems and sockets."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def why_no_ring(number: int) -> str:
    """Why io_uring_setup(2) failed with this errno, and the way out."""
    disabled = _setting(_IO_URING_DISABLED)
    if number == errno.EPERM and disabled == "1":
        group = _setting(_IO_URING_GROUP)
        return (
            "io_uring is for root and one group (kernel.io_uring_disabled = 1): run it as a member of the group with "
            f"number kernel.io_uring_group, which is {group}, or sysctl kernel.io_uring_disabled=0"
        )
    if number == errno.EPERM and disabled == "2":
        return (
            "io_uring is forbidden on this machine (kernel.io_uring_disabled = 2): "
            "sysctl kernel.io_uring_disabled=0 allows it"
        )
    if number == errno.ENOSYS:
        return "this kernel has no io_uring (CONFIG_IO_URING), or a seccomp filter forbids it"
    return explain(OSError(number, os.strerror(number)))


def _setting(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""


def too_long_for_sockets(run_dir: Path) -> str:
    """Why a run directory's path is too long for the sockets in it; empty if it is not."""
    size_bytes = len(os.fsencode(run_dir))
    if size_bytes <= RUN_DIR_BYTES_MAX:
        return ""
    return (
        f"{run_dir} has {size_bytes} bytes, at most {RUN_DIR_BYTES_MAX} fit: the path of a socket in it has at most "
        f"{SOCKET_PATH_BYTES_MAX}; choose a shorter one"
    )


def too_long_for_socket(path: Path) -> str:
    """The same for the path of one socket."""
    size_bytes = len(os.fsencode(path))
    if size_bytes <= SOCKET_PATH_BYTES_MAX:
        return ""
    return f"{path} has {size_bytes} bytes, the path of a socket at most {SOCKET_PATH_BYTES_MAX}"
