"""The place of a native engine in a worker that was prepared: which engine it gets is told when a device takes it.

Owns the store's descriptors from their messages until the engine has them.  Until then the queue has no link, and no
request comes, since the device has no disk.
"""

import os

from ublkpool.bufpool.engine.cow import CowFiles, CowLayout
from ublkpool.bufpool.engine.native import FileStorage, MemoryStorage, NullStorage, Storage
from ublkpool.ublk.queue import IoUring, Queue
from ublkpool.workers.engine_inside import Awaited, EngineInside, EngineSpec
from ublkpool.workers.engine_place import EnginePlace
from ublkpool.workers.messages import StorageKind, ToldEngine

AWAITED = EngineSpec(storage=Awaited(), size_bytes=0, read_only=False)
"""The engine of a prepared worker."""


class EngineAwaited(EnginePlace):
    """The place of one queue's engine."""

    def __init__(self, queue: Queue, pool: memoryview) -> None:
        super().__init__(queue)
        self._pool = pool
        self._files: list[int] = []
        self._ring: IoUring | None = None

    def serve_on(self, ring: IoUring) -> None:
        """Use this io_uring, once there is an engine."""
        self._ring = ring

    def take(self, fd: int | None) -> None:
        """A descriptor of the store, in the order of `told`; None: this process has no room for it."""
        if fd is not None:
            self._files.append(fd)

    def begin(self, engine: ToldEngine, name: str) -> EngineInside:
        """The engine, which answers from now on.  Raises `BackendError`, `OSError`."""
        assert self._ring is not None
        if len(self._files) != engine.descriptors:
            raise OSError(
                f"{len(self._files)} of {engine.descriptors} descriptors of its store have come: this process has no "
                "room for more"
            )
        inside = EngineInside(_spec_of(engine, self._files), name, self._queue, self._pool)
        self._files = []
        inside.serve_on(self._ring)
        return inside

    def close(self) -> None:
        """Close what no engine has."""
        while self._files:
            os.close(self._files.pop())


def told(spec: EngineSpec) -> ToldEngine:
    """What a worker is told of this engine; the spec's `descriptors` travel in messages before that."""
    kind: StorageKind
    layout: CowLayout | None = None
    is_block_device = False
    match spec.storage:
        case NullStorage():
            kind = "null"
        case MemoryStorage(names_reads=True):
            kind = "memory"
        case FileStorage(_, is_block_device):
            kind = "file"
        case CowFiles(_, _, layout):
            kind = "cow"
        case _:
            raise AssertionError(f"no engine of a prepared device: {spec.storage}")
    return ToldEngine(
        storage=kind,
        size_bytes=spec.size_bytes,
        read_only=spec.read_only,
        own_bytes=spec.own_bytes,
        descriptors=len(spec.descriptors()),
        is_block_device=is_block_device,
        cow=layout,
    )


def _spec_of(engine: ToldEngine, files: list[int]) -> EngineSpec:
    """The spec that `told` was given, with these descriptors."""
    own_fd = files[0] if engine.storage == "memory" else None
    return EngineSpec(
        _storage_of(engine, files), engine.size_bytes, engine.read_only, own_fd, engine.own_bytes
    )


def _storage_of(engine: ToldEngine, files: list[int]) -> Storage:
    match engine.storage:
        case "null":
            return NullStorage()
        case "memory":
            return MemoryStorage(names_reads=True)
        case "file":
            return FileStorage(files[0], engine.is_block_device)
        case "cow":
            assert engine.cow is not None
            return CowFiles(files[0], files[1], engine.cow)
