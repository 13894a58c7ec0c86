"""A device that is resized again and again while its processes are killed.

Owns the store that grows and what must hold of the sizes: at every step the store is at least as large as the disk, the
disk never shrinks, and a size that a client was told is never lost; in the end there is one size.
"""

import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import msgspec

from support.fakes.backend import Store
from support.fakes.driver import SECTOR_BYTES
from support.sim import backend as sim_backend
from support.sim.backend import SimBackend, SlowBackend
from support.sim.daemon import Daemon
from support.sim.device_world import DeviceWorld
from support.sim.processes import SECTORS, DeviceScenario
from support.vm.shadow_disk import ShadowDisk
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.sdk import growth
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.status import ResizeResult


class GrowingStore(Store):
    """Data that survives a backend's death, as far as the store reaches."""

    def __init__(self, size_bytes: int, reach_bytes: int) -> None:
        super().__init__(0, size_bytes)
        self.reach_bytes = reach_bytes

    def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= self.reach_bytes, "a request goes beyond the store"
        return super().read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        assert offset + len(data) <= self.reach_bytes, "a request goes beyond the store"
        super().write(offset, data)


class GrowingDisk(ShadowDisk):
    """The model of a disk that grows; its new sectors are zero."""

    def grow(self, sectors: int) -> None:
        self._sectors = sectors

    def check_stored(self, read: Callable[[int, int], bytes]) -> None:
        self._may_be = self._may_be[: self._sectors]
        super().check_stored(read)


class GrowingBackend(SlowBackend):
    """A backend whose store grows."""

    def resize(self, size_bytes: int) -> None:
        store = cast(GrowingStore, self._process.store)
        store.reach_bytes = max(store.reach_bytes, size_bytes)


class SimThread:
    """A thread of a backend that runs in one step of the simulation, or never if its process has ended."""

    def __init__(self, begun: "deque[SimThread]", target: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._begun, self._target, self._arguments = begun, target, args
        self._is_alive = False

    def start(self) -> None:
        self._is_alive = True
        self._begun.append(self)

    def is_alive(self) -> bool:
        return self._is_alive

    def run(self) -> None:
        self._target(*self._arguments)
        self._is_alive = False

    @property
    def process(self) -> SimBackend:
        return cast(SimBackend, cast(Any, self._target).__self__._backend._process)


class ResizeWorld(DeviceWorld):
    """One run; see the module."""

    first_sectors = SECTORS // 4

    def __init__(self, scenario: DeviceScenario, rng: random.Random) -> None:
        super().__init__(scenario, rng)
        block = scenario.block_bytes // SECTOR_BYTES
        disk = GrowingDisk(rng, 0, SECTORS, self.kernel.max_io_bytes // SECTOR_BYTES, block)
        disk.grow(self.first_sectors)
        self.disk = disk
        self.store = GrowingStore(SECTORS * SECTOR_BYTES, self.first_sectors * SECTOR_BYTES)
        self._threads: deque[SimThread] = deque()
        self._resizing: Any = None
        self._told_bytes = self._seen_bytes = self.first_sectors * SECTOR_BYTES
        self._described_bytes = 0
        self._was_live = False
        self._actions += ((self._resize, 3), (self._grow_store, 4), (self._kill_in_resize, 2))

    @property
    def _reach_bytes(self) -> int:
        return cast(GrowingStore, self.store).reach_bytes

    def run(self) -> None:
        thread = SimpleNamespace(
            Thread=lambda target, args, **_: SimThread(self._threads, target, args),
        )
        with (
            mock.patch.object(sim_backend, "SlowBackend", GrowingBackend),
            mock.patch.object(growth, "threading", thread),
        ):
            super().run()

    def _offered(self, attach: wire.Attach, daemon: Daemon) -> wire.Attach:
        """A backend serves what the daemon described some time before: it may be refused, and comes again."""
        if self.rng.random() < 0.7 or not self._described_bytes:
            self._described_bytes = daemon.device.describe().size_bytes
        assert self._described_bytes <= self._reach_bytes, "the device is larger than its store"
        return msgspec.structs.replace(attach, size_bytes=self._described_bytes, resizes=True)

    # Events

    def _resize(self) -> None:
        """A client asks for a size; its connection ends with the supervisor."""
        daemon = self.daemon
        self._was_live |= self._is_live()
        if daemon is None or self.adopting is not None or not self._was_live:
            return
        disk = daemon.device.parts.resources.disk
        if self._resizing is not None or disk is None or self.ending:
            return
        more = self.rng.randint(0, 3) * self.scenario.block_bytes
        wanted_bytes = min(disk.size_bytes + more, SECTORS * SECTOR_BYTES)
        self.note(f"resize to {wanted_bytes}")
        self._resizing = daemon.spawn(lambda: daemon.device.resize(wanted_bytes, False))

    def _grow_store(self) -> None:
        """A backend's thread has grown the store."""
        if self._threads:
            thread = self._threads.popleft()
            if thread.process is self.backend and thread.process.life.alive:
                thread.run()

    def _kill_in_resize(self) -> None:
        if self._resizing is not None:
            self._kill()

    def _has_killed(self, victim: Any) -> bool:
        has_killed = super()._has_killed(victim)
        self.counts[f"{victim} killed in a resize"] += has_killed and self._resizing is not None
        return has_killed

    def _kill_supervisor(self) -> None:
        super()._kill_supervisor()
        self._resizing = None

    def _do(self, action: Callable[[], None]) -> None:
        super()._do(action)
        self._hear_of_resize()
        size_bytes = self.kernel.size_bytes
        assert size_bytes <= self._reach_bytes, "the disk is larger than its store"
        assert size_bytes >= self._seen_bytes or not size_bytes, "the disk has shrunk"
        assert size_bytes >= self._told_bytes or self.deleting or not size_bytes, (
            "a size that was told is lost"
        )
        if size_bytes > self._seen_bytes:
            self.counts["disk told after a resize's end"] += self._resizing is None
            self._seen_bytes = size_bytes
            cast(GrowingDisk, self.disk).grow(size_bytes // SECTOR_BYTES)

    def _hear_of_resize(self) -> None:
        if self._resizing is None or not self._resizing.done():
            return
        error, result = self._resizing.exception(), None
        if error is None:
            result = cast(ResizeResult, self._resizing.result())
            self.counts["resizes"] += result.after_bytes > result.before_bytes
            self._told_bytes = max(self._told_bytes, result.after_bytes)
            assert self.kernel.size_bytes >= result.after_bytes, (
                "a client is told of a size that the disk has not"
            )
        else:
            assert isinstance(error, DaemonError | PoolError | OSError), repr(error)
            self.counts["resizes refused"] += 1
        self.note(f"resized: {result or error}")
        self._resizing = None

    def _is_settled(self) -> bool:
        return super()._is_settled() and self._has_one_size()

    def _has_one_size(self) -> bool:
        daemon = self.daemon
        disk = daemon.device.parts.resources.disk if daemon else None
        if daemon is None or disk is None or self._resizing is not None:
            return False
        store = daemon.device.parts.binding.store
        return store is not None and disk.size_bytes == self.kernel.size_bytes == store.size_bytes
