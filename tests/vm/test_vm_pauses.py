"""Processes stopped for longer than every deadline: no client sees an error, no healthy backend is ended."""

import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from support.vm.cgroup import MemoryGroup
from support.vm.daemon import Daemon, marked_processes, total
from support.vm.recovery import Load
from ublkpool.daemon.status import DeviceStatus

IO_TIMEOUT_S = 5.0
"""Without a pause no request may take as long, even in a guest on a busy machine."""
PAUSE_S = 1.5 * IO_TIMEOUT_S


def _add(daemon: Daemon, name: str, rings: bool) -> DeviceStatus:
    """A disk that fails an overdue request and kills its backend."""
    return daemon.add(
        name,
        "memory",
        {"size": "32M", "keep": "off"},
        queues=2,
        rings=rings,
        io_timeout_s=IO_TIMEOUT_S,
        on_timeout="fail",
        absent_timeout_s=IO_TIMEOUT_S,
        on_absent="fail",
    )


LINKS = [
    pytest.param(True, id="rings", marks=pytest.mark.one_kernel("7.3")),
    pytest.param(False, id="frames", marks=pytest.mark.one_kernel("6.12")),
]


@pytest.fixture(params=LINKS)
def load(request: pytest.FixtureRequest, daemon: Daemon) -> Iterator[Load]:
    """fio's verified writes to a disk; afterwards no request has failed and the backend is the same."""
    before = _add(daemon, "paused", request.param)
    load = Load(daemon, before)
    try:
        load.goes_on()
        yield load
        load.goes_on()
        load.end()
    finally:
        load.drop()
    stats = daemon.rest("paused")
    after = daemon.status("paused")
    assert (after.backend, after.epoch, after.state) == (before.backend, before.epoch, "live")
    counters = {name: total(stats, name) for name in ("errors", "timeouts", "violations", "replays")}
    assert not any(counters.values()), counters
    daemon.delete("paused")


def test_a_worker_that_is_stopped_and_continued_costs_nothing(daemon: Daemon, load: Load) -> None:
    for worker in daemon.status("paused").workers:
        with daemon.stopped(worker.pid):
            # The pause itself is the test.
            time.sleep(PAUSE_S)
        load.goes_on()


def test_a_whole_service_that_is_frozen_and_thawed_costs_nothing(daemon: Daemon, load: Load) -> None:
    group = MemoryGroup("ublkpool-frozen")
    members = [daemon.pid, *marked_processes(str(daemon.run_dir))]
    try:
        for pid in members:
            # A process that makes one call may have ended.
            with suppress(ProcessLookupError):
                group.enter(pid)
        with group.frozen():
            time.sleep(PAUSE_S)
        load.goes_on()
    finally:
        group.leave()
        group.close()
