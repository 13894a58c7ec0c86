"""Engines inside the workers (isolation none): killed workers and daemons, a store that is away, refusals."""

import os
import subprocess
from functools import partial
from pathlib import Path

import pytest

from support.vm.daemon import Daemon, eventually, marked_processes, total
from support.vm.process import Forked, disk_bytes, read_block, run_command, write_block
from support.vm.recovery import kill_worker, loaded, seeded, wait_for_epoch
from support.vm.stuck import expect_other_devices_served, resume, suspend, suspended_file
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.status import DeviceStatus
from ublkpool.ublk.abi import Feature
from ublkpool.ublk.control import get_features

pytestmark = pytest.mark.one_kernel("7.3")
KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB
ROUNDS = 2
SLOW = """
import time
from pathlib import Path

from ublkpool.bufpool.sdk.backend import Backend, Properties

HERE = Path(__file__).parent


class Slow(Backend):
    parallel = 4

    def open(self, hint):
        self.disk = bytearray(16 << 20)
        return Properties(
            size_bytes=len(self.disk), discard_granularity_bytes=4096, discard_max_bytes=len(self.disk)
        )

    def pread(self, buf, offset):
        buf[:] = self.disk[offset : offset + len(buf)]

    def pwrite(self, buf, offset, fua):
        self.disk[offset : offset + len(buf)] = buf

    def trim(self, offset, length):
        (HERE / "begun").touch()
        while not (HERE / "go").exists():
            time.sleep(0.01)


BACKEND = Slow
"""
SIZE_BYTES, GROWN_BYTES = 32 * MIB, 48 * MIB
COW_BASE = os.urandom(8 * MIB)


def _add_file(daemon: Daemon, name: str, queues: int = 2) -> DeviceStatus:
    options = {"path": daemon.path(f"{name}.img"), "size": "32M"}
    return daemon.add(name, "file", options, queues=queues, isolation="none")


def _add_memory(daemon: Daemon, name: str) -> DeviceStatus:
    return daemon.add(name, "memory", {"size": "32M"}, queues=2, placement="backend", isolation="none")


def _add_cow(daemon: Daemon, name: str) -> DeviceStatus:
    base = daemon.path(f"{name}.base")
    base.write_bytes(COW_BASE)
    options = {"base": base, "overlay": daemon.path(f"{name}.cow"), "size": "32M"}
    return daemon.add(name, "cow", options, isolation="none")


def _backends(daemon: Daemon) -> list[str]:
    return [words for words in marked_processes(str(daemon.run_dir)).values() if " backend " in words]


def _die_twice(daemon: Daemon, devices: list[DeviceStatus], kills: int) -> None:
    """Kill workers of every device under fio, then the daemon, then workers again."""
    names = [each.name for each in devices]
    with seeded() as rng, loaded(daemon, devices) as loads:
        for _ in range(kills):
            for before in [kill_worker(daemon, name, rng) for name in names]:
                wait_for_epoch(daemon, before.name, before.epoch + 1)
            for load in loads:
                load.goes_on()
        daemon.crash()
        daemon.start()
        for load in loads:
            load.goes_on()
        for before in [kill_worker(daemon, name, rng) for name in names]:
            wait_for_epoch(daemon, before.name, before.epoch + 1)
        for load in loads:
            load.goes_on()
        assert _backends(daemon) == []


def test_killed_workers_and_a_killed_daemon_cost_the_client_nothing(daemon: Daemon) -> None:
    file, memory = daemon.together(partial(_add_file, daemon, "file"), partial(_add_memory, daemon, "memory"))
    assert (file.backend.kind, file.backend.pid, file.backend.attached) == ("file", None, True)
    assert (file.isolation, memory.isolation) == ("none", "none")
    _die_twice(daemon, [file, memory], ROUNDS)
    assert daemon.path("file.img").stat().st_size == 32 * MIB


def test_a_killed_worker_and_a_killed_daemon_cost_an_overlay_nothing(daemon: Daemon) -> None:
    _die_twice(daemon, [_add_cow(daemon, "cow")], 1)
    assert daemon.path("cow.base").read_bytes() == COW_BASE


def test_a_store_grows_while_the_workers_serve_it(daemon: Daemon) -> None:
    if not get_features() & Feature.UPDATE_SIZE:
        pytest.skip("this kernel's driver lacks UPDATE_SIZE")
    devices = daemon.together(partial(_add_file, daemon, "grown"), partial(_add_cow, daemon, "larger"))
    data, added = os.urandom(BLOCK), os.urandom(BLOCK)
    for each in devices:
        assert each.path is not None
        assert write_block(each.path, SIZE_BYTES - BLOCK, data) == 0
        assert daemon.client.resize(each.name, GROWN_BYTES).before_bytes == SIZE_BYTES
        assert disk_bytes(each.path) == GROWN_BYTES
        assert write_block(each.path, GROWN_BYTES - BLOCK, added) == 0
        # The workers of the next epoch serve the new size, too, and what was written there.
        kill_worker_of(daemon, each.name)
        wait_for_epoch(daemon, each.name, 2)
        assert read_block(each.path, GROWN_BYTES - BLOCK, BLOCK) == added
        assert read_block(each.path, SIZE_BYTES - BLOCK, 2 * BLOCK) == data + bytes(BLOCK)
        assert total(daemon.rest(each.name), "errors") == 0
    image, aside = daemon.path("grown.img"), daemon.path("aside")
    image.rename(aside)
    image.write_bytes(bytes(MIB))
    with pytest.raises(DaemonError, match=r"^grown: keeps its size: .*the device is served from"):
        daemon.client.resize("grown", 2 * GROWN_BYTES)
    assert image.stat().st_size == MIB
    aside.rename(image)
    for each in devices:
        daemon.delete(each.name)


