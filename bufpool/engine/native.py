"""The Python side of the native engine, which executes frames of requests on a storage without Python for each request.

Owns one native engine and the exports of the memory that it works on.  Runs on the loop's thread: its io_uring accepts
submissions only from the thread that made it.
"""

import errno
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec

from ublkpool.bufpool.engine._engine import ffi, lib
from ublkpool.bufpool.engine.device import Device
from ublkpool.bufpool.errors import BackendError, StoreTaken, WireError
from ublkpool.bufpool.way_out import why_no_ring
from ublkpool.bufpool.wire import (
    CLIENT_SLICES_MAX,
    DESCRIPTOR_BYTES,
    DESCRIPTORS_PER_FRAME_MAX,
    SEGMENT_CLIENTS,
)

_SLOT_ALIGN_BYTES = 4096
_SHOWN_MAX = 8
_SLICES = range(SEGMENT_CLIENTS, SEGMENT_CLIENTS + CLIENT_SLICES_MAX)


class Storage(Protocol):
    """The store of a native engine."""

    def new(self, device: Device) -> Any:
        """A native storage for this device, which the engine will own."""


class FileStorage(NamedTuple):
    """An open file; placed writes land in slots of the own segment."""

    file: int
    is_block_device: bool = False

    def new(self, device: Device) -> Any:
        """See `Storage`."""
        return lib.storage_file_new(self.file, self.is_block_device, slot_bytes(device.max_io_bytes))


class NullStorage(NamedTuple):
    """Answers at once and stores nothing."""

    def new(self, device: Device) -> Any:
        """See `Storage`."""
        return lib.storage_null_new(slot_bytes(device.max_io_bytes))


class MemoryStorage(NamedTuple):
    """A disk in the own segment: a write lands in its own block; with `names_reads` reads name theirs."""

    names_reads: bool = False

    def new(self, device: Device) -> Any:
        """See `Storage`."""
        return lib.storage_memory_new(self.names_reads)


class RbdStorage(NamedTuple):
    """An open image of a Ceph cluster, and the addresses of librbd's functions by their names in `struct rbd_calls`.

    Placed writes land in slots of the own segment.
    """

    image: int
    functions: Mapping[str, int]

    def new(self, device: Device) -> Any:
        """See `Storage`."""
        calls = ffi.new("struct rbd_calls *")
        addresses = {**self.functions, "image": self.image}
        for name, field in ffi.typeof("struct rbd_calls").fields:
            setattr(calls, name, ffi.cast(field.type, addresses[name]))
        return lib.storage_rbd_new(calls, slot_bytes(device.max_io_bytes))


class NativeStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of a native engine."""

    requests: int
    answered: int
    failed: int
    replayed: int
    dropped: int
    fenced: int
    continued: int
    """Reads and writes that the kernel moved only in part and that were continued."""
    fallbacks: int
    """Times that the file system could not punch or zero a range and the engine did it another way."""
    bytes_read: int
    bytes_written: int
    running: int
    waiting: int
    """Writes and reads that wait for a region."""
    waited: int
    """How many ever waited for one."""
    lent: int
    """Regions of the own segment that are lent to a worker now."""
    posted: int
    """Regions that were posted ahead."""
    unasked: int
    """Writes that landed in a posted region."""


class NativeEngine:
    """A `backend.FrameEngine` on a storage.  Raises `BackendError` if there is no io_uring or no memory."""

    def __init__(self, device: Device, storage: Storage, *, read_only: bool = False) -> None:
        self._queues = device.queues
        self._pool = ffi.from_buffer("uint8_t[]", device.pool, require_writable=True)
        self._own = _memory_of(device.own)
        self._slices = [_memory_of(device.clients.get(number)) for number in _SLICES]
        self._answers_at = ffi.new("struct wire_descriptor const **")
        error = ffi.new("int *")
        setup = self._setup(device, read_only or device.read_only)
        self._engine: Any = lib.engine_open(setup, storage.new(device), error)
        if self._engine == ffi.NULL:
            self._engine = None
            self._release_memory()
            raise BackendError(f"no native engine: {why_no_ring(-error[0])}")

    def _setup(self, device: Device, read_only: bool) -> Any:
        return ffi.new(
            "struct engine_setup *",
            {
                "device": device.number,
                "epoch": device.epoch,
                "queues": device.queues,
                "depth": device.depth,
                "read_only": read_only,
                "fixed_buffers": device.fixed_buffers,
                "size_bytes": device.size_bytes,
                "pool": self._pool,
                "pool_bytes": len(device.pool),
                "slices": self._slices,
                "slice_bytes": min(map(len, device.clients.values()), default=0),
                "own": self._own,
                "own_bytes": len(device.own),
                "own_segment": device.own_segment,
                "post_sizes": len(device.post_bytes),
                "post_bytes": device.post_bytes,
            },
        )

    @property
    def raw(self) -> Any:
        """The native engine, for a loop in C; see `csrc/engine.h`."""
        return self._engine

    @property
    def addresses(self) -> tuple[int, int]:
        """The engine's functions (`struct engine_calls`) and the engine, for the loop of another native module."""
        return int(ffi.cast("uintptr_t", lib.engine_calls())), int(ffi.cast("uintptr_t", self._engine))

    @property
    def failure(self) -> str:
        """Why the engine's use has ended; empty if it has not."""
        failed_by = self.failed_by
        return str(failed_by) if failed_by is not None else ""

    @property
    def failed_by(self) -> BackendError | OSError | None:
        """The same as an exception; None if its use goes on."""
        error = lib.engine_error(self._engine)
        return engine_failure(-error) if error else None

    def resize(self, size_bytes: int) -> None:
        """The store has grown to at least `size_bytes`: execute requests up to there."""
        lib.engine_resize(self._engine, size_bytes)

    def fileno(self) -> int:
        """The engine's eventfd: readable when a completion waits."""
        return lib.engine_file(self._engine)

    def take(self, queue: int, frame: bytes) -> None:
        """Start the requests of a frame; the next `answers` submits their I/O.  Raises `WireError`."""
        count, rest = divmod(len(frame), DESCRIPTOR_BYTES)
        descriptors = ffi.from_buffer("struct wire_descriptor *", frame) if count else ffi.NULL
        if rest or not count or lib.engine_take(self._engine, descriptors, count):
            raise WireError(
                f"queue {queue}: a worker sent a frame of {len(frame)} bytes that the protocol does not allow"
            )

    def answers(self) -> Iterator[tuple[int, bytes]]:
        """Submit the I/O that was started, and return finished requests as frames.

        Raises `BackendError` if the store became shorter than the device, `OSError` if io_uring fails.
        """
        error = lib.engine_turn(self._engine)
        if error:
            raise engine_failure(-error)
        for queue in range(self._queues):
            while count := lib.engine_answers(self._engine, queue, self._answers_at):
                count = min(count, DESCRIPTORS_PER_FRAME_MAX)
                frame = bytes(ffi.buffer(self._answers_at[0], count * DESCRIPTOR_BYTES))
                lib.engine_answers_sent(self._engine, queue, count)
                yield queue, frame
            if error := lib.engine_error(self._engine):
                raise engine_failure(-error)

    def running(self) -> int:
        """Requests that the storage has not finished."""
        return self.statistics().running

    def executing(self) -> tuple[int, list[tuple[int, int, int, int]]]:
        """How many requests the storage has not finished, and queue, operation, offset and bytes of the first of them.

        May be called from another thread while the engine's own hangs.
        """
        out = ffi.new("struct wire_descriptor[]", _SHOWN_MAX)
        count = lib.engine_running(self._engine, out, _SHOWN_MAX)
        shown = [(each.queue, each.op, each.offset, each.length) for each in out[0 : min(count, _SHOWN_MAX)]]
        return count, shown

    def statistics(self) -> NativeStatistics:
        """Counters since the attach."""
        counted = ffi.new("struct engine_statistics *")
        lib.engine_count(self._engine, counted)
        names = NativeStatistics.__struct_fields__
        return NativeStatistics(**{name: int(getattr(counted, name)) for name in names})

    def close(self) -> None:
        """End the storage and let go of the memory."""
        if self._engine is None:
            return
        lib.engine_close(self._engine)
        self._engine = None
        self._release_memory()

    def _release_memory(self) -> None:
        for memory in (self._pool, self._own, *self._slices):
            if memory != ffi.NULL:
                ffi.release(memory)


def _memory_of(view: memoryview | None) -> Any:
    return ffi.from_buffer("uint8_t[]", view) if view else ffi.NULL


def engine_failure(number: int) -> BackendError | OSError:
    """Why a native engine ended, by errno: ENODATA, its store is shorter than the device; ESHUTDOWN, its cluster has
    excluded it; EROFS, it has lost its store's lock; another, io_uring failed with it."""
    if number == errno.ENODATA:
        return BackendError(
            "the store became shorter than its device while it was served: nothing more is read or written, "
            "since lost data must not read as zeros; bring it back at its full size"
        )
    if number == errno.ESHUTDOWN:
        return StoreTaken(
            "another client has taken the store over: the cluster accepts nothing more from this one (blocklisted)"
        )
    if number == errno.EROFS:
        return BackendError("the lock of the store was lost: nothing more is written without it")
    return OSError(number, f"io_uring: {os.strerror(number)}")


def slot_bytes(max_io_bytes: int) -> int:
    """The bytes that one placed write needs in an own segment: `max_io_bytes` in whole pages."""
    return -(-max_io_bytes // _SLOT_ALIGN_BYTES) * _SLOT_ALIGN_BYTES
