"""Huge pages for shared memory: making them, and mapping where they fit.

Owns what is peculiar to them.  Nothing has to be reserved: memory that is there is moved into whole pages of 2 MiB
(MADV_COLLAPSE, Linux 6.1), which works whatever /sys/kernel/mm/transparent_hugepage/enabled says,
unless `shmem_enabled` says deny.  A page that is huge in the file is so in each mapping that begins at a multiple of
its size, and the kernel chooses such an address only where the mount has huge pages: so it is chosen here.  Used by
whoever makes a pool and by backends; works without the native part.
"""

import ctypes
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self

HugePages = Literal["auto", "off", "require"]
"""Whether a pool gets them: as far as they can be had, never, or all that there is room for, or no pool."""
HUGE_PAGE_BYTES = 2 << 20
"""Where the processor's are larger, MADV_COLLAPSE refuses, and all stay small."""
_MADV_POPULATE_READ = 22
_MADV_COLLAPSE = 25
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
)


class SharedMap:
    """A file's beginning, shared, writable, every page present, at an address where its huge pages fit."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        """Maps `fd`, which stays the caller's.  Raises `OSError`, `ValueError` if the file is shorter."""
        if size_bytes < HUGE_PAGE_BYTES:
            self._room, self._first = mmap.mmap(fd, size_bytes), 0
        else:
            self._room, self._first = _map_aligned(fd, size_bytes)
        # Not MAP_POPULATE: in a process that locks its memory when it is touched, that does nothing.
        self._room.madvise(_MADV_POPULATE_READ, self._first, size_bytes)
        self.address = _address(self._room) + self._first
        self.view = memoryview(self._room)[self._first : self._first + size_bytes]

    def collapse(self) -> None:
        """Make huge what fills whole pages; what is in use just now, or finds no room in one piece, stays small."""
        for start in range(0, whole_bytes(len(self.view)), HUGE_PAGE_BYTES):
            with suppress(OSError):
                self._room.madvise(_MADV_COLLAPSE, self._first + start, HUGE_PAGE_BYTES)

    def huge_bytes(self) -> int:
        """How much of it huge pages hold, by the kernel's word; 0 where it does not say."""
        is_ours = False
        with suppress(OSError):
            for line in Path("/proc/self/smaps").read_text().splitlines():
                first, _, rest = line.partition(" ")
                if not first.endswith(":"):
                    is_ours = first.startswith(f"{self.address:x}-")
                elif is_ours and first == "ShmemPmdMapped:":
                    return int(rest.split()[0]) * 1024
        return 0

    def close(self) -> None:
        """Unmap; a view of it that is still in use keeps it mapped until that view goes."""
        self.view.release()
        with suppress(BufferError):
            self._room.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def whole_bytes(size_bytes: int) -> int:
    """How much of so many bytes fills whole huge pages."""
    return size_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES


def _map_aligned(fd: int, size_bytes: int) -> tuple[mmap.mmap, int]:
    """A mapping that is larger than the file, and where in it the file begins."""
    if os.fstat(fd).st_size < size_bytes:
        raise ValueError("mmap length is greater than file size")
    # Memory that nobody touches is none.  Its owner unmaps all of it, whatever lies there then.
    room = mmap.mmap(
        -1, size_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    )
    base = _address(room)
    first = -base % HUGE_PAGE_BYTES
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    at = _libc.mmap(base + first, size_bytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0)
    if at == _MAP_FAILED:
        number = ctypes.get_errno()
        room.close()
        raise OSError(number, os.strerror(number))
    return room, first


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
