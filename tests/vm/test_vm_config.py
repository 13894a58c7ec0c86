"""A daemon that finds its devices in a config file, and takes them along when it ends."""

import os

from support.vm_daemon import Daemon, eventually
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
"""


def test_devices_of_the_config_are_served_and_go_with_the_daemon() -> None:
    daemon = Daemon(CONFIG)
    try:
        daemon.start()
        for name in ("paper", "smoke"):
            path = daemon.wait_live(name).path
            assert path is not None
            data = os.urandom(65536)
            assert write_block(path, MIB, data) == 0
            assert read_block(path, MIB, len(data)) == data
        # A relative path in a config is meant from the config's directory.
        assert daemon.path("paper.img").stat().st_size == 16 * MIB
        assert (daemon.status("paper").queues, daemon.status("paper").depth) == (2, 32)
        assert not daemon.status("smoke").need_get_data
        assert daemon.stop() == 0, daemon.said()
        eventually(lambda: not daemon.remains(), f"nothing is left: {daemon.remains()}")
        assert '"level":"error"' not in daemon.said()
    finally:
        daemon.close()


def test_a_device_that_cannot_start_does_not_keep_the_others_of_the_config() -> None:
    daemon = Daemon(CONFIG.replace('"paper.img"', '"/nowhere/paper.img"'))
    try:
        daemon.start()
        assert daemon.wait_live("smoke").path is not None
        eventually(lambda: "device paper of the config" in daemon.said(), "the log says what is wrong")
        assert "/nowhere/paper.img" in daemon.said()
        assert [each.name for each in daemon.client.devices()] == ["smoke"]
        assert daemon.stop() == 0, daemon.said()
        eventually(lambda: not daemon.remains(), f"nothing is left: {daemon.remains()}")
    finally:
        daemon.close()
