"""No loop uses a doorbell after its link has ended, because the descriptor's number may soon mean another file.

A pipe stands for a doorbell: a poll of its writer reports at once when no descriptor and no io_uring poll refers to the
reader any more.
"""

import os
import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.fakes.descriptors import is_readable
from support.fakes.links import sealed_memory
from support.fakes.native_rig import DEVICE_NUMBER, EPOCH, NativeRig
from support.fakes.queue_desk import Desk
from support.fakes.ring_peer import SLEEPING, TAIL, TO_BACKEND, TO_WORKER, RingMemory
from support.fakes.worker import FakeWorker, serving
from ublkpool.backends.null import NullBackend, NullOptions
from ublkpool.bufpool.engine._engine import ffi, lib
from ublkpool.bufpool.engine.native import NullStorage
from ublkpool.bufpool.engine.ring_driver import RingDriver
from ublkpool.bufpool.wire import Descriptor, Kind, Op
from ublkpool.ublk.queue import IoUring, Port

ENTRIES = 64
DEPTH = 4


class Pipe:
    """A pipe whose reader stands for a doorbell."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def is_held(self) -> bool:
        """Close the reader; whether a poll of io_uring still holds its file."""
        os.close(self.reader)
        poll = select.poll()
        poll.register(self._writer, 0)
        held = not poll.poll(0)
        os.close(self._writer)
        return held


def _bell() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def _is_rung(bell: int) -> bool:
    return is_readable(bell)


class Loop:
    """A native engine's loop with one queue, whose worker is the test."""

    def __init__(self, made: ExitStack) -> None:
        size = lib.ports_memory_bytes(ENTRIES)
        file = sealed_memory(size)
        made.callback(os.close, file)
        self.memory = RingMemory(file, ENTRIES)
        made.callback(self.memory.memory.close)
        self._shared = ffi.from_buffer("uint8_t[]", self.memory.memory, require_writable=True)
        made.callback(ffi.release, self._shared)
        rig = NativeRig(NullStorage(), size_bytes=1 << 20, own_bytes=0, depth=DEPTH)
        made.callback(rig.close)
        self._ports: Any = ffi.gc(lib.ports_new(1, EPOCH, ENTRIES), lib.ports_free)
        watched = _bell()
        made.callback(os.close, watched)
        self.driver = RingDriver(self._ports, rig.engine.raw, 1, DEPTH, watched)
        made.callback(self.driver.close)

    def open(self, ours: int, workers: int) -> None:
        lib.ports_open(self._ports, 0, self._shared, ENTRIES, ours, workers)
        self.driver.bells(0, ours, workers)

    def end(self) -> None:
        lib.ports_end(self._ports, 0)
        self.driver.bells(0, -1, -1)

    def answer_a_sleeper(self) -> None:
        """Send a request whose answer finds the worker asleep."""
        before = self.memory.waiting(TO_WORKER)
        self.memory.set_index(TO_WORKER, SLEEPING, 1)
        request = Descriptor(Kind.REQUEST, Op.FLUSH, device=DEVICE_NUMBER, epoch=EPOCH)
        self.memory.put_at(TO_BACKEND, self.memory.index(TO_BACKEND, TAIL), request.pack())
        self.driver.run(0, True)
        assert self.memory.waiting(TO_WORKER) == before + 1


@pytest.fixture
def loop() -> Iterator[Loop]:
    with ExitStack() as made:
        yield Loop(made)


@pytest.fixture
def bell() -> Iterator[int]:
    made = _bell()
    yield made
    os.close(made)


@pytest.mark.parametrize("ends", [False, True])
def test_a_loop_waits_for_the_doorbell_of_a_link_no_longer_than_there_is_one(
    loop: Loop, bell: int, ends: bool
) -> None:
    pipe = Pipe()
    loop.open(pipe.reader, bell)
    loop.driver.run(0, True)
    if ends:
        loop.end()
        loop.driver.run(0, True)
    assert pipe.is_held() != ends


def test_a_loop_that_has_no_doorbell_waits_for_none(loop: Loop, bell: int) -> None:
    with_bell = Pipe()
    loop.open(with_bell.reader, bell)
    loop.driver.run(0, True)
    loop.end()
    loop.driver.run(0, True)
    # The number now means another file.
    stranger, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.dup2(stranger, with_bell.reader)
    os.close(stranger)
    turns = loop.driver.statistics().turns
    loop.driver.run(0, True)
    os.write(writer, b"!")
    loop.driver.run(0, True)
    assert loop.driver.statistics().turns - turns == 2
    os.close(writer)
    assert not with_bell.is_held()


def test_a_doorbell_that_was_due_to_a_dead_worker_is_not_rung(loop: Loop, bell: int) -> None:
    ours, workers = _bell(), _bell()
    loop.open(ours, workers)
    loop.answer_a_sleeper()
    assert _is_rung(workers)
    # A doorbell that is due and waits for a submission entry.
    loop.driver.bells(0, ours, -1)
    loop.answer_a_sleeper()
    loop.end()
    os.eventfd_read(workers)
    os.dup2(bell, workers)
    loop.driver.run(0, True)
    assert not _is_rung(bell)
    loop.open(ours, bell)
    loop.driver.run(0, True)
    assert not _is_rung(bell)
    os.close(ours)
    os.close(workers)


def _are_open(*files: int) -> bool:
    try:
        return bool([os.fstat(each) for each in files])
    except OSError:
        return False


def test_the_loop_forgets_doorbells_before_they_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeWorker, "transport", "ring")
    seen: list[tuple[str, bool]] = []
    known: list[int] = []
    bells: Callable[[RingDriver, int, int, int], None] = RingDriver.bells

    def watching(self: RingDriver, queue: int, ours: int, workers: int) -> None:
        seen.append(("ended" if ours < 0 else "open", _are_open(*known)))
        known[:] = [] if ours < 0 else [ours, workers]
        bells(self, queue, ours, workers)

    monkeypatch.setattr(RingDriver, "bells", watching)
    with (
        FakeWorker(tmp_path, queues=1, depth=DEPTH) as worker,
        serving(worker, NullBackend(NullOptions(size=1 << 20))),
    ):
        worker.restart_worker(0)
        assert worker.receive().kind == Kind.HELLO
        assert worker.do(Op.FLUSH) == 0
    assert seen[:3] == [("open", False), ("ended", True), ("open", False)]


@pytest.mark.parametrize("ends", [False, True])
def test_a_worker_waits_for_a_doorbell_no_longer_than_it_has_the_port(ends: bool, bell: int) -> None:
    desk = Desk(need_get_data=False, depth=DEPTH)
    ring, port, pipe = IoUring(desk.queue, -1), Port(DEPTH), Pipe()
    memory = RingMemory(port.memory_fd, port.entries)
    ring.use_port(port, pipe.reader, bell)
    ring.run(0)
    if ends:
        ring.use_port(None)
        memory.set_index(TO_BACKEND, SLEEPING, 1)
        desk.read(0, 0)
        tail = memory.index(TO_BACKEND, TAIL)
        ring.run(0)
        assert memory.index(TO_BACKEND, TAIL) == tail and not _is_rung(bell)
    assert pipe.is_held() != ends
    ring.close()
    memory.memory.close()
    port.close()
