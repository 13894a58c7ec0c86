"""A worker's loop with everything real but the kernel's ring: backends that come and hang up, memory that changes."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.fakes.loop_rig import LoopRig, NoRing, eventually, loop_rig_in
from ublkpool.bufpool.wire import Grown, Kind, Op, Resized, iter_frame
from ublkpool.ublk import mappings
from ublkpool.ublk.queue import Attention, Queue
from ublkpool.workers import messages, queue_loop
from ublkpool.workers.backend_doors import BackendDoors
from ublkpool.workers.backend_link import FRAME_BYTES_MAX


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopRig]:
    monkeypatch.setattr(queue_loop, "IoUring", NoRing)
    monkeypatch.setattr("ublkpool.ublk.process_calls.lock_memory", lambda: None)
    with loop_rig_in(tmp_path) as made:
        yield made


def test_a_hang_up_is_reported_and_the_next_backend_is_served(rig: LoopRig) -> None:
    rig.serve().send(b"x" * (FRAME_BYTES_MAX + 1))
    assert rig.news() == messages.HungUp()
    rig.lose()
    rig.serve()
    assert rig.count("hangups") == 1 and rig.count("violations") == 0


def test_a_protocol_violation_is_reported_with_its_reason(rig: LoopRig) -> None:
    rig.serve().send(b"nonsense")
    said = rig.news()
    assert isinstance(said, messages.Cut) and "whole descriptors" in said.reason


def test_a_worker_changes_its_pool_memory_between_two_backends(rig: LoopRig) -> None:
    size_bytes = rig.arena.geometry.total_bytes
    rig.serve()
    rig.lose()
    fresh = mappings.sealed_memory(size_bytes, "fresh")
    inode = os.fstat(fresh).st_ino
    messages.send(rig.supervisor, messages.NewPool(), fresh)
    os.close(fresh)
    assert rig.news() == messages.PoolChanged()
    assert f" {inode} " in Path("/proc/self/maps").read_text() and os.fstat(rig.arena.data_fd).st_ino == inode
    rig.serve()


@pytest.mark.parametrize("attached", [True, False])
def test_a_worker_reports_why_it_cannot_change_its_pool_memory(rig: LoopRig, attached: bool) -> None:
    if attached:
        rig.serve()
    empty = os.memfd_create("empty")
    messages.send(rig.supervisor, messages.NewPool(), empty)
    os.close(empty)
    said = rig.news()
    assert isinstance(said, messages.PoolChanged) and said.reason
    if not attached:
        rig.serve()


def test_a_worker_whose_socket_cannot_be_made_reports_it_and_goes_on(rig: LoopRig, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    away = tmp_path.with_name(f"{tmp_path.name}-away")
    tmp_path.rename(away)
    messages.send(rig.supervisor, messages.Expect("ab" * 16, 0, 0, False, os.getuid()))
    said = rig.news()
    assert isinstance(said, messages.Expecting) and str(tmp_path) in said.reason
    away.rename(tmp_path)
    rig.lose()
    rig.serve()


def test_another_user_does_not_get_in(rig: LoopRig) -> None:
    rig.expect(os.getuid() + 1)
    rig.connect()
    eventually(lambda: rig.count("strangers") > 0, "it is refused")
    rig.lose()
    rig.serve()


def test_a_worker_is_on_its_cpu_before_it_touches_memory_of_its_own_and_zeromq_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("with one CPU everything is on it")
    cpu, honest, seen = max(allowed), mappings.map_sink, []

    def map_sink(size_bytes: int) -> object:
        seen.append(os.sched_getaffinity(0))
        return honest(size_bytes)

    monkeypatch.setattr(queue_loop, "IoUring", NoRing)
    monkeypatch.setattr(mappings, "map_sink", map_sink)
    tasks = Path("/proc/self/task")
    before = set(tasks.iterdir())
    with loop_rig_in(tmp_path, cpu) as made:
        made.serve()
        started = {int(each.name) for each in set(tasks.iterdir()) - before}
        where = [os.sched_getaffinity(each) for each in started]
    # The worker's own thread, and those of its context and of the rig's.
    assert seen == [{cpu}] and where.count({cpu}) == 1 and len(where) == 5
    assert all(each in ({cpu}, allowed) for each in where)


def test_a_worker_uses_its_new_deadlines_before_it_answers(
    rig: LoopRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[object, ...]] = []
    monkeypatch.setattr(Queue, "set_deadlines", lambda _queue, *deadlines: used.append(deadlines))
    messages.send(rig.supervisor, messages.SetDeadlines(1000, True, 20, id=7))
    assert rig.news() == messages.DeadlinesSet(7)
    assert used == [(1000, True, 20)]
    messages.send(rig.supervisor, messages.Report(id=8))
    said = rig.news()
    assert isinstance(said, messages.Standing) and said.knows_deadlines


def test_a_store_that_grows_is_told_also_to_the_next_supervisor(
    rig: LoopRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    hears: list[Callable[[Resized | Grown], None]] = []

    def grow(_doors: BackendDoors, size_bytes: int) -> None:
        hears[0](Resized(size_bytes=4 * size_bytes, reason="full"))
        hears[0](Grown(size_bytes=2 * size_bytes))
        hears[0](Resized(size_bytes=3 * size_bytes))

    monkeypatch.setattr(BackendDoors, "connect", lambda _doors, _done, grown: hears.append(grown))
    monkeypatch.setattr(BackendDoors, "grow", grow)
    messages.send(rig.supervisor, messages.Connect())
    messages.send(rig.supervisor, messages.Grow(100))
    assert [rig.news(), rig.news(), rig.news()] == [
        messages.Grown(400, is_asked=True, reason="full"),
        messages.Grown(200),
        messages.Grown(300, is_asked=True),
    ]
    messages.send(rig.supervisor, messages.Report())
    said = rig.news()
    assert isinstance(said, messages.Standing) and said.knows_grow and said.grown_bytes == 300


def test_the_flush_of_an_interrupted_drain_ends_before_the_queue_is_quiet_for_the_next_drain(
    rig: LoopRig,
) -> None:
    backend = rig.serve()
    messages.send(rig.supervisor, messages.Hold(True))
    assert [rig.news(), rig.news()] == [messages.Holding(), messages.Quiet()]
    messages.send(rig.supervisor, messages.FlushBackend())
    assert rig.news() == messages.Flushing(True)
    (flush,) = iter_frame(backend.recv())
    assert flush.op == Op.FLUSH
    for on in (False, True):
        messages.send(rig.supervisor, messages.Hold(on))
        assert rig.news() == messages.Holding()
    backend.send(flush._replace(kind=Kind.DONE, result=0).pack())
    assert [rig.news(), rig.news()] == [messages.Flushed(0), messages.Quiet()]


def test_a_queue_that_was_let_go_in_the_moment_in_which_it_was_quiet_is_not_reported_quiet(
    rig: LoopRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = NoRing.run

    def run(ring: NoRing, timeout_ms: int) -> int:
        if ring._queue.attention() & Attention.QUIET:
            messages.send(rig.supervisor, messages.Hold(False, id=2))
        return honest(ring, timeout_ms)

    rig.serve()
    monkeypatch.setattr(NoRing, "run", run)
    messages.send(rig.supervisor, messages.Hold(True, id=1))
    assert [rig.news(), rig.news()] == [messages.Holding(1), messages.Holding(2)]
    messages.send(rig.supervisor, messages.Report())
    assert isinstance(rig.news(), messages.Standing)
