"""Prepared devices: an add takes one, a killed daemon's are removed, a killed worker's is replaced."""

import json
import os
import signal
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest

from support.vm.daemon import Daemon, eventually, nodes
from support.vm.process import read_block, write_block
from support.vm.recovery import kill_worker, seeded, wait_for_epoch
from ublkpool.daemon.status import DeviceStatus

pytestmark = pytest.mark.one_kernel("6.12")
KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB
INSIDE = "[prepare]\ncount = 2\nmax_io = '256K'\n"
BESIDE = "[prepare]\ncount = 1\nisolation = 'process'\nqueues = 2\n"
BASE = os.urandom(8 * MIB)


def prepared(daemon: Daemon) -> dict[int, int]:
    """The prepared devices on record that have workers: each device number with its one worker's pid."""
    found = {}
    for path in (daemon.run_dir / "devices").glob("_prepared.*.json"):
        record = json.loads(path.read_bytes())
        for worker in record.get("workers", ()):
            found[record["device_number"]] = worker["process"]["pid"]
    return found


def are_ready(daemon: Daemon) -> bool:
    status = daemon.client.daemon()
    return status.prepared == status.prepared_wanted > 0


def added(daemon: Daemon, kind: str, options: Mapping[str, object], **shape: Any) -> DeviceStatus:
    """A device that is made of a prepared one."""
    eventually(partial(are_ready, daemon), "devices are prepared")
    before = prepared(daemon)
    status = daemon.add(f"of-{kind}", kind, options, **shape)
    assert status.id is not None and before[status.id] in {each.pid for each in status.workers}
    return status


def written(status: DeviceStatus) -> bytes:
    """Write to the device, and read it back."""
    assert status.path is not None
    data = os.urandom(BLOCK)
    assert write_block(status.path, MIB, data) == 0
    assert read_block(status.path, MIB, BLOCK) == data
    return data


def test_devices_are_made_of_prepared_ones_and_recovered_as_others_are() -> None:
    daemon = Daemon(INSIDE, name="inside")
    shape = {"isolation": "none", "max_io_bytes": 256 * KIB}
    daemon.path("base").write_bytes(BASE)
    with daemon.life(), seeded() as rng:
        cow = added(daemon, "cow", {"base": daemon.path("base"), "overlay": daemon.path("overlay")}, **shape)
        assert cow.path is not None
        assert read_block(cow.path, 0, BLOCK) == BASE[:BLOCK]
        data = written(cow)
        memory = added(daemon, "memory", {"size": "8M"}, **shape)
        written(memory)
        daemon.delete(memory.name)
        kill_worker(daemon, cow.name, rng)
        wait_for_epoch(daemon, cow.name, 2)
        assert read_block(cow.path, MIB, BLOCK) == data
        _die_while_prepared(daemon, cow)
        assert read_block(cow.path, MIB, BLOCK) == data
        _lose_a_worker(daemon)
        daemon.delete(cow.name)
    assert daemon.forbidden() == []


def test_a_backends_process_is_introduced_to_prepared_workers() -> None:
    daemon = Daemon(BESIDE, name="beside")
    with daemon.life(), seeded() as rng:
        status = added(daemon, "file", {"path": daemon.path("image"), "size": "8M"}, queues=2, rings=True)
        data = written(status)
        kill_worker(daemon, status.name, rng)
        wait_for_epoch(daemon, status.name, 2)
        assert status.path is not None and read_block(status.path, MIB, BLOCK) == data
        daemon.delete(status.name)


def _die_while_prepared(daemon: Daemon, device: DeviceStatus) -> None:
    """The next daemon goes on with the device, and its prepared ones are others."""
    eventually(partial(are_ready, daemon), "devices are prepared")
    before = prepared(daemon)
    daemon.crash()
    daemon.start()
    assert daemon.status(device.name).epoch == 2
    eventually(partial(are_ready, daemon), "the next daemon has prepared two devices")
    assert not set(prepared(daemon).values()) & set(before.values())
    assert len({each for each in nodes() - daemon.nodes_before if each.startswith("ublkc")}) == 3


def _lose_a_worker(daemon: Daemon) -> None:
    before = prepared(daemon)
    number, pid = min(before.items())
    os.kill(pid, signal.SIGKILL)
    eventually(
        lambda: are_ready(daemon) and pid not in prepared(daemon).values(), f"device {number} is replaced"
    )
