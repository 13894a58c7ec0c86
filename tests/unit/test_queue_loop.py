"""A worker's loop with everything real but the kernel's ring: backends that come and hang up, memory that changes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from support.loop_bench import WAIT_S, Bench, NoRing, bench_in
from ublkpool.ublk import queue as core
from ublkpool.workers import messages, queue_loop
from ublkpool.workers.backend_link import FRAME_BYTES_MAX


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(queue_loop, "Ring", NoRing)
    monkeypatch.setattr("ublkpool.ublk.queue.lock_memory", lambda: None)
    with bench_in(tmp_path) as made:
        yield made


def test_a_hang_up_is_told_and_the_next_backend_is_served(bench: Bench) -> None:
    bench.serve().send(b"x" * (FRAME_BYTES_MAX + 1))
    assert bench.news() == messages.HungUp()
    bench.lose()
    bench.serve()
    assert bench.count("hangups") == 1 and bench.count("violations") == 0


def test_nonsense_is_told_as_such(bench: Bench) -> None:
    bench.serve().send(b"nonsense")
    said = bench.news()
    assert isinstance(said, messages.Cut) and "whole descriptors" in said.reason


def test_a_worker_takes_other_memory_for_its_pool_between_two_backends(bench: Bench) -> None:
    size_bytes = bench.arena.geometry.total_bytes
    bench.serve()
    bench.lose()
    fresh = core.sealed_memory(size_bytes, "fresh")
    inode = os.fstat(fresh).st_ino
    messages.send(bench.supervisor, messages.NewPool(), fresh)
    os.close(fresh)
    assert bench.news() == messages.PoolChanged()
    assert (
        f" {inode} " in Path("/proc/self/maps").read_text() and os.fstat(bench.arena.data_fd).st_ino == inode
    )
    bench.serve()


@pytest.mark.parametrize("attached", [True, False])
def test_a_worker_says_why_it_cannot_take_other_memory(bench: Bench, attached: bool) -> None:
    if attached:
        bench.serve()
    empty = os.memfd_create("empty")
    messages.send(bench.supervisor, messages.NewPool(), empty)
    os.close(empty)
    said = bench.news()
    assert isinstance(said, messages.PoolChanged) and said.reason
    if not attached:
        bench.serve()


def test_another_user_does_not_get_in(bench: Bench) -> None:
    bench.expect(os.getuid() + 1)
    backend = bench.connect()
    monitor = backend.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    assert monitor.poll(1000 * WAIT_S) or bench.count("strangers")
    backend.disable_monitor()
    monitor.close()
    bench.lose()
    bench.serve()


def test_a_worker_is_on_its_cpu_before_it_touches_memory_of_its_own_and_zeromq_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("with one CPU everything is on it")
    cpu, honest, seen = max(allowed), core.map_private, []

    def map_private(size_bytes: int) -> object:
        seen.append(os.sched_getaffinity(0))
        return honest(size_bytes)

    monkeypatch.setattr(queue_loop, "Ring", NoRing)
    monkeypatch.setattr(core, "map_private", map_private)
    tasks = Path("/proc/self/task")
    before = set(tasks.iterdir())
    with bench_in(tmp_path, cpu) as made:
        made.serve()
        started = {int(each.name) for each in set(tasks.iterdir()) - before}
        where = [os.sched_getaffinity(each) for each in started]
    # The worker's own thread, and those of its context and of the bench's.
    assert seen == [{cpu}] and where.count({cpu}) == 1 and len(where) == 5
    assert all(each in ({cpu}, allowed) for each in where)
