"""A backend that delays its victim requests until the test lets it go on, even past the death of their worker.

An honest one confirms a fence when the last request of the old epoch is done; another confirms at once and executes
the rest later, which a worker cannot detect.
"""

import mmap
import multiprocessing
import os
from collections.abc import Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, NamedTuple

from support.vm.daemon import DEADLINE_S, Daemon, eventually
from support.vm.hostile_backend import Desk, Victim, honest, open_desk
from support.vm.process import Forked, read_block, write_block
from support.vm.recovery import kill
from ublkpool.bufpool import wire
from ublkpool.bufpool.pool.lease import Owner
from ublkpool.bufpool.wire import Descriptor, Kind

CHUNK = 64 * 1024
DISK_BYTES = 4 << 20
DEPTH = 8
NAME = "late"


class Said(NamedTuple):
    """The backend's report: a delayed request, a FENCE, or a request that came before it confirmed the fence."""

    what: Literal["kept", "fence", "early"]
    request: Descriptor


class Manners(NamedTuple):
    """The requests to delay, each once; whether it confirms fences honestly; whether it delays a write with its data.

    Soon after the fence a pool buffer belongs to another request, so data that was not copied is lost.
    """

    victims: Sequence[Victim]
    is_honest: bool = True
    takes_data_at_once: bool = True


class _Late:
    """The state of the backend's process."""

    def __init__(self, desk: Desk, manners: Manners, report: Connection) -> None:
        self._desk, self._victims, self._manners, self._report = desk, list(manners.victims), manners, report
        self._kept: list[tuple[Descriptor, bytes]] = []
        self._fence: Descriptor | None = None

    def take(self, request: Descriptor) -> None:
        victim = Victim(request.offset, wire.Op(request.op))
        if request.kind == Kind.FENCE:
            self._on_fence(request)
        elif request.kind in (Kind.REQUEST, Kind.DATA) and victim in self._victims:
            self._victims.remove(victim)
            took = request.op == wire.Op.WRITE and self._manners.takes_data_at_once
            self._kept.append((request, bytes(self._desk.buffer(request)) if took else b""))
            self._say("kept", request)
        else:
            if self._fence is not None and request.kind < Kind.RELEASE:
                self._say("early", request)
            honest(self._desk, request)

    def go_on(self) -> None:
        """Execute the delayed requests in their order, then answer them."""
        kept, self._kept = self._kept, []
        for request, data in kept:
            if data:
                self._desk.disk[request.offset : request.offset + len(data)] = data
                self._desk.send(request, request.answer(Kind.DONE, len(data)).pack())
            else:
                honest(self._desk, request)
        if self._fence is not None:
            honest(self._desk, self._fence)
            self._fence = None

    def _on_fence(self, fence: Descriptor) -> None:
        if self._manners.is_honest and any(each.epoch < fence.epoch for each, _ in self._kept):
            self._fence = fence
        else:
            honest(self._desk, fence)
        self._say("fence", fence)

    def _say(self, what: Literal["kept", "fence", "early"], request: Descriptor) -> None:
        self._report.send(Said(what, request))


def _serve(
    run_dir: Path,
    disk: mmap.mmap,
    manners: Manners,
    segment_bytes: int,
    report: Connection,
    gate: int,
) -> int:
    desk = open_desk(run_dir, NAME, disk, segment_bytes)
    late = _Late(desk, manners, report)
    desk.attachment.links.watch(gate)
    while True:
        ready = desk.attachment.poll()
        for queue in ready.queues:
            for request in desk.attachment.receive(queue):
                late.take(request)
        if gate in ready.descriptors:
            os.eventfd_read(gate)
            late.go_on()
        if ready.control and isinstance(desk.attachment.message(), wire.Detach | None):
            return 0


class LateScene:
    """A device with one queue, served by a late backend, and its clients."""

    def __init__(self, daemon: Daemon, placement: str, manners: Manners) -> None:
        self.daemon = daemon
        self.disk = mmap.mmap(-1, DISK_BYTES)
        self._reports, report = multiprocessing.Pipe(duplex=False)
        self._gate = os.eventfd(0)
        daemon.add(NAME, size_bytes=DISK_BYTES, depth=DEPTH, max_io_bytes=CHUNK, placement=placement)
        segment_bytes = DEPTH * CHUNK if placement == "backend" else 0
        self._segment_bytes, self._report = segment_bytes, report
        self.backend = self._attach(manners)
        path = daemon.wait_live(NAME).path
        assert path is not None
        self.path = path

    def _attach(self, manners: Manners) -> Forked:
        run_dir, disk, segment_bytes = self.daemon.run_dir, self.disk, self._segment_bytes
        return Forked(lambda: _serve(run_dir, disk, manners, segment_bytes, self._report, self._gate))

    def said(self, what: str) -> Descriptor:
        """The request of the backend's next report, which must be of this kind."""
        assert self._reports.poll(DEADLINE_S), f"the backend does not say {what!r}"
        said: Said = self._reports.recv()
        assert said.what == what, said
        return said.request

    def says_nothing(self) -> bool:
        """Whether the backend has sent no further report."""
        return not self._reports.poll()

    def go_on(self) -> None:
        """Let the backend execute the delayed requests."""
        os.eventfd_write(self._gate, 1)

    def write(self, offset: int, data: bytes) -> Forked:
        """A client's write, in a process whose exit status is the errno."""
        return Forked(lambda: write_block(self.path, offset, data))

    def read(self, offset: int, expected: bytes) -> Forked:
        """A client's read, in a process whose exit status is 0 if it read the expected data."""
        return Forked(lambda: int(read_block(self.path, offset, len(expected)) != expected))

    def succeed(self) -> None:
        """Kill the backend and attach an honest one."""
        kill(self.backend.pid)
        self.backend.wait()
        eventually(lambda: not self.daemon.status(NAME).backend.attached, "the backend is gone")
        self.backend = self._attach(Manners([]))

    def kill_worker(self) -> None:
        kill(self.daemon.status(NAME).workers[0].pid)

    def owner_of(self, request: Descriptor) -> Owner | None:
        """The present owner of the pool buffer of a request."""
        with closing(self.daemon.control(self.daemon.status(NAME))) as control:
            geometry = control.header.geometry
            slots = range(geometry.slot_count)
            slot = next(each for each in slots if geometry.slot_offset(each) == request.buffer)
            return list(control.slot_owners())[slot]

    def end(self) -> None:
        """Delete the device; its backend ends with it."""
        self.daemon.delete(NAME)
        assert self.backend.wait() == 0
        os.close(self._gate)
