"""Disks that answer nothing, and the check that they block only their own users."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.vm.daemon import Daemon, eventually
from support.vm.files import load_module, run

DISK_BYTES = 16 << 20
SUSPENDED = "ublkpool-suspended"


def process_state(pid: int) -> str:
    """The state letter in /proc/PID/stat; D is a wait that no signal ends."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def expect_other_devices_served(daemon: Daemon) -> None:
    """Check that `list` answers, and that another device is added, recovered from its worker's death, and deleted."""
    status = daemon.add("other", "null", {"size": DISK_BYTES})
    os.kill(status.workers[0].pid, signal.SIGKILL)
    eventually(lambda: daemon.status("other").epoch > status.epoch, "the other device is recovered")
    daemon.wait_live("other")
    daemon.delete("other")
    # A short wait in the kernel, as for a file's page, is no wait for the disk.
    eventually(lambda: process_state(daemon.pid) != "D", "the daemon waits for no disk")


@contextmanager
def suspended_file(lower: str) -> Iterator[str]:
    """A device-mapper device on a disk, for `suspend`; it answers again, and goes, at the end of the block."""
    load_module("dm-mod")
    run("dmsetup", "create", "--noudevsync", SUSPENDED, "--table", f"0 {DISK_BYTES // 512} linear {lower} 0")
    try:
        minor = run("dmsetup", "info", "--columns", "--noheadings", "--options", "minor", SUSPENDED)
        yield f"/dev/dm-{minor.strip()}"
    finally:
        resume()
        run("dmsetup", "remove", "--noudevsync", "--retry", SUSPENDED)


def suspend() -> None:
    """From now on it accepts requests and answers none."""
    run("dmsetup", "suspend", "--noudevsync", "--nolockfs", "--noflush", SUSPENDED)


def resume() -> None:
    """It answers again."""
    run("dmsetup", "resume", "--noudevsync", SUSPENDED)
