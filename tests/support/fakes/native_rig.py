"""A native engine on plain memory, without a worker: frames in, answers out.

Owns the pool, the own segment and a slice of a client area, each between two guard areas that no request may touch.
"""

from collections.abc import Iterable

from ublkpool.bufpool.engine._engine import ffi
from ublkpool.bufpool.engine.native import NativeEngine, Storage
from ublkpool.bufpool.sdk.backend import Device
from ublkpool.bufpool.wire import SEGMENT_CLIENTS, Descriptor, iter_frame, pack_frame

DEVICE_NUMBER = 7
OWN_SEGMENT = 9
SLICE_SEGMENT = SEGMENT_CLIENTS + 2
EPOCH = 3
GUARD_BYTES = 1 << 16
_GUARD = b"\xa5" * GUARD_BYTES


class Area:
    """Memory between two guard areas."""

    def __init__(self, size_bytes: int) -> None:
        self._all = bytearray(_GUARD + bytes(size_bytes) + _GUARD)
        self.view = memoryview(self._all)[GUARD_BYTES : GUARD_BYTES + size_bytes]

    @property
    def address(self) -> int:
        """Where it begins."""
        return int(ffi.cast("uintptr_t", ffi.from_buffer("char[]", self.view)))

    def is_intact(self) -> bool:
        """Whether the guard areas are unchanged."""
        return self._all.startswith(_GUARD) and self._all.endswith(_GUARD)


class NativeRig:
    """One engine and its memory; sizes in bytes.  The own segment may be larger than the device."""

    def __init__(
        self,
        storage: Storage,
        *,
        size_bytes: int,
        own_bytes: int,
        pool_bytes: int = 1 << 16,
        depth: int = 8,
        queues: int = 1,
        post_bytes: tuple[int, ...] = (),
    ) -> None:
        self.pool, self.own, self.slice = Area(pool_bytes), Area(own_bytes), Area(pool_bytes)
        self.depth, self.queues, self.post_bytes = depth, queues, post_bytes
        self.engine = NativeEngine(self._device(size_bytes), storage)

    def _device(self, size_bytes: int) -> Device:
        return Device(
            name="rig",
            number=DEVICE_NUMBER,
            epoch=EPOCH,
            size_bytes=size_bytes,
            logical_block_bytes=512,
            queues=self.queues,
            depth=self.depth,
            max_io_bytes=1 << 16,
            need_get_data=True,
            placement="backend",
            read_only=False,
            pool=self.pool.view,
            clients={SLICE_SEGMENT: self.slice.view},
            own=self.own.view,
            own_segment=OWN_SEGMENT,
            post_bytes=self.post_bytes,
            watch=lambda descriptor, callback: None,
            unwatch=lambda descriptor: None,
            wake=lambda: None,
        )

    def say(self, descriptors: Iterable[Descriptor]) -> list[Descriptor]:
        """Send one frame; returns all answers."""
        self.engine.take(0, pack_frame(descriptors))
        return self.hear()

    def hear(self) -> list[Descriptor]:
        """All answers that are due."""
        return [each for _, frame in self.engine.answers() for each in iter_frame(frame)]

    def close(self) -> None:
        """End the engine."""
        self.engine.close()
