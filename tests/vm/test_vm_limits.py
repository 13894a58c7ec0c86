"""A device's limits on a real driver: never exceeded, over deaths of worker and backend; changed and lifted at once.

The screen of `ublkpool top` shows the device meanwhile.
"""

import os
import time
from functools import partial

import pytest

from support.screen import cell_of, press, text_of
from support.vm.daemon import Daemon, eventually, total
from support.vm.process import Forked, write_block
from support.vm.recovery import Load, kill, seeded, wait_for_backend, wait_for_epoch
from ublkpool.daemon.cli.top.session import Session
from ublkpool.daemon.cli.top.source import Source
from ublkpool.daemon.metrics.usage import Owner
from ublkpool.daemon.status import DeviceStats

pytestmark = pytest.mark.one_kernel("7.3")

IOPS, BYTES_PER_S, BURST_S = 40, 256 << 10, 0.5
LARGE_BYTES = 512 << 10
"""The largest request, which is larger than the burst."""
WRITERS = 6
QUEUES = 2
BATCH_S = 0.004


class Meter:
    """Compares what a device answered since `Meter` was made with what its limits allow in that time."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self._daemon, self._name = daemon, name
        self._started_s = time.monotonic()
        self._before = _answered(daemon.stats(name))

    def check(self) -> None:
        """Raise `AssertionError` if more was answered than the limits allow."""
        requests, moved = (
            now - was
            for now, was in zip(_answered(self._daemon.stats(self._name)), self._before, strict=True)
        )
        # What had passed before the start and was answered afterwards is a batch and a depth of each queue at most.
        for_s = time.monotonic() - self._started_s + BURST_S + QUEUES * BATCH_S
        before = IODEPTH_PASSED
        assert requests <= IOPS * for_s + before, f"{requests} requests in {for_s} s"
        assert moved <= BYTES_PER_S * for_s + before * LARGE_BYTES, f"{moved} bytes in {for_s} s"


IODEPTH_PASSED = 16 + QUEUES
"""Requests that had passed before a measurement began: fio's depth, and one larger than the burst for each queue."""


def _answered(stats: DeviceStats) -> tuple[int, int]:
    """I/Os other than FLUSH, and bytes read and written."""
    ops = [each.requests for each in stats.queues]
    requests = sum(each.read + each.write + each.discard + each.write_zeroes for each in ops)
    return requests, sum(each.bytes.read + each.bytes.write for each in stats.queues)


def test_limits_hold_over_deaths_and_a_change_holds_for_what_waits(daemon: Daemon) -> None:
    status = daemon.add(
        "held",
        "memory",
        {"size": "32M"},
        queues=QUEUES,
        iops_max=IOPS,
        bytes_per_s_max=BYTES_PER_S,
        burst_s=BURST_S,
    )
    assert (status.iops_max, status.bytes_per_s_max, status.burst_s) == (IOPS, BYTES_PER_S, BURST_S)
    meter = Meter(daemon, "held")
    load = Load(daemon, status)
    try:
        eventually(
            lambda: total(daemon.stats("held"), "limited") > IOPS, "requests have waited for the limits"
        )
        meter.check()
        with seeded() as rng:
            _kill_under(daemon, load, rng.randrange(QUEUES))
        meter.check()
        _check_screen(daemon)
        load.goes_on()
        load.end()
        meter.check()
    finally:
        load.drop()
    assert total(daemon.rest("held"), "errors") == 0

    path = status.path or ""
    daemon.client.set("held", {"bytes_per_s_max": "64K", "burst": 0.01})
    writers = _write_at_once(path)
    _wait_for_waiters(daemon)
    daemon.client.set("held", {"iops_max": 0, "bytes_per_s_max": 0})
    assert [each.wait() for each in writers] == [0] * WRITERS
    assert not total(daemon.stats("held"), "limit_waiting") and not daemon.status("held").iops_max

    daemon.client.set("held", {"bytes_per_s_max": "64K"})
    writers = _write_at_once(path)
    _wait_for_waiters(daemon)
    daemon.client.delete(["held"], force=True)
    assert [each.wait() for each in writers] == [0] * WRITERS, "a disk that goes serves what waits"


def _check_screen(daemon: Daemon) -> None:
    """What `ublkpool top` shows, without the library that draws it, whose start takes half a minute in a guest."""
    source, session = Source(daemon.run_dir), Session(str(daemon.run_dir))

    def is_busy() -> bool:
        session.take(source.read("held"))
        # One queue that serves again has a rate while the device still recovers another.
        has_rate = any(cell_of(session, "held", column) not in ("", "0") for column in ("R/S", "W/S"))
        return has_rate and cell_of(session, "held", "STATE") == "live"

    eventually(is_busy, "the screen shows the live device's rate")
    shown = "\n".join(text_of(press(session, "enter"), 120, 60))
    assert "limits   40 requests/s, 256K/s, burst 0.5 s" in shown, shown
    assert "its worker ended: killed by SIGKILL; recovering" in shown, shown
    assert session.model.shares.keys() >= {Owner("supervisor"), Owner("backend", "held")}


def _kill_under(daemon: Daemon, load: Load, queue: int) -> None:
    """Kill a worker, then the backend, while requests wait for the limits."""
    status = daemon.status("held")
    kill(status.workers[queue].pid)
    wait_for_epoch(daemon, "held", status.epoch + 1)
    load.goes_on()
    backend = daemon.status("held").backend.pid
    assert backend and kill(backend)
    wait_for_backend(daemon, "held", backend)
    load.goes_on()


def _write_at_once(path: str) -> list[Forked]:
    """Direct writes of which each needs eight seconds of the limit."""
    return [
        Forked(partial(write_block, path, number * LARGE_BYTES, os.urandom(LARGE_BYTES)))
        for number in range(WRITERS)
    ]


def _wait_for_waiters(daemon: Daemon) -> None:
    def waits() -> bool:
        return total(daemon.stats("held"), "limit_waiting") >= WRITERS // 2

    eventually(waits, "writes wait for the limits")
