"""An io_uring whose entries the test executes: when, in which order, in part, or never.

Owns the memory of a `struct io_uring` as far as `io_uring_get_sqe` reads it.
"""

import ctypes
from typing import Any, NamedTuple

from ublkpool.bufpool.engine._engine import ffi

FSYNC, FALLOCATE, READ, WRITE = 3, 17, 22, 23
"""Operations of io_uring, as in the kernel's header."""
RWF_DSYNC = 2
_ENTRIES = 64
_SQE_BYTES = 64
_RING_BYTES = 512


class Entry(NamedTuple):
    """One submission; for FALLOCATE `address` is the length, `length` the mode."""

    op: int
    file: int
    offset: int
    address: int
    length: int
    rw_flags: int
    user_data: int

    @property
    def memory(self) -> bytes:
        """What a write writes, as of now."""
        return ctypes.string_at(self.address, self.length)

    def fill(self, data: bytes) -> None:
        """Give a read its data."""
        ctypes.memmove(self.address, data, len(data))


class _Sqe(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("priority", ctypes.c_uint16),
        ("file", ctypes.c_int32),
        ("offset", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("length", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("user_data", ctypes.c_uint64),
        ("rest", ctypes.c_uint8 * 24),
    )


class _Sq(ctypes.Structure):
    """The submission queue as liburing lays it out."""

    _fields_ = (
        ("head", ctypes.c_void_p),
        ("tail", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("entries", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("dropped", ctypes.c_void_p),
        ("array", ctypes.c_void_p),
        ("sqes", ctypes.c_void_p),
        ("sqe_head", ctypes.c_uint32),
        ("sqe_tail", ctypes.c_uint32),
        ("ring_bytes", ctypes.c_size_t),
        ("ring", ctypes.c_void_p),
        ("ring_mask", ctypes.c_uint32),
        ("ring_entries", ctypes.c_uint32),
    )


class HeldRing:
    """Submissions wait in it until `taken`."""

    def __init__(self) -> None:
        assert ctypes.sizeof(_Sqe) == _SQE_BYTES
        self._sqes = (_Sqe * _ENTRIES)()
        self._head = ctypes.c_uint32(0)
        self._numbers = [ctypes.c_uint32(each) for each in (_ENTRIES - 1, _ENTRIES)]
        self._memory = (ctypes.c_uint8 * _RING_BYTES)()
        self._sq = _Sq.from_buffer(self._memory)
        self._sq.head = self._sq.tail = ctypes.addressof(self._head)
        self._sq.mask, self._sq.entries = map(ctypes.addressof, self._numbers)
        self._sq.sqes = ctypes.addressof(self._sqes)
        self._sq.ring_mask, self._sq.ring_entries = _ENTRIES - 1, _ENTRIES

    @property
    def raw(self) -> Any:
        """The `struct io_uring *`."""
        return ffi.cast("struct io_uring *", ctypes.addressof(self._memory))

    def taken(self) -> list[Entry]:
        """What was submitted since the last call."""
        found = []
        while self._head.value != self._sq.sqe_tail:
            sqe = self._sqes[self._head.value % _ENTRIES]
            found.append(
                Entry(
                    *(sqe.op, sqe.file, sqe.offset, sqe.address),
                    *(sqe.length, sqe.rw_flags, sqe.user_data),
                )
            )
            self._head.value += 1
        return found
