"""A file's engine behind the queue core, as in a worker, with an io_uring that a test answers."""

import ctypes
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

from support.fakes.driver import FakeDriver, Request
from support.fakes.queue_rig import DEVICE, Plan, Rig
from ublkpool.bufpool.engine import _engine
from ublkpool.bufpool.wire import Descriptor, Kind
from ublkpool.ublk import _native
from ublkpool.ublk.queue import LinkState

MIB = 1 << 20
READ_FIXED, WRITE_FIXED, FSYNC, FALLOCATE, READ, WRITE = 4, 5, 3, 17, 22, 23
RWF_DSYNC = 2
_ENTRIES = 64
_SQES_AT, _TAIL_AT = 56, 68
"""Where liburing's struct io_uring has the entries' address and the local tail."""


class Entry(NamedTuple):
    """A submission entry, as far as it matters here."""

    opcode: int
    offset: int
    address: int
    length: int
    rw_flags: int
    user_data: int
    buffer: int


_ENTRY = struct.Struct("<B7xQQIIQH")
_ENTRY_BYTES = 64


class Uring:
    """An io_uring that is never entered: entries are read where they were written."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("liburing.so.2")
        self._ring = ctypes.create_string_buffer(512)
        assert self._lib.io_uring_queue_init(_ENTRIES, self._ring, 0) == 0
        self._seen = 0

    @property
    def address(self) -> int:
        return ctypes.addressof(self._ring)

    def entries(self) -> list[Entry]:
        """Those written since the last call."""
        (entries,) = struct.unpack_from("<Q", self._ring.raw, _SQES_AT)
        (tail,) = struct.unpack_from("<I", self._ring.raw, _TAIL_AT)
        new = range(self._seen, tail)
        self._seen = tail
        return [
            Entry(*_ENTRY.unpack(ctypes.string_at(entries + _ENTRY_BYTES * index, _ENTRY.size)))
            for index in new
        ]

    def close(self) -> None:
        self._lib.io_uring_queue_exit(self._ring)


class FileInside:
    """A queue with the engine of a file in it, and a disk that never answers by itself."""

    def __init__(self, path: Path, plan: Plan, *, is_block_device: bool = False) -> None:
        """`is_block_device`: its I/O goes through the io_uring wherever the file lies."""
        self.rig = Rig(plan)
        self.side = self.rig.sides[0]
        self.queue, self.driver = self.side.queue, FakeDriver(self.side)
        path.write_bytes(bytes(MIB))
        self.path = path
        self.file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.uring = Uring()
        self.raw = self._open(is_block_device)
        calls = int(_engine.ffi.cast("uintptr_t", _engine.lib.engine_calls()))
        self.calls = _native.ffi.cast("struct engine_calls *", calls)
        ring = _engine.ffi.cast("struct io_uring *", self.uring.address)
        assert _engine.lib.engine_use_ring(self.raw, ring) == 0
        self.begin()
        self.queue.start()
        self.driver.consume()
        assert self.queue.expect(0, _native.ffi.NULL, 0, False, False)
        self.queue.input(Descriptor(Kind.HELLO, device=DEVICE, epoch=plan.epoch).pack())
        self.turn()
        assert self.queue.link is LinkState.UP

    @property
    def engine(self) -> Any:
        """The engine, as the core knows it."""
        return _native.ffi.cast("struct engine *", int(_engine.ffi.cast("uintptr_t", self.raw)))

    def begin(self) -> None:
        """The core uses the engine through `calls` from now on."""
        _native.lib.uq_inside_begin(self.queue.raw, self.calls, self.engine)

    def _open(self, is_block_device: bool) -> Any:
        ffi, lib, plan = _engine.ffi, _engine.lib, self.rig.plan
        setup = ffi.new("struct engine_setup *")
        setup.device, setup.epoch, setup.queues, setup.depth = DEVICE, plan.epoch, 1, plan.depth
        setup.size_bytes, setup.fixed_buffers = MIB, plan.zero_copy
        if not plan.zero_copy:
            setup.pool = ffi.cast("uint8_t *", self.rig.pool.address)
            setup.pool_bytes = self.rig.geometry.total_bytes
        error = ffi.new("int *")
        opened = lib.engine_open(setup, lib.storage_file_new(self.file, is_block_device, 4096), error)
        assert opened != ffi.NULL, error[0]
        return opened

    def turn(self) -> list[Entry]:
        """What the worker's loop does once; the I/O that it submits."""
        self.exchange()
        assert _engine.lib.engine_prepare(self.raw) == 0
        self._note_buffers()
        self.driver.consume()
        self.side.check()
        return self.uring.entries()

    def _note_buffers(self) -> None:
        """The engine uses the buffers of the tags that have one."""
        for slot, header in enumerate(self.rig.headers):
            if header.tag:
                self.rig.ledger.use(slot, (0, header.tag - 1))

    def exchange(self) -> None:
        """What core and engine tell each other."""
        _native.lib.uq_inside_turn(self.queue.raw, self.calls, self.engine)

    def deliver(self, tag: int, request: Request) -> Entry:
        """Deliver a request, and the data of a write that comes without it; its one entry."""
        self.driver.deliver(tag, request)
        entries = self.turn()
        if not entries:
            self.driver.copy(tag)
            entries = self.turn()
        (entry,) = entries
        return entry

    def complete(self, entry: Entry, result: int) -> list[Entry]:
        """The file's I/O ends; what follows it."""
        _engine.lib.engine_complete(self.raw, entry.user_data, result)
        return self.turn()

    def close(self) -> None:
        _engine.lib.engine_close(self.raw)
        self.uring.close()
        os.close(self.file)
