"""A daemon that adds the devices of a config file and deletes them when it ends."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from support.vm.daemon import Daemon, eventually, eventually_nothing
from support.vm.process import read_block, write_block
from support.vm.rights import expect_no_rights

pytestmark = pytest.mark.one_kernel("7.3")
MIB = 1 << 20
CONFIG = """
[daemon]
user = "root"
log_level = "debug"
log_format = "json"

[[device]]
name = "paper"
queues = 2
depth = 32
[device.backend]
kind = "file"
path = "paper.img"
size = "16M"

[[device]]
name = "smoke"
size = "8M"
need_get_data = false
read_only = false
max_io = "64K"
[device.backend]
kind = "memory"
size = "8M"

[[device]]
name = "lost"
[device.backend]
kind = "file"
path = "/nowhere/lost.img"
"""


def test_the_configs_devices_are_served_except_broken_ones_and_deleted_with_the_daemon() -> None:
    daemon = Daemon(CONFIG)
    try:
        daemon.start()
        for name in ("paper", "smoke"):
            _check_that_it_stores(daemon, name)
            expect_no_rights(daemon, name, "root")
        # A relative path in a config file starts at the file's directory.
        assert daemon.path("paper.img").stat().st_size == 16 * MIB
        assert (daemon.status("paper").queues, daemon.status("paper").depth) == (2, 32)
        assert not daemon.status("smoke").need_get_data
        eventually(lambda: "device lost of the config" in daemon.said(), "the log says what is wrong")
        lost = daemon.status("lost")
        assert lost.state == "failed" and "/nowhere/lost.img" in lost.reason
        assert {each.name for each in daemon.client.devices()} == {"paper", "smoke", "lost"}
        assert daemon.stop() == 0, daemon.said()
        eventually_nothing(daemon.remains, "nothing is left")
    finally:
        daemon.close()


def _check_that_it_stores(daemon: Daemon, name: str) -> None:
    path, data = daemon.wait_live(name).path, os.urandom(65536)
    assert path is not None
    assert write_block(path, MIB, data) == 0
    assert read_block(path, MIB, len(data)) == data


STUCK = """
[[device]]
name = "stuck"
size = "8M"
[device.backend]
kind = "{stuck}"

[[device]]
name = "alone"
size = "8M"

[[device]]
name = "fine"
size = "8M"
[device.backend]
kind = "memory"
"""
HANGS = """
import signal, time

signal.signal(signal.SIGTERM, signal.SIG_IGN)


def open() -> None:
    time.sleep(3600)


def get_size() -> int:
    return 8 << 20


def pread(buf, offset) -> None:
    pass


def pwrite(buf, offset) -> None:
    pass
"""


def _told(systemd: socket.socket) -> list[str]:
    said = []
    with suppress(BlockingIOError):
        while True:
            said.append(systemd.recv(4096, socket.MSG_DONTWAIT).decode())
    return said


def test_a_backend_that_hangs_in_open_delays_neither_readiness_nor_other_devices_nor_the_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = tmp_path / "hangs.py"
    hangs.write_text(HANGS)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        with Daemon(STUCK.format(stuck=hangs), name="stuck").life() as daemon:
            daemon.wait_live("fine")
            eventually(
                lambda: any(
                    "STATUS=serving 1 device; waiting for stuck, alone" in each.splitlines()
                    for each in _told(systemd)
                ),
                "systemd is told what is not there",
            )
            assert {each.name: each.state for each in daemon.client.devices()} == {
                "stuck": "waiting",
                "alone": "waiting",
                "fine": "live",
            }
            with daemon.device("later", "null", size_bytes=MIB):
                pass
            assert daemon.stop() == 0, daemon.said()
