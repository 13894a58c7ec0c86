"""The daemon killed, and everything killed, under I/O: the next daemon in the run directory takes the devices over."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.vm_daemon import Daemon, eventually
from support.vm_fio import finish_fio, queue_cpus, start_fio

MIB = 1 << 20
QUEUES = 2
_SECTORS_WRITTEN = 6
"""The place of the count in /sys/block/NAME/stat (Documentation/block/stat.rst)."""


@pytest.fixture
def own_daemon() -> Iterator[Daemon]:
    daemon = Daemon(name="takeover")
    try:
        daemon.start()
        yield daemon
        assert daemon.stop() == 0, daemon.said()
        eventually(lambda: daemon.remains() == [], "nothing is left of the daemon")
    finally:
        daemon.close()


def sectors_written(path: str) -> int:
    return int(Path("/sys/block", Path(path).name, "stat").read_text().split()[_SECTORS_WRITTEN])


def test_a_killed_daemon_costs_its_clients_nothing_and_neither_does_a_killed_everything(
    own_daemon: Daemon,
) -> None:
    daemon = own_daemon
    path = daemon.add("left", "memory", {"size": "64M"}, queues=QUEUES).path
    assert path is not None
    fio = start_fio(path, QUEUES, queue_cpus(path, QUEUES), size=12 * MIB, iodepth=8, bssplit="4k/80:64k/20")
    eventually(lambda: sectors_written(path) > 0, "fio writes")

    daemon.crash()
    before = sectors_written(path)
    eventually(lambda: sectors_written(path) > before, "I/O goes on while the daemon is dead")
    daemon.start()
    adopted = daemon.status("left")
    assert (adopted.path, adopted.state, adopted.epoch) == (path, "live", 2)
    eventually(lambda: daemon.status("left").backend.attached, "the next daemon's backend is there")

    daemon.crash_everything()
    daemon.start()
    assert daemon.status("left").epoch == 3
    result = finish_fio(fio)
    assert result.written_bytes == QUEUES * 12 * MIB
    daemon.delete("left")


def test_what_must_not_be_recovered_is_cleared_away(own_daemon: Daemon) -> None:
    own_daemon.add("gone", "null", size_bytes=16 * MIB, recovery="none")
    own_daemon.crash_everything()
    own_daemon.start()
    assert own_daemon.client.devices() == []
    eventually(lambda: not own_daemon.leftovers(), "node, pool and record are gone")
