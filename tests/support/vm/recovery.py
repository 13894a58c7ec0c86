"""Kills the daemon's processes while fio writes and verifies.

A seed, which a failure names, decides what is killed and when; UBLKPOOL_SEED repeats it.
"""

import os
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from support.vm.daemon import DEADLINE_S, Daemon, eventually, total
from support.vm.fio import FioResult, drop_fio, finish_fio, start_fio
from ublkpool.daemon.status import DeviceStatus

LOAD_BYTES = 16 << 20
IODEPTH = 16
COW_BASE_BYTES = 8 << 20


class Seeded(random.Random):
    """A random generator and its seed, to repeat a run."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.chosen = seed


@contextmanager
def seeded() -> Iterator[Seeded]:
    """A random generator with a printed seed, to repeat a run."""
    seed = int(os.environ.get("UBLKPOOL_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
    try:
        yield Seeded(seed)
    except BaseException as error:
        error.add_note(f"UBLKPOOL_SEED={seed} chooses the same again")
        raise


def kill(pid: int) -> bool:
    """Kill a process; returns whether it existed."""
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return True
    return False


class Load:
    """fio writing to a device and verifying what it wrote, until it is told to end; `options` go to fio."""

    def __init__(self, daemon: Daemon, status: DeviceStatus, **options: Any) -> None:
        assert status.path is not None
        self._daemon, self.name = daemon, status.name
        self.result: FioResult | None = None
        settings: dict[str, Any] = {"size": LOAD_BYTES, "iodepth": IODEPTH, "verify_backlog": 32, **options}
        self._fio = start_fio(status.path, time_based=1, runtime=3600, **settings)

    def goes_on(self, count: int = 1) -> None:
        """Wait until so many further requests have been answered.  Raises `AssertionError` if fio has ended."""
        goal = self._answered() + count
        eventually(lambda: self._answered() >= goal or not self._runs(), f"I/O goes on on {self.name}")
        assert self._runs(), finish_fio(self._fio, may_fail=True).text

    def end(self) -> None:
        """End fio and check its result.  Raises `AssertionError` if a request failed or data differed."""
        self._fio.send_signal(signal.SIGINT)
        result = finish_fio(self._fio, may_fail=True)
        self.result = result
        assert result.errors == 0 and result.written_bytes and result.read_bytes, result.text

    def drop(self) -> None:
        """End fio, whatever its state."""
        drop_fio(self._fio)

    def _runs(self) -> bool:
        return self._fio.poll() is None

    def _answered(self) -> int:
        return total(self._daemon.stats(self.name), "commits")


def add_disk(
    daemon: Daemon, kind: str, placement: str, queues: int, isolation: str = "process"
) -> DeviceStatus:
    """A disk with a backend of this kind, which the daemon runs."""
    name = f"{kind}-{placement}" + ("-inside" if isolation == "none" else "")
    options = {"size": "32M", "placement": placement}
    if kind == "file":
        options |= {"path": str(daemon.path(f"{name}.img")), "segment": "16M"}
    if kind == "cow":
        base, overlay = daemon.path(f"{name}.base"), daemon.path(f"{name}.cow")
        base.write_bytes(random.Random(1).randbytes(COW_BASE_BYTES))
        options |= {"base": str(base), "overlay": str(overlay)}
    return daemon.add(name, kind, options, queues=queues, placement=placement, isolation=isolation)


@contextmanager
def loaded(daemon: Daemon, devices: Sequence[DeviceStatus]) -> Iterator[list[Load]]:
    """Load these devices for the length of a block; no load may see an error, no device may lose a buffer."""
    loads = [Load(daemon, each) for each in devices]
    try:
        for load in loads:
            load.goes_on()
        yield loads
        for load in loads:
            load.goes_on()
        for load in loads:
            load.end()
    finally:
        for load in loads:
            load.drop()
    for each in devices:
        assert total(daemon.rest(each.name), "errors") == 0
        daemon.delete(each.name)


def kill_worker(daemon: Daemon, name: str, rng: random.Random) -> DeviceStatus:
    """Kill a worker of a device; returns the device's status just before."""
    status = daemon.status(name)
    kill(rng.choice(status.workers).pid)
    return status


def wait_for_epoch(daemon: Daemon, name: str, epoch: int, deadline_s: float = DEADLINE_S) -> DeviceStatus:
    """Wait until the device is live in this epoch or a later one."""

    def recovered() -> bool:
        status = daemon.status(name)
        assert status.state != "failed", status.reason
        return status.state == "live" and status.epoch >= epoch

    eventually(recovered, f"{name} is live in epoch {epoch}", deadline_s)
    return daemon.status(name)


def wait_for_backend(daemon: Daemon, name: str, other_than: int | None) -> None:
    """Wait until another backend serves the device."""

    def attached() -> bool:
        status = daemon.status(name)
        backend = status.backend
        # An engine in the workers has no process of its own.
        return backend.attached and (status.isolation == "none" or backend.pid != other_than)

    eventually(attached, f"{name} has its next backend")


def kill_broker(daemon: Daemon) -> None:
    """Kill the pool broker and wait for the next one."""
    old = daemon.broker_pid
    assert old
    kill(old)
    eventually(lambda: daemon.broker_pid not in (0, old), "another broker")
