"""An engine inside the worker whose store is a connection: who connects, when it serves, how it ends."""

import errno
import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.fakes.driver import SECTOR_BYTES, FakeDriver, Request
from support.fakes.queue_rig import DEVICE, Plan, Rig
from ublkpool.bufpool.engine.device import Device
from ublkpool.bufpool.engine.native import NativeEngine, NullStorage
from ublkpool.bufpool.errors import BackendError, StoreTaken
from ublkpool.bufpool.sdk.inside import Connect
from ublkpool.bufpool.sdk.properties import Hint, Properties
from ublkpool.bufpool.wire import Grown, Op, Resized
from ublkpool.ublk import _native
from ublkpool.ublk.calls import ffi
from ublkpool.ublk.queue import LinkState
from ublkpool.workers.engine_connected import _ALARM, _BELL, EngineConnected
from ublkpool.workers.engine_inside import EngineSpec

GENERATION = 7
OWNER = "10.0.0.1:0/9"
HINT = Hint("vol", Path("/run"), max_io_bytes=16384)
DEADLINE_S = 30.0


class FakeStore:
    """A store in a cluster that answers when the test lets it."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.error: Exception | None = None
        self.loss: BackendError | None = None
        self.connected_on: int | None = None
        self.device: Device | None = None
        self.alarm = os.eventfd(0, os.EFD_NONBLOCK)
        self.closed = 0
        self.grown_to: list[int] = []
        self.refusal: OSError | None = None
        self.may_grow = threading.Event()
        self.may_grow.set()

    def callables(self) -> dict[str, Any]:
        return {"resize": self.resize}

    def resize(self, size_bytes: int) -> None:
        assert threading.get_ident() != threading.main_thread().ident, "a cluster may keep it waiting"
        assert self.may_grow.wait(DEADLINE_S)
        if self.refusal is not None:
            raise self.refusal
        self.grown_to.append(size_bytes)

    def connect(self, hint: Hint) -> Properties:
        assert hint is HINT
        self.connected_on = threading.get_ident()
        assert self.may_answer.wait(60)
        if self.error is not None:
            raise self.error
        return Properties(owner=OWNER)

    def started(self, device: Device) -> None:
        assert threading.get_ident() == self.connected_on
        self.device = device
        device.watch(self.alarm, self._raise)

    def _raise(self) -> None:
        assert self.loss is not None
        raise self.loss

    def engine(self, device: Device) -> NativeEngine:
        return NativeEngine(device, NullStorage())

    def close(self) -> None:
        self.closed += 1


class FakeRing:
    """An io_uring that notes what it is to watch."""

    def __init__(self) -> None:
        self.watched: dict[int, int] = {}
        self.engine = (0, 0)

    def watch(self, number: int, fd: int) -> None:
        self.watched[number] = fd

    def use_engine(self, calls: int, engine: int) -> None:
        self.engine = calls, engine


class Worker:
    """One queue, and what its loop does with the engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.ring = FakeStore(), FakeRing()
        monkeypatch.setattr(Connect, "backend", lambda _: self.store)
        self.rig = Rig(Plan())
        self.side = self.rig.sides[0]
        self.queue, self.driver = self.side.queue, FakeDriver(self.side)
        self.spec = EngineSpec(Connect("rbd", {}, None, HINT, GENERATION), 256 * SECTOR_BYTES, False)
        pool_bytes = self.rig.geometry.total_bytes
        self.pool = memoryview(ffi.buffer(ffi.cast("uint8_t *", self.rig.pool.address), pool_bytes))
        self.engine = EngineConnected(self.spec, "vol", self.queue, self.pool)
        ring: Any = self.ring
        self.engine.serve_on(ring)
        self.queue.start()
        self.driver.consume()
        self.told: list[tuple[str, str]] = []
        self.grown: list[Resized | Grown] = []

    def connect(self) -> None:
        self.engine.connect(lambda owner, reason: self.told.append((owner, reason)), self.grown.append)

    def connected(self) -> Device:
        """What the store knows of the device, once it is connected."""
        self.store.may_answer.set()
        self.connect()
        self.hear()
        assert self.store.device is not None
        return self.store.device

    def thread_ends(self) -> None:
        """Until the store's growth runs no more."""
        for each in threading.enumerate():
            if each.name == "ublkpool-resize":
                each.join(DEADLINE_S)

    def discard(self, tag: int, sector: int) -> Request:
        """A discard of one sector that the queue has been given."""
        request = Request(Op.DISCARD, sector, 1)
        self.driver.deliver(tag, request)
        self.turn()
        return request

    def hear(self) -> None:
        """Until the thread has an outcome."""
        bell = next(iter(self.ring.watched.values()))
        assert select.select([bell], [], [], 60)[0]
        self.engine.turn(_BELL)

    def turn(self) -> None:
        """What the io_uring does of the engine."""
        calls, engine = self.ring.engine
        if calls:
            cast = _native.ffi.cast
            _native.lib.uq_inside_turn(
                self.queue.raw, cast("struct engine_calls *", calls), cast("struct engine *", engine)
            )
        self.driver.consume()


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    made = Worker(monkeypatch)
    yield made
    made.store.may_answer.set()
    made.engine.close()
    os.close(made.store.alarm)


