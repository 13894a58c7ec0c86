"""Busy polling before sleep: its length, and that both ends of a ring poll."""

import ctypes
import os
import subprocess
import threading
from pathlib import Path

import pytest

from support.fakes.queue_desk import Desk
from support.fakes.ring_peer import SLEEPING, TAIL, TO_BACKEND, TO_WORKER, RingMemory
from support.fakes.worker import DEADLINE_S, FakeWorker, serving
from ublkpool.backends.null import NullBackend, NullOptions
from ublkpool.bufpool.engine.ring_driver import DriverStatistics
from ublkpool.bufpool.wire import Kind, Op
from ublkpool.daemon.device.team import SPIN_CPUS_MIN, SPIN_DEFAULT_US, spin_us
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk.queue import Attention, IoUring, LinkState, Port

MOST_NS = 16_000
SKIPS = 64
LONG_US = 1_000_000 * int(DEADLINE_S)
REQUESTS = 50
_CSRC = Path(__file__).resolve().parents[2] / "bufpool" / "wire" / "csrc"
_LIBRARY = """
#include "spin.h"
struct spin s;
void begin(uint64_t most_ns) { spin_begin(&s, most_ns); }
uint64_t budget(void) { return spin_budget_ns(&s); }
void over(int found) { spin_over(&s, found); }
"""


@pytest.fixture(scope="module")
def spin(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    directory = tmp_path_factory.mktemp("spin")
    source, library = directory / "spin.c", directory / "spin.so"
    source.write_text(_LIBRARY)
    subprocess.run(["gcc", "-shared", "-fPIC", "-I", _CSRC, "-o", library, source], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.begin.argtypes, loaded.budget.restype = [ctypes.c_uint64], ctypes.c_uint64
    return loaded


def test_each_poll_that_finds_nothing_halves_the_next(spin: ctypes.CDLL) -> None:
    spin.begin(MOST_NS)
    lasted = []
    for _ in range(5):
        lasted.append(spin.budget())
        spin.over(False)
    assert lasted == [16_000, 8_000, 4_000, 2_000, 0]


def test_polling_is_tried_again_at_intervals_and_resumes_when_it_finds_work(spin: ctypes.CDLL) -> None:
    spin.begin(MOST_NS)
    while spin.budget():
        spin.over(False)
    budgets = [spin.budget() for _ in range(SKIPS)]
    assert [each for each in budgets if each] == [MOST_NS]
    spin.over(True)
    assert spin.budget() == MOST_NS


def test_spin_0_never_polls(spin: ctypes.CDLL) -> None:
    spin.begin(0)
    assert not any(spin.budget() for _ in range(3 * SKIPS))


def test_on_few_cpus_polling_is_off_unless_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, expected in ((SPIN_CPUS_MIN - 1, 0), (SPIN_CPUS_MIN, SPIN_DEFAULT_US)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)))
        assert spin_us(DeviceConfig(name="disk")) == expected
        assert spin_us(DeviceConfig(name="disk", spin_us=7)) == 7
        assert spin_us(DeviceConfig(name="disk", spin_us=0)) == 0


def test_a_polling_backend_needs_no_system_call_for_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[DriverStatistics]
) -> None:
    monkeypatch.setattr(FakeWorker, "transport", "ring")
    with (
        FakeWorker(tmp_path, spin_us=LONG_US) as worker,
        serving(worker, NullBackend(NullOptions(size=1 << 30))),
    ):
        rings = worker.rings()
        assert worker.do(Op.FLUSH) == 0, "from here on it is in its loop"
        for _ in range(REQUESTS):
            answered = rings.get(TO_WORKER + TAIL)
            worker.send(0, [worker.describe(Kind.REQUEST, Op.FLUSH)])
            while rings.get(TO_WORKER + TAIL) == answered:
                assert not rings.get(TO_BACKEND + SLEEPING)
            assert worker.receive().result == 0
    assert counted[0].calls < REQUESTS / 2 < counted[0].turns


def _serve(desk: Desk, port: Port) -> None:
    ring = IoUring(desk.queue, -1, LONG_US)
    bells = [os.eventfd(0) for _ in range(2)]
    ring.use_port(port, *bells)
    while desk.queue.link is LinkState.UP:
        ring.run(int(DEADLINE_S * 1000))
    ring.use_port(None)
    ring.close()
    for each in bells:
        os.close(each)


def test_a_polling_worker_needs_neither_doorbell_nor_system_call() -> None:
    desk = Desk()
    statistics = desk.side.statistics
    desk.other(0, Op.FLUSH)
    (request,) = desk.send()
    desk.queue.clear(Attention.LINK)
    assert not desk.queue.attention()
    port = Port(desk.rig.plan.depth)
    peer = RingMemory(port.memory_fd, port.entries)
    thread = threading.Thread(target=_serve, args=(desk, port))
    thread.start()
    for number in range(REQUESTS):
        peer.put(request.answer(Kind.DONE)._replace(epoch=0).pack())
        while statistics.stale_answers <= number and thread.is_alive():
            assert not peer.index(TO_WORKER, SLEEPING)
    entered = statistics.enters
    peer.put(b"\xff" * 64)
    thread.join()
    assert desk.queue.link is LinkState.CUT and entered < REQUESTS / 2
    peer.memory.close()
    port.close()
