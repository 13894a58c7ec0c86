"""Making the memory of a pool: sealed, allocated in full, populated, in huge pages.

Makes the two segments of `arena.py`.  The data is a memfd: its seals keep a process that has a descriptor, such as the
backend, from changing its size; named shared memory cannot be sealed.  A process can still punch a hole into it
(FALLOC_FL_PUNCH_HOLE): it reads as zeros then, and the next access gets a new page, whereas an access beyond the end
of a file would be SIGBUS.
"""

import errno
import mmap
import os
from pathlib import Path
from typing import NamedTuple

import posix_ipc

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.huge_pages import HugePages, SharedMap, whole_bytes
from ublkpool.bufpool.memory_room import check_room, mib
from ublkpool.bufpool.seals import seal
from ublkpool.bufpool.way_out import explain

SHM_DIRECTORY = Path("/dev/shm")
_MADV_POPULATE_WRITE = 23
_LOWER = "lower the device's queues, depth or pool"


class DataPlan(NamedTuple):
    """The memory of a pool's data: its name in errors, its size, and whether it lies in huge pages."""

    what: str
    size_bytes: int
    huge: HugePages


class Data(NamedTuple):
    """The memory of a pool's data: its descriptor, and how many bytes of it are in huge pages."""

    fd: int
    huge_bytes: int


def make_data(what: str, size_bytes: int, huge: HugePages) -> Data:
    """A memfd of zeros, every page allocated, whose size no process can change.  Raises `PoolError`.

    `what` names the memory in errors.
    """
    fd = open_data(what, size_bytes)
    try:
        return Data(fd, fill_data(fd, what, size_bytes, huge))
    except BaseException:
        os.close(fd)
        raise


def open_data(what: str, size_bytes: int) -> int:
    """The memfd of `make_data`, which `fill_data` has yet to allocate: any process that has it may do that.

    Raises `PoolError`, also if the machine has no room for `size_bytes`.
    """
    check_room(what, size_bytes, _LOWER)
    try:
        return os.memfd_create("ublkpool-data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise PoolError(f"{what} cannot be created: {explain(error)}") from error


def fill_data(fd: int, what: str, size_bytes: int, huge: HugePages) -> int:
    """Allocate every page of an `open_data`, and seal its size; how many bytes are in huge pages.

    Raises `PoolError`.
    """
    try:
        if huge == "off":
            _allocate(fd, size_bytes)
            found_bytes = 0
        else:
            found_bytes = _allocate_huge(fd, size_bytes)
            if huge == "require":
                _check_huge(what, size_bytes, found_bytes)
        seal(fd)
    except OSError as error:
        raise _not_allocated(what, size_bytes, error) from error
    return found_bytes


def make_named(name: str, size_bytes: int) -> int:
    """A POSIX shared memory object of this name, allocated in full.  Raises `PoolError` and leaves nothing."""
    try:
        fd: int = posix_ipc.SharedMemory(name, flags=posix_ipc.O_CREX, mode=0o600).fd
    except posix_ipc.ExistentialError as error:
        raise PoolError(
            f"{name} exists already: another daemon's, or left by a killed one; unlink it"
        ) from error
    except (posix_ipc.Error, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise _no_space(name, size_bytes) from error
        raise PoolError(f"{name} cannot be created: {error}") from error
    try:
        os.set_inheritable(fd, False)
        _allocate(fd, size_bytes)
    except BaseException as error:
        os.close(fd)
        posix_ipc.unlink_shared_memory(name)
        if not isinstance(error, OSError):
            raise
        is_full = error.errno in (errno.ENOSPC, errno.ENOMEM)
        raise (_no_space(name, size_bytes) if is_full else _not_allocated(name, size_bytes, error)) from error
    return fd


def huge_bytes(fd: int, size_bytes: int) -> int:
    """How many bytes of the file are in huge pages.  Raises `PoolError` if it cannot be mapped."""
    if not whole_bytes(size_bytes):
        return 0
    try:
        with SharedMap(fd, size_bytes) as mapping:
            return mapping.huge_bytes()
    except OSError as error:
        raise PoolError(f"data segment cannot be mapped: {error}") from error


def _allocate(fd: int, size_bytes: int) -> None:
    """Allocate and populate every page, so that the kernel's copy never finds one missing.  Raises `OSError`."""
    os.posix_fallocate(fd, 0, size_bytes)
    with mmap.mmap(fd, size_bytes) as mapping:
        mapping.madvise(_MADV_POPULATE_WRITE)


def _allocate_huge(fd: int, size_bytes: int) -> int:
    """The same of an empty file, in huge pages as far as there are any; how many bytes these have.  Raises `OSError`.

    Huge pages come first: small ones that are there already would be filled, then copied, and freed.
    """
    os.ftruncate(fd, size_bytes)
    with SharedMap(fd, size_bytes, is_allocated=False) as mapping:
        found_bytes = mapping.collapse_new()
        os.posix_fallocate(fd, 0, size_bytes)
        mapping.populate()
    return found_bytes


def _not_allocated(what: str, size_bytes: int, error: OSError) -> PoolError:
    return PoolError(f"{what} of {mib(size_bytes)} cannot be allocated: {explain(error)}: {_LOWER}")


def _no_space(name: str, size_bytes: int) -> PoolError:
    usage = os.statvfs(SHM_DIRECTORY)
    if usage.f_files and not usage.f_favail:
        return PoolError(
            f"{name} cannot be created: {SHM_DIRECTORY} has no inodes left: remove files there, "
            f"or mount it with a larger nr_inodes"
        )
    free_bytes = usage.f_bavail * usage.f_frsize
    return PoolError(
        f"{name} needs {size_bytes >> 10} KiB of {SHM_DIRECTORY} where {free_bytes >> 10} KiB are free: "
        f"{_LOWER}, remove files there, or mount it with a larger size"
    )


def _check_huge(what: str, size_bytes: int, found_bytes: int) -> None:
    wanted_bytes = whole_bytes(size_bytes)
    if not wanted_bytes:
        raise PoolError(
            f"{what} of {mib(size_bytes)} is smaller than a huge page: use huge_pages auto or off"
        )
    if found_bytes < wanted_bytes:
        raise PoolError(
            f"{what} has {mib(found_bytes)} of {mib(wanted_bytes)} in huge pages, and huge_pages says require: "
            "free memory, or echo 1 > /proc/sys/vm/compact_memory; "
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled must not be deny"
        )