def test_requests_wait_for_a_store_that_is_away_and_no_other_takes_its_place(daemon: Daemon) -> None:
    status = _add_file(daemon, "away", queues=1)
    assert status.path is not None
    path, data = status.path, os.urandom(BLOCK)
    assert write_block(path, 0, data) == 0
    image, aside = daemon.path("away.img"), daemon.path("aside.img")
    refused = run_command(daemon, "backend", "null", "--device", "away")
    assert refused.status and "isolation none" in refused.err, refused
    image.rename(aside)
    kill_worker_of(daemon, "away")
    eventually(lambda: "no such file" in daemon.status("away").reason, "its list names the store")
    reader = Forked(lambda: int(read_block(path, 0, BLOCK) != data))
    image.write_bytes(bytes(32 * MIB))
    eventually(lambda: "is served from" in daemon.status("away").reason, "another file is refused")
    assert daemon.status("away").state == "recovering" and reader.running
    image.unlink()
    aside.rename(image)
    wait_for_epoch(daemon, "away", 2)
    assert reader.wait() == 0
    assert read_block(status.path, 0, BLOCK) == data
    assert total(daemon.rest("away"), "errors") == 0
    daemon.delete("away")
    image.unlink()


@pytest.mark.parametrize("zero_copy", [False, True], ids=["copied", "zero-copy"])
def test_what_a_dead_worker_has_under_way_ends_before_the_next_one_serves(
    daemon: Daemon, zero_copy: bool
) -> None:
    """Its write waits in a disk that answers nothing; if the next epoch began now, it would land after a newer one."""
    if zero_copy and not get_features() & Feature.AUTO_BUF_REG:
        pytest.skip("this driver has no AUTO_BUF_REG")
    below = daemon.add("below", "memory", {"size": "16M"}, placement="backend", isolation="none")
    assert below.path is not None
    with suspended_file(below.path) as backing:
        options = {"path": backing, "direct": "on"}
        path = daemon.add("above", "file", options, isolation="none", zero_copy=zero_copy).path
        assert path is not None
        suspend()
        old, new = os.urandom(BLOCK), os.urandom(BLOCK)
        writer = Forked(partial(write_block, path, 0, old))
        eventually(lambda: total(daemon.stats("above"), "in_flight"), "the write is under way")
        kill_worker_of(daemon, "above")
        eventually(
            lambda: "which has ended, is over" in daemon.status("above").reason,
            "its list says for what it waits",
        )
        expect_other_devices_served(daemon)
        assert (daemon.status("above").state, daemon.status("above").epoch) == ("recovering", 1)
        assert writer.running
        resume()
        assert writer.wait() == 0
        assert wait_for_epoch(daemon, "above", 2).epoch == 2
        assert read_block(below.path, 0, BLOCK) == old
        assert write_block(path, 0, new) == 0
        assert read_block(below.path, 0, BLOCK) == new
        daemon.delete("above")
    daemon.delete("below")


def test_a_discard_that_waits_in_the_block_device_below_holds_up_nothing_else(daemon: Daemon) -> None:
    """A disk that can discard and not write zeroes cannot punch."""
    plugin, begun, go = (daemon.path(name) for name in ("slow.py", "begun", "go"))
    plugin.write_text(SLOW)
    below = daemon.add("below", str(plugin))
    above = daemon.add("above", "file", {"path": below.path}, isolation="none")
    assert above.path is not None
    data = os.urandom(BLOCK)
    assert write_block(above.path, 0, data) == 0
    command = ["blkdiscard", "--offset", str(MIB), "--length", str(MIB), above.path]
    discard = subprocess.Popen(command)
    eventually(begun.exists, "the discard has come below")
    reader = Forked(lambda: int(read_block(above.path or "", 0, BLOCK) != data))
    try:
        eventually(lambda: not reader.running, "a read is answered meanwhile")
    finally:
        go.touch()
    assert (reader.wait(), discard.wait()) == (0, 0)
    daemon.delete("above")
    daemon.delete("below")


def kill_worker_of(daemon: Daemon, name: str) -> None:
    with seeded() as rng:
        kill_worker(daemon, name, rng)


def test_what_an_engine_in_the_workers_cannot_do_is_refused_in_one_line(daemon: Daemon) -> None:
    status = daemon.add("null", "null", {"size": "16M"}, isolation="none")
    assert status.path is not None
    assert write_block(status.path, 0, bytes(BLOCK)) == 0
    refused = run_command(daemon, "drain", "null")
    assert refused.status != 0 and "isolation none" in refused.err, refused
    daemon.delete("null")
    memory = _add_memory(daemon, "memory")
    refused = run_command(daemon, "resize", "memory", "64M")
    assert refused.status != 0 and "cannot grow" in refused.err, refused
    assert memory.path is not None and disk_bytes(memory.path) == SIZE_BYTES
    daemon.delete("memory")
    refused = run_command(
        daemon, "add", "cow", "--backend=cow", "--isolation=none", "--queues=2", "overlay=/x"
    )
    assert refused.status == 2 and "use one queue" in refused.err, refused
    path = daemon.path("missing.img")
    with pytest.raises(DaemonError, match="no such file"):
        daemon.add("missing", "file", {"path": path}, isolation="none")
    assert daemon.client.devices() == [] and not Path(path).exists()
