"""The typed face of the native engine: serve any open file, from frames to io_uring and back, without Python a request.

Owns one native engine and the exports of the memory it works on.  Runs on the loop's thread: its io_uring takes
submissions from the thread that made it.
"""

import os
from collections.abc import Iterator
from typing import Any

import msgspec

from ublkpool.bufpool._fileio import ffi, lib
from ublkpool.bufpool.backend import Device
from ublkpool.bufpool.errors import BackendError, WireError
from ublkpool.bufpool.wire import DESCRIPTOR_BYTES, DESCRIPTORS_PER_FRAME_MAX

_SLOT_ALIGN_BYTES = 4096
_FRAME_BYTES_MAX = DESCRIPTOR_BYTES * DESCRIPTORS_PER_FRAME_MAX


class FileEngineStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of a native engine."""

    requests: int
    answered: int
    failed: int
    replayed: int
    dropped: int
    fenced: int
    continued: int
    """Reads and writes that the kernel moved only in part and that went on."""
    fallbacks: int
    """Times the file system could not punch or zero and something else was done."""
    bytes_read: int
    bytes_written: int
    running: int
    waiting: int
    slots_lent: int


class FileEngine:
    """A `backend.FrameEngine` on a file; without one (None) it answers at once and stores nothing."""

    def __init__(
        self, file: int | None, device: Device, *, block_device: bool = False, read_only: bool = False
    ) -> None:
        self._queues = device.queues
        self._engine: Any = None
        self._pool = ffi.from_buffer("uint8_t[]", device.pool, require_writable=True)
        self._own = ffi.from_buffer("uint8_t[]", device.own) if len(device.own) else None
        mode = lib.FILEIO_MODE_NOTHING if file is None else 0
        mode |= lib.FILEIO_MODE_BLOCK_DEVICE if block_device else 0
        mode |= lib.FILEIO_MODE_READ_ONLY if read_only or device.read_only else 0
        self._frames_at = ffi.new("struct fileio_descriptor const **")
        error = ffi.new("int *")
        setup = ffi.new(
            "struct fileio_setup *",
            {
                "file": -1 if file is None else file,
                "mode": mode,
                "device": device.number,
                "epoch": device.epoch,
                "queues": device.queues,
                "depth": device.depth,
                "size_bytes": device.size_bytes,
                "pool": self._pool,
                "pool_bytes": len(device.pool),
                "own": self._own if self._own is not None else ffi.NULL,
                "own_bytes": len(device.own),
                "own_segment": device.own_segment,
                "slot_bytes": slot_bytes(device.max_io_bytes),
            },
        )
        engine = lib.fileio_open(setup, error)
        if engine == ffi.NULL:
            self._release_memory()
            raise BackendError(f"no io_uring for file I/O: {os.strerror(-error[0])}")
        self._engine = engine

    def fileno(self) -> int:
        """The engine's eventfd: readable when a completion waits."""
        return lib.fileio_file(self._engine)

    def take(self, queue: int, frame: bytes) -> None:
        """Start what a frame asks for; the next `answers` submits it."""
        if lib.fileio_take(self._engine, frame, len(frame)):
            raise WireError(
                f"a worker sent a frame of {len(frame)} bytes that makes no sense on queue {queue}"
            )

    def answers(self) -> Iterator[tuple[int, bytes]]:
        """Submit what was taken, collect what is done, one frame a queue."""
        error = lib.fileio_turn(self._engine)
        if error:
            raise OSError(-error, f"io_uring: {os.strerror(-error)}")
        for queue in range(self._queues):
            count = lib.fileio_answers(self._engine, queue, self._frames_at)
            if count:
                frames = bytes(ffi.buffer(self._frames_at[0], count * DESCRIPTOR_BYTES))
                for start in range(0, len(frames), _FRAME_BYTES_MAX):
                    yield queue, frames[start : start + _FRAME_BYTES_MAX]

    def running(self) -> int:
        """Requests that the kernel has not finished."""
        return self.statistics().running

    def statistics(self) -> FileEngineStatistics:
        """Counters since the attach."""
        counted = ffi.new("struct fileio_statistics *")
        lib.fileio_count(self._engine, counted)
        names = FileEngineStatistics.__struct_fields__
        return FileEngineStatistics(**{name: int(getattr(counted, name)) for name in names})

    def close(self) -> None:
        """End the io_uring and let go of the memory."""
        if self._engine is None:
            return
        lib.fileio_close(self._engine)
        self._engine = None
        self._release_memory()

    def _release_memory(self) -> None:
        ffi.release(self._pool)
        if self._own is not None:
            ffi.release(self._own)


def slot_bytes(max_io_bytes: int) -> int:
    """The room that one placed write needs in an own segment."""
    return -(-max_io_bytes // _SLOT_ALIGN_BYTES) * _SLOT_ALIGN_BYTES


def direct_alignment(file: int) -> int:
    """The logical block that O_DIRECT on this file demands, 0 if the file system does not say or cannot."""
    memory, offset = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    if lib.fileio_direct_alignment(file, memory, offset):
        return 0
    return max(int(memory[0]), int(offset[0])) if offset[0] else 0


class BlockDevice(msgspec.Struct, frozen=True):
    """What the kernel says about a block device, in bytes."""

    size_bytes: int
    logical_block_bytes: int
    physical_block_bytes: int


def block_device(file: int) -> BlockDevice:
    """Ask a block device for its sizes."""
    size, logical, physical = ffi.new("uint64_t *"), ffi.new("uint32_t *"), ffi.new("uint32_t *")
    error = lib.fileio_block_device(file, size, logical, physical)
    if error:
        raise OSError(-error, os.strerror(-error))
    return BlockDevice(int(size[0]), int(logical[0]), int(physical[0]))
