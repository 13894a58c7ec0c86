"""A worker's hold ends with the supervisor that began it, unless that has put on record that the device is drained."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from support.fakes.loop_rig import LoopRig, NoRing, eventually, loop_rig_in
from support.fakes.queue_desk import Desk
from ublkpool.bufpool.wire import Kind, Op, iter_frame
from ublkpool.ublk.queue import WATCH_SHIFT, IoUring, Queue
from ublkpool.workers import messages, queue_loop
from ublkpool.workers.hold_gate import HoldGate
from ublkpool.workers.queue_loop import _WATCH_GATE
from ublkpool.workers.record_gate import RecordGate


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopRig]:
    monkeypatch.setattr(queue_loop, "IoUring", NoRing)
    with loop_rig_in(tmp_path) as rig:
        yield rig


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the core was told: to hold, or to let go."""
    heard: list[bool] = []
    honest = Queue.hold

    def hold(queue: Queue, on: bool) -> None:
        honest(queue, on)
        heard.append(on)

    monkeypatch.setattr(Queue, "hold", hold)
    return heard


def held(rig: LoopRig, gate: RecordGate) -> None:
    messages.send(rig.supervisor, messages.Hold(True, id=1), gate.reader)
    assert rig.news() == messages.Holding(1)


def has_let_go(rig: LoopRig) -> bool:
    messages.send(rig.supervisor, messages.Report(id=9))
    while not isinstance(said := rig.news(), messages.Standing):
        assert isinstance(said, messages.Quiet)
    assert said.knows_gate
    return said.has_let_go


def test_a_worker_lets_go_when_the_process_that_has_the_gate_is_killed(
    rig: LoopRig, told: list[bool]
) -> None:
    gate = RecordGate()
    with subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.pause()"], pass_fds=[gate._writer]
    ) as daemon:
        held(rig, gate)
        gate.close()
        assert told == [True]
        daemon.send_signal(signal.SIGKILL)
    eventually(lambda: told == [True, False], "the worker has let go")
    assert has_let_go(rig)


def test_a_worker_holds_on_without_its_supervisor_once_the_gate_was_open(
    rig: LoopRig, told: list[bool]
) -> None:
    gate = RecordGate()
    held(rig, gate)
    gate.open(1)
    assert not has_let_go(rig)
    assert told == [True]


def test_a_worker_whose_next_supervisor_asks_first_lets_go_before_it_answers(
    rig: LoopRig, told: list[bool]
) -> None:
    gate = RecordGate()
    held(rig, gate)
    assert has_let_go(rig), "the earlier supervisor cannot open it any more"
    assert told == [True, False]
    gate.close()


@pytest.mark.parametrize("on", [True, False])
def test_the_next_word_of_the_supervisor_takes_the_place_of_the_gate(
    rig: LoopRig, told: list[bool], on: bool
) -> None:
    gate = RecordGate()
    held(rig, gate)
    messages.send(rig.supervisor, messages.Hold(on, id=2))
    while rig.news() != messages.Holding(2):
        pass
    gate.close()
    assert not has_let_go(rig) and told == [True, on]


def test_requests_of_a_worker_that_let_go_reach_its_backend(rig: LoopRig, told: list[bool]) -> None:
    """The FLUSH of a held queue is not sent once it is let go."""
    backend = rig.serve()
    gate = RecordGate()
    held(rig, gate)
    assert rig.news() == messages.Quiet()
    messages.send(rig.supervisor, messages.FlushBackend(id=3))
    assert rig.news() == messages.Flushing(True, 3)
    (flush,) = iter_frame(backend.recv())
    assert flush.op == Op.FLUSH
    gate.close()
    eventually(lambda: told == [True, False], "the worker has let go")
    backend.send(flush._replace(kind=Kind.DONE, result=0).pack())
    assert rig.news() == messages.Flushed(0)
    assert has_let_go(rig)


class Watched:
    """What a `HoldGate` asked for."""

    def __init__(self) -> None:
        self.watched: list[int] = []
        self.let_go = 0
        self.gate = HoldGate(self.watched.append, self._let_go)

    def _let_go(self) -> None:
        self.let_go += 1


def _reader(gate: RecordGate) -> int:
    return os.dup(gate.reader)


def test_all_workers_pass_an_open_gate_and_none_passes_one_that_has_ended() -> None:
    for opens in (True, False):
        gate, workers = RecordGate(), [Watched() for _ in range(3)]
        for each in workers:
            each.gate.begin(_reader(gate))
            each.gate.look()
            assert each.let_go == 0, "it waits"
        gate.open(3) if opens else gate.close()
        for each in workers:
            each.gate.look()
            each.gate.look()
            assert (each.let_go, each.gate.has_let_go) == (not opens, not opens)
            assert each.watched[-1] == -1


def test_a_gate_keeps_no_descriptor() -> None:
    gate, worker = RecordGate(), Watched()
    for _ in range(2):
        worker.gate.begin(_reader(gate))
    worker.gate.begin(None)
    gate.close()
    readers = {each for each in worker.watched if each >= 0}
    assert readers and all(_is_closed(each) for each in readers)
    assert worker.let_go == 0 and not worker.gate.has_let_go


def _is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


def test_a_worker_that_is_forked_during_a_drain_holds_until_the_gate_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[bool]
) -> None:
    gate = RecordGate()
    honest, inherited = LoopRig._spec, _reader(gate)

    def spec(rig: LoopRig, directory: Path) -> queue_loop.WorkerSpec:
        return msgspec.structs.replace(honest(rig, directory), hold_gate=inherited)

    monkeypatch.setattr(LoopRig, "_spec", spec)
    monkeypatch.setattr(queue_loop, "IoUring", NoRing)
    with loop_rig_in(tmp_path) as rig:
        gate.close()
        eventually(lambda: told == [False], "the worker has let go")
        assert has_let_go(rig)


@pytest.mark.parametrize("opens", [True, False])
def test_an_io_uring_wakes_its_worker_for_the_gate(opens: bool) -> None:
    desk, gate = Desk(), RecordGate()
    ring = IoUring(desk.queue, -1)
    decided: list[bool] = []
    hold = HoldGate(lambda fd: ring.watch(_WATCH_GATE, fd), lambda: decided.append(False))
    hold.begin(_reader(gate))
    bit = 1 << WATCH_SHIFT + _WATCH_GATE
    assert not ring.run(0) & bit
    gate.open(1) if opens else gate.close()
    while not ring.run(1000) & bit:
        pass
    hold.look()
    assert decided == ([] if opens else [False])
    ring.close()
