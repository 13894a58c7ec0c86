"""A native engine inside the worker, in the place of a backend (`isolation = "none"`).

Owns the engine and its memory.  The queue's core treats it as a backend that is linked from the worker's start: it gets
the same descriptors and its answers are judged alike, but they travel by function calls (`ublk/csrc/queue_inside.h`),
and its I/O goes through the worker's own io_uring.  An engine that fails ends its worker, and the device is recovered.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ublkpool.bufpool.engine.cow import CowFiles, CowMap
from ublkpool.bufpool.engine.device import Device
from ublkpool.bufpool.engine.native import FileStorage, NativeEngine, Storage
from ublkpool.bufpool.sdk.inside import Connect
from ublkpool.bufpool.wire import Descriptor, Kind
from ublkpool.ublk import mappings
from ublkpool.ublk.calls import ffi
from ublkpool.ublk.queue import NULL, IoUring, Queue
from ublkpool.workers.engine_place import EnginePlace

OWN_SEGMENT = 1
"""The number of the memory disk's segment: the first that a backend would get."""


class Awaited(NamedTuple):
    """In the place of a storage: a prepared worker is told of it later, see `engine_awaited.py`."""


class EngineSpec(NamedTuple):
    """The engine that each worker of a device opens, on descriptors that it inherits."""

    storage: Storage | Connect | Awaited
    size_bytes: int
    read_only: bool
    own_fd: int | None = None
    """The memory disk, which all workers share."""
    own_bytes: int = 0

    def descriptors(self) -> list[int]:
        """What a worker inherits."""
        memory = [] if self.own_fd is None else [self.own_fd]
        return memory + _files(self.storage)

    def renumbered(self, numbers: Mapping[int, int]) -> "EngineSpec":
        """The same in a process where the descriptors have these numbers."""
        own_fd = None if self.own_fd is None else numbers[self.own_fd]
        return self._replace(storage=_renumbered(self.storage, numbers), own_fd=own_fd)


class EngineInside(EnginePlace):
    """One queue's engine."""

    def __init__(self, spec: EngineSpec, name: str, queue: Queue, pool: memoryview) -> None:
        """Raises `BackendError`, `OSError`."""
        super().__init__(queue)
        self._own_bytes = spec.own_bytes
        self._own: Any = NULL
        if spec.own_fd is not None:
            self._own = mappings.map_segment(spec.own_fd, spec.own_bytes)
        storage = spec.storage
        assert not isinstance(storage, Connect | Awaited)
        self._map: CowMap | None = None
        if isinstance(storage, CowFiles):
            storage = storage.opened()
            self._map = storage.map
        device = device_of(spec, name, queue, pool, self._own)
        self._engine = NativeEngine(device, storage, read_only=spec.read_only)

    def serve_on(self, ring: IoUring) -> None:
        """Answer from now on, with this io_uring.  Raises `OSError`."""
        ring.use_engine(*self._engine.addresses)
        link(self._queue, self._own, self._own_bytes)

    def failure(self) -> str:
        """Why the queue has cut the engine off."""
        return self._engine.failure or super().failure()

    def resize(self, size_bytes: int) -> None:
        """The store has grown to at least this size: serve requests up to there."""
        self._engine.resize(size_bytes)

    def close(self) -> None:
        """Close the engine; the io_uring that it uses must not run any more."""
        self._engine.close()
        if self._map is not None:
            self._map.close()


def _files(storage: Storage | Connect | Awaited) -> list[int]:
    match storage:
        case FileStorage(file):
            return [file]
        case CowFiles(overlay, base):
            return [overlay, base]
        case _:
            return []


def _renumbered(
    storage: Storage | Connect | Awaited, numbers: Mapping[int, int]
) -> Storage | Connect | Awaited:
    match storage:
        case FileStorage(file):
            return storage._replace(file=numbers[file])
        case CowFiles(overlay, base):
            return storage._replace(overlay=numbers[overlay], base=numbers[base])
        case _:
            return storage


def link(queue: Queue, own: Any = NULL, own_bytes: int = 0) -> None:
    """Have the queue treat the engine as a backend that has greeted it; `own` is the memory disk.

    Not before the io_uring has set the queue's clock, by which the HELLO is awaited.
    """
    config = queue.config
    queue.expect(OWN_SEGMENT if own_bytes else 0, own, own_bytes, bool(own_bytes))
    hello = Descriptor(Kind.HELLO, device=config.device_number, queue=config.queue, epoch=config.epoch)
    queue.input(hello.pack())


def device_of(spec: EngineSpec, name: str, queue: Queue, pool: memoryview, own: Any = NULL) -> Device:
    """The device with this queue alone, which the engine knows as its queue 0."""
    config = queue.config
    return Device(
        name=name,
        number=config.device_number,
        epoch=config.epoch,
        size_bytes=spec.size_bytes,
        logical_block_bytes=config.block_bytes,
        queues=1,
        depth=config.depth,
        max_io_bytes=config.max_io_bytes,
        need_get_data=config.need_get_data,
        fixed_buffers=config.zero_copy,
        placement="backend" if config.place_in_backend else "pool",
        read_only=spec.read_only,
        pool=pool,
        own=memoryview(ffi.buffer(own, spec.own_bytes)) if spec.own_bytes else memoryview(b""),
        own_segment=OWN_SEGMENT if spec.own_bytes else 0,
        watch=_never,
        unwatch=_never,
        wake=_never,
    )


def _never(*_arguments: object) -> None:
    """For what only an engine in Python calls."""
    raise AssertionError("a native engine has no use for the SDK's loop")
