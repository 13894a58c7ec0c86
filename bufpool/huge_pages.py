"""Huge pages for shared memory: making them, and mapping where they fit.

No huge pages have to be reserved: allocated memory is moved into whole pages of 2 MiB (MADV_COLLAPSE, Linux 6.1), which
works with any setting of /sys/kernel/mm/transparent_hugepage/enabled, unless `shmem_enabled` is deny.  A huge page of a
file is mapped as one only at a multiple of its size.  The kernel chooses such an address only for files of a mount with
huge pages, so this module chooses it.  Used by the daemon and by backends; works without the native part.
"""

import ctypes
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self

HugePages = Literal["auto", "off", "require"]
"""auto: as many as are available; off: none; require: the whole pool in huge pages, or an error."""
HUGE_PAGE_BYTES = 2 << 20
"""On processors with larger huge pages MADV_COLLAPSE fails, and all pages stay small."""
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
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
    """A mapping of a file's first bytes: shared, writable, at a multiple of 2 MiB, and every page present."""

    def __init__(self, fd: int, size_bytes: int, *, is_allocated: bool = True) -> None:
        """Maps `fd`, which stays the caller's.  Raises `OSError`, or `ValueError` if the file is shorter.

        A file whose pages are not all allocated gets none by being mapped: its view is not to be touched yet.
        """
        if size_bytes < HUGE_PAGE_BYTES:
            self._room, self._first = mmap.mmap(fd, size_bytes), 0
        else:
            self._room, self._first = _map_aligned(fd, size_bytes)
        self._fd = fd
        if is_allocated:
            # Not MAP_POPULATE: it does nothing in a process that locks pages as they are touched.
            self._room.madvise(_MADV_POPULATE_READ, self._first, size_bytes)
        self.address = _address(self._room) + self._first
        self.view = memoryview(self._room)[self._first : self._first + size_bytes]

    def collapse(self) -> int:
        """Move whole 2 MiB pieces into huge pages; how many bytes are in these now.

        A piece in use, or without a free huge page, stays as it is.
        """
        found_bytes = 0
        for start in range(0, whole_bytes(len(self.view)), HUGE_PAGE_BYTES):
            with suppress(OSError):
                self._room.madvise(_MADV_COLLAPSE, self._first + start, HUGE_PAGE_BYTES)
                found_bytes += HUGE_PAGE_BYTES
        return found_bytes

    def collapse_new(self) -> int:
        """The same of an empty file of this size: its pieces get huge pages at once, so that no small one is copied.

        Of a piece that gets none, one small page is allocated.  Raises `OSError`: there is no memory.
        """
        for start in range(0, whole_bytes(len(self.view)), HUGE_PAGE_BYTES):
            # The kernel makes a huge page of a piece that has a page.  Not by a store: without memory that is SIGBUS.
            os.pwrite(self._fd, b"\0", start)
        return self.collapse()

    def populate(self) -> None:
        """Allocate and map every page.  Raises `OSError`."""
        self._room.madvise(_MADV_POPULATE_WRITE, self._first, len(self.view))

    def huge_bytes(self) -> int:
        """How many bytes are in huge pages, from /proc/self/smaps; 0 if that does not say."""
        is_ours = False
        with suppress(OSError):
            for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
                first, _, rest = line.partition(" ")
                if not first.endswith(":"):
                    is_ours = first.startswith(f"{self.address:x}-")
                elif is_ours and first == "ShmemPmdMapped:":
                    return int(rest.split()[0]) * 1024
        return 0

    def close(self) -> None:
        """Unmap; a view that is still in use keeps the memory mapped until it is released."""
        self.view.release()
        with suppress(BufferError):
            self._room.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def whole_bytes(size_bytes: int) -> int:
    """`size_bytes` rounded down to whole huge pages."""
    return size_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES


def _map_aligned(fd: int, size_bytes: int) -> tuple[mmap.mmap, int]:
    """A mapping larger than the file, and the byte offset in it at which the file begins."""
    if os.fstat(fd).st_size < size_bytes:
        raise ValueError("mmap length is greater than file size")
    # The untouched rest takes no memory.  Closing the mapping unmaps all of it, with the file in it.
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