def test_a_request_waits_until_the_owner_is_on_record(worker: Worker) -> None:
    write = Request(Op.FLUSH, 0, 0)
    worker.driver.deliver(0, write)
    worker.connect()
    worker.turn()
    assert worker.told == [], "the cluster has not answered, and the loop goes on"
    worker.store.may_answer.set()
    worker.hear()
    assert worker.told == [(OWNER, "")]
    assert worker.store.connected_on not in (None, threading.get_ident())
    worker.turn()
    assert (worker.queue.link, write.result) == (LinkState.NONE, None), "the owner is not on record yet"
    worker.engine.serve()
    worker.turn()
    assert (worker.queue.link, write.result) == (LinkState.UP, 0)
    device = worker.store.device
    assert device is not None and (device.number, device.generation) == (DEVICE, GENERATION)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BackendError("rbd: no such pool"), "rbd: no such pool"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (KeyError("a fault of ours"), "KeyError: 'a fault of ours'"),
    ],
    ids=["backend", "system", "fault"],
)
def test_a_store_that_cannot_be_had_is_told_with_its_reason(
    worker: Worker, error: Exception, reason: str
) -> None:
    worker.store.error = error
    worker.store.may_answer.set()
    worker.connect()
    worker.hear()
    [(owner, told)] = worker.told
    assert owner == "" and reason in told


def test_a_second_order_to_connect_is_refused(worker: Worker) -> None:
    worker.connect()
    again: list[tuple[str, str]] = []
    worker.engine.connect(lambda owner, reason: again.append((owner, reason)), worker.grown.append)
    assert again == [("", "this worker connects already")]


@pytest.mark.parametrize("loss", [StoreTaken("taken"), BackendError("shorter")])
def test_a_store_that_is_lost_is_told_on_the_loops_thread(worker: Worker, loss: BackendError) -> None:
    worker.store.may_answer.set()
    worker.connect()
    worker.hear()
    worker.engine.serve()
    assert worker.store.alarm in worker.ring.watched.values()
    worker.store.loss = loss
    assert worker.engine.turn(0) is False
    with pytest.raises(type(loss), match=str(loss)):
        worker.engine.turn(_ALARM)


def test_the_lock_is_given_back_once_it_has_served(worker: Worker) -> None:
    worker.engine.leave()
    assert worker.store.closed == 0, "it has no connection"
    worker.store.may_answer.set()
    worker.connect()
    worker.hear()
    worker.engine.serve()
    worker.engine.leave()
    assert worker.store.closed == 1


BIGGER_BYTES = 2 * 256 * SECTOR_BYTES


def test_a_store_that_has_grown_by_itself_is_served_to_its_end_before_the_supervisor_is_told(
    worker: Worker,
) -> None:
    device = worker.connected()
    worker.engine.serve()
    assert worker.discard(0, 256).result == -errno.EINVAL, "beyond the end"
    device.resized(BIGGER_BYTES)
    assert worker.grown == [], "told on the loop's thread"
    worker.hear()
    assert worker.grown == [Grown(size_bytes=BIGGER_BYTES)] and device.size_bytes == BIGGER_BYTES
    assert worker.discard(1, 256).result == 0
    assert worker.told == [(OWNER, "")], "the outcome of the connection is told once"


def test_growth_before_the_store_is_served_is_told_when_it_is(worker: Worker) -> None:
    device = worker.connected()
    device.resized(BIGGER_BYTES)
    worker.hear()
    assert worker.grown == []
    worker.engine.serve()
    assert worker.grown == [Grown(size_bytes=BIGGER_BYTES)]
    assert worker.discard(0, 256).result == 0


def test_the_store_grows_when_it_is_asked_to_and_says_why_if_it_does_not(worker: Worker) -> None:
    device = worker.connected()
    worker.engine.grow(BIGGER_BYTES)
    assert [each.reason for each in worker.grown if isinstance(each, Resized)] == [
        "the worker does not serve its store yet: try again"
    ]
    worker.engine.serve()
    worker.grown.clear()
    worker.store.refusal = OSError(errno.ENOSPC, "No space left on device")
    worker.engine.grow(BIGGER_BYTES)
    worker.hear()
    [refused] = worker.grown
    assert isinstance(refused, Resized) and "No space left" in refused.reason
    assert device.size_bytes < BIGGER_BYTES and worker.discard(0, 256).result == -errno.EINVAL
    worker.grown.clear()
    worker.store.refusal = None
    worker.engine.grow(BIGGER_BYTES)
    worker.hear()
    assert worker.grown == [Resized(size_bytes=BIGGER_BYTES)] and worker.store.grown_to == [BIGGER_BYTES]
    assert worker.discard(1, 256).result == 0


def test_a_store_that_still_grows_at_the_end_is_not_closed_under_the_thread_that_grows_it(
    worker: Worker,
) -> None:
    worker.connected()
    worker.engine.serve()
    worker.store.may_grow.clear()
    worker.engine.grow(BIGGER_BYTES)
    worker.engine.leave()
    assert worker.store.closed == 0
    worker.store.may_grow.set()
    worker.hear()
    worker.thread_ends()
    worker.engine.leave()
    assert worker.store.closed == 1


def test_a_store_that_grows_after_the_worker_has_closed_it_rings_no_bell(worker: Worker) -> None:
    device = worker.connected()
    bell = next(iter(worker.ring.watched.values()))
    worker.engine.close()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    assert other == bell, "the number is given again"
    device.resized(BIGGER_BYTES)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(other)
    os.close(other)
    worker.engine = EngineConnected(worker.spec, "vol", worker.queue, worker.pool)
