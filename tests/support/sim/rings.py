"""Rings in a simulation: real memory, sockets and doorbells, the real C of both ends, and deaths in between.

Owns what io_uring and epoll do otherwise: who sleeps, and what wakes him.  A party that sleeps is not turned before its
doorbell, or something else that it waits for, says so; one for whom something lies there while nobody has rung sleeps
for ever, which is the complaint `assert_no_wakeup_lost` makes.
"""

import os
import random
from typing import Protocol

from support.fakes.descriptors import is_readable
from support.fakes.ring_peer import TO_BACKEND, TO_WORKER, RingMemory
from support.sim.defects import BELL_NOT_RUNG, DOZES_BLINDLY, REGION_NOT_WANTED
from support.sim.wire import Killed, Life
from ublkpool.bufpool import wire
from ublkpool.bufpool.engine._engine import ffi, lib
from ublkpool.bufpool.sdk.links import Polled
from ublkpool.bufpool.sdk.ring_links import QueueRings, RingConnection, RingLinks
from ublkpool.ublk import calls
from ublkpool.ublk.queue import LinkState, Port, Queue

LOST = "a wake-up is lost"


class SimPort:
    """A worker's end: what its ring does with a port and two doorbells."""

    def __init__(self, port: Port, bell_in: int, bell_out: int, life: Life, defect: str) -> None:
        self.memory = RingMemory(port.memory_fd, port.entries)
        self._port, self._bell_in, self._bell_out = port, bell_in, bell_out
        self._life, self._defect = life, defect
        self.sleeps = self._is_drowsy = False

    def exchange(self, queue: Queue) -> None:
        """As a turn of the real ring.  Raises `Killed` before the turn, or before the doorbell."""
        if queue.output():
            self._life.effect()
        if self._port.turn(queue):
            self._life.effect()
            if self._defect != BELL_NOT_RUNG:
                os.eventfd_write(self._bell_out, 1)

    def grow_drowsy(self) -> None:
        """Without work: the worker will doze, after the other processes had a turn."""
        self._is_drowsy = True

    def doze(self, queue: Queue) -> None:
        """Fall asleep, if the worker is about to."""
        if self._is_drowsy:
            self._is_drowsy = False
            may_sleep = bool(calls.lib.uq_port_doze(self._port.raw, queue.raw))
            self.sleeps = may_sleep or self._defect == DOZES_BLINDLY

    def wake(self) -> None:
        self.sleeps = False
        calls.lib.uq_port_wake(self._port.raw)

    def is_rung(self) -> bool:
        return _is_readable(self._bell_in)

    def hear(self) -> None:
        """The worker's poll has completed."""
        if self.is_rung():
            os.eventfd_read(self._bell_in)

    def assert_no_wakeup_lost(self, name: str, queue: Queue) -> None:
        """Raises `AssertionError` if it sleeps on something that it listens to."""
        listens = queue.link in (
            LinkState.EXPECTED,
            LinkState.UP,
            LinkState.FENCING,
        )
        lost = self.sleeps and listens and self.memory.waiting(TO_WORKER) and not self.is_rung()
        assert not lost, f"{LOST}: {name} sleeps on {self.memory.waiting(TO_WORKER)} entries"

    def close(self) -> None:
        self.memory.memory.close()


class RingProcess(Protocol):
    """The backend that owns these links."""

    life: Life
    rng: random.Random
    defect: str

    def says(self, frame: bytes) -> bytes: ...
    def lies_about_index(self) -> bool: ...
    def has_work(self) -> bool: ...
    def waits_for_region(self) -> bool: ...


class SimRingLinks(RingLinks):
    """The SDK's real links through rings, asleep between their turns as a process is."""

    def __init__(self, process: RingProcess, attached: wire.Attached) -> None:
        self._process = process
        self._sleeps = self._is_drowsy = False
        self._memory: dict[int, RingMemory] = {}
        super().__init__(attached)

    def _open(self, link: RingConnection, ring: QueueRings) -> None:
        self._memory[link.queue] = RingMemory(ring._files[0], ring.entries)
        super()._open(link, ring)

    def _end(self, link: RingConnection) -> None:
        if link.ring is not None:
            self._memory.pop(link.queue).memory.close()
        super()._end(link)

    def send_frame(self, queue: int, frame: bytes) -> None:
        """Send; the backend may die before it publishes this, or before it rings."""
        self._process.life.effect()
        frame = self._process.says(frame)
        try:
            self._process.life.effect()
        except Killed:
            bell = ffi.new("int *")
            lib.ports_write(self._ports, queue, frame, len(frame) // wire.DESCRIPTOR_BYTES, bell)
            raise
        super().send_frame(queue, frame)
        if queue in self._memory and self._process.lies_about_index():
            self._lie_about_index(queue)

    def _lie_about_index(self, queue: int) -> None:
        memory, ring = self._memory[queue], self._links[queue].ring
        assert ring is not None
        memory.lie_ahead()
        os.eventfd_write(ring.worker_bell, 1)

    def is_awake(self) -> bool:
        """Whether the backend is awake, or something wakes it."""
        return (
            not self._sleeps or self._process.has_work() or _is_readable(self._epoll_file) or self._is_due()
        )

    def _is_due(self) -> bool:
        # As `poll` computes its timeout.
        return bool(self._absent) and self._until_due(-1) <= 1

    def look(self) -> Polled:
        """A poll by an awake backend, which will doze then, after the other processes had a turn."""
        self._sleeps, self._is_drowsy = False, True
        return self.poll(0)

    def doze(self) -> None:
        """Fall asleep, if the backend is about to; a `poll` begins with that."""
        if self._is_drowsy:
            self._is_drowsy = False
            # As the loop in C: a RELEASE alone wakes the backend only if a request waits for a region.
            wants = self._process.waits_for_region() and self._process.defect != REGION_NOT_WANTED
            self._sleeps = bool(lib.ports_doze(self._ports, wants))
            if not self._sleeps:
                lib.ports_wake(self._ports)

    def assert_no_wakeup_lost(self) -> None:
        """Raises `AssertionError` if it sleeps on something that it listens to."""
        if not self._sleeps or not self._hears or self.is_awake():
            return
        for queue, memory in self._memory.items():
            kinds = memory.kinds(TO_BACKEND)
            can_wait = not self._process.waits_for_region() and set(kinds) <= {wire.Kind.RELEASE}
            assert can_wait or not kinds, (
                f"{LOST}: the backend sleeps on {len(kinds)} entries of queue {queue}"
            )

    def die(self) -> None:
        """The process has died, perhaps while it wrote an entry; the kernel closes its files."""
        self._hears = False
        for link in self._links:
            if link.ring is not None:
                self._memory[link.queue].scribble(TO_WORKER, self._process.rng)
                self._forget_bell(link.ring)
            if link.connection is not None:
                self._end(link)
        self._epoll.close()


def _is_readable(file: int) -> bool:
    return is_readable(file)
