"""The daemon or all its processes are killed under I/O; the next daemon in the run directory takes over."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from support.vm.daemon import Daemon, eventually
from support.vm.recovery import kill, kill_broker, loaded, wait_for_backend, wait_for_epoch
from support.vm.rights import expect_no_rights
from ublkpool.ublk import control
from ublkpool.ublk.abi import Feature

MIB = 1 << 20
QUEUES = 2
_SECTORS_WRITTEN = 6
"""The field's index in /sys/block/NAME/stat (Documentation/block/stat.rst)."""


@pytest.fixture(scope="module")
def line_of_daemons() -> Iterator[Daemon]:
    """Daemons that follow each other in one run directory, shared by the tests of this file."""
    with Daemon(name="takeover").life() as daemon:
        yield daemon


@pytest.fixture
def own_daemon(
    line_of_daemons: Daemon, lend: Callable[[Daemon], AbstractContextManager[Daemon]]
) -> Iterator[Daemon]:
    with lend(line_of_daemons):
        yield line_of_daemons


def sectors_written(path: str) -> int:
    return int(Path("/sys/block", Path(path).name, "stat").read_text().split()[_SECTORS_WRITTEN])


def wait_for_writes(path: str) -> None:
    before = sectors_written(path)
    eventually(lambda: sectors_written(path) > before, "I/O goes on while the daemon is dead")


def _leave(daemon: Daemon) -> None:
    daemon.client.stop(leave=True)
    assert daemon.wait_end() == 0


@pytest.mark.one_kernel("7.3")
def test_the_next_daemon_takes_over_without_a_pause_and_recovers_after_all_was_killed(
    own_daemon: Daemon,
) -> None:
    daemon = own_daemon
    status = daemon.add("left", "memory", {"size": "64M"}, queues=QUEUES)
    assert daemon.add("waits").state == "waiting"
    with loaded(daemon, [status]) as (load,):
        # The second daemon deletes devices that it has taken over.
        for end in (Daemon.crash, _leave):
            assert status.path is not None
            broker = daemon.broker_pid
            end(daemon)
            wait_for_writes(status.path)
            daemon.start()
            assert daemon.status("left") == status, "the same workers, backend and epoch"
            assert daemon.broker_pid == broker
            load.goes_on()
            expect_no_rights(daemon, "left")
        assert daemon.status("waits").state == "waiting"
        with daemon.device("other", "null", size_bytes=16 * MIB):
            load.goes_on()

        kill(status.workers[0].pid)
        wait_for_epoch(daemon, "left", 2)
        load.goes_on()
        kill(status.backend.pid or 0)
        wait_for_backend(daemon, "left", status.backend.pid)
        kill_broker(daemon)
        load.goes_on()
        expect_no_rights(daemon, "left")

        daemon.add("gone", "null", size_bytes=16 * MIB, recovery="none")
        daemon.crash_everything()
        daemon.start()
        assert {each.name for each in daemon.client.devices()} == {"left", "waits"}
        assert daemon.status("left").epoch == 3
        load.goes_on()
        expect_no_rights(daemon, "left")
    daemon.client.delete(["waits"])


@pytest.mark.one_kernel("6.12")
def test_an_upgrade_fails_no_request_and_replaces_every_process(own_daemon: Daemon) -> None:
    daemon, said = own_daemon, len(own_daemon.said())
    status = daemon.add("left", "memory", {"size": "64M"}, queues=QUEUES)
    assert status.path is not None
    disk = Path(status.path).stat()
    told = max(each.seq for each in daemon.client.events())
    with loaded(daemon, [status]) as (load,):
        broker = daemon.broker_pid
        daemon.replace("support.vm.newer_daemon")
        after = wait_for_epoch(daemon, "left", 2)
        wait_for_backend(daemon, "left", status.backend.pid)
        eventually(lambda: daemon.broker_pid not in (0, broker), "another broker")
        assert {each.pid for each in after.workers}.isdisjoint(each.pid for each in status.workers)
        load.goes_on()
        expect_no_rights(daemon, "left")
        assert Path(status.path).stat().st_ino == disk.st_ino, "the node has never gone"
    events = list(daemon.client.events(told))
    assert {"broker-replaced", "workers-replaced", "backend-detached"} <= {each.code for each in events}
    # A daemon under a load may have late requests.
    assert [each for each in events if each.severity != "info" and each.code != "request-late"] == []
    if control.get_features() & Feature.QUIESCE:
        assert "QUIESCE" in status.flags
        assert "ending its workers" not in daemon.said()[said:]
