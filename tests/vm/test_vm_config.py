"""A daemon that finds its devices in a config file, and takes them along when it ends."""

import os

from support.vm_daemon import Daemon, eventually, eventually_nothing
from support.vm_process import read_block, write_block

MIB = 1 << 20
CONFIG = """
[daemon]
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


def test_devices_of_the_config_are_served_but_for_those_that_cannot_and_go_with_the_daemon() -> None:
    daemon = Daemon(CONFIG)
    try:
        daemon.start()
        for name in ("paper", "smoke"):
            _check_that_it_stores(daemon, name)
        # A relative path in a config is meant from the config's directory.
        assert daemon.path("paper.img").stat().st_size == 16 * MIB
        assert (daemon.status("paper").queues, daemon.status("paper").depth) == (2, 32)
        assert not daemon.status("smoke").need_get_data
        eventually(lambda: "device lost of the config" in daemon.said(), "the log says what is wrong")
        assert "/nowhere/lost.img" in daemon.said()
        assert {each.name for each in daemon.client.devices()} == {"paper", "smoke"}
        assert daemon.stop() == 0, daemon.said()
        eventually_nothing(daemon.remains, "nothing is left")
    finally:
        daemon.close()


def _check_that_it_stores(daemon: Daemon, name: str) -> None:
    path, data = daemon.wait_live(name).path, os.urandom(65536)
    assert path is not None
    assert write_block(path, MIB, data) == 0
    assert read_block(path, MIB, len(data)) == data
