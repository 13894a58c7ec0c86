"""Mappings of this process: a queue's descriptors, segments, scratch; and memory whose size is sealed.

Every mapping is populated, so that no access of the data path faults.
"""

import errno
import fcntl
import mmap
import os
from typing import Any

from ublkpool.ublk.calls import check, checked_address, ffi, lib

SINK_BYTES: int = lib.UQ_SINK_BYTES
"""What `map_sink` takes at most."""


def map_descriptors(char_fd: int, queue: int, depth: int) -> Any:
    """Map a queue's descriptor array read-only; before fork, in the process that opened /dev/ublkcN."""
    return checked_address(lib.uq_map_descriptors(char_fd, queue, depth), f"map descriptors of queue {queue}")


def unmap_descriptors(address: Any, depth: int) -> None:
    """Undo `map_descriptors` in this process."""
    check(-errno.EINVAL if lib.uq_unmap_descriptors(address, depth) else 0, "unmap descriptors")


def map_segment(fd: int, size_bytes: int) -> Any:
    """Map a segment shared, writable, populated."""
    return checked_address(lib.uq_map_segment(fd, size_bytes), f"map a segment of {size_bytes} bytes")


def unmap_segment(address: Any, size_bytes: int) -> None:
    """Undo `map_segment`."""
    lib.uq_unmap_segment(address, size_bytes)


def map_sink(size_bytes: int) -> Any:
    """Memory of this process for what is written and not read, populated; each `SINK_BYTES` of it are the same."""
    return checked_address(lib.uq_map_sink(size_bytes), f"{size_bytes} bytes of memory")


def map_zeros(size_bytes: int) -> Any:
    """Zeroed memory of this process, mapped read-only.  Raises `OSError`."""
    # Pages of a file: memory that was never written is the kernel's zero page, which is pinned the slow way.
    fd = sealed_memory(size_bytes, "ublkpool-zeros")
    try:
        return ffi.from_buffer(mmap.mmap(fd, size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ))
    finally:
        os.close(fd)


def sealed_memory(size_bytes: int, name: str) -> int:
    """A memfd of zeros, fully allocated, whose size is sealed.  Raises `OSError`."""
    fd = sealable_memory(name)
    try:
        allocate_sealed(fd, size_bytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def sealable_memory(name: str) -> int:
    """The empty memfd of `sealed_memory`, for a process that calls `allocate_sealed`.  Raises `OSError`."""
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def allocate_sealed(fd: int, size_bytes: int) -> None:
    """Allocate every page of a `sealable_memory`, and seal its size.  Raises `OSError`."""
    os.posix_fallocate(fd, 0, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)


def offset(address: Any, nbytes: int) -> Any:
    """The address `nbytes` after this one."""
    return ffi.cast("uint8_t *", address) + nbytes
