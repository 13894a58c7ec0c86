"""The work of `ublkpool shutdown`, which config/ublkpool-shutdown.service and ublkpool-shutdown-final.service run.

Owns the order at poweroff: unmount, then delete the devices, then end the daemon.  Runs in a process of its own, in the
machine's mount namespace; every wait has a limit.
"""

import logging
import subprocess
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool.mountinfo import Mount, read_mounts, shown
from ublkpool.client import Client

SYS_BLOCK = Path("/sys/dev/block")
UNMOUNT_PATIENCE_S = 10.0
_KILL_PATIENCE_S = 1.0
_log = logging.getLogger("ublkpool.shutdown")


def begin(run_dir: Path) -> None:
    """Tell the daemon that the machine goes down.  Raises `DaemonError`."""
    Client(run_dir).shut_down(final=False)


def finish(run_dir: Path) -> None:
    """Unmount what is still mounted on the daemon's disks, then let the daemon delete them and end.

    Raises `DaemonError`.
    """
    client = Client(run_dir)
    release([device.id for device in client.devices() if device.id is not None])
    client.shut_down(final=True)


def release(numbers: Collection[int], mountinfo: Path = Path("/proc/self/mountinfo")) -> None:
    """Unmount everything on the disks with these ublk device numbers; sync a file system that cannot be unmounted."""
    for path in reversed(paths_on(numbers, read_mounts(mountinfo))):
        _log.warning("%s is still mounted: unmounting it", shown(path))
        if not _succeeds(["umount", "--", path]):
            _log.error("%s cannot be unmounted: writing its data back", shown(path))
            _succeeds(["sync", "--file-system", "--", path])


def paths_on(numbers: Collection[int], mounts: Iterable[Mount]) -> list[str]:
    """The mount points of the disks with these ublk device numbers, in the order of `mounts`."""
    disks = {f"ublkb{number}" for number in numbers}
    # Some file systems (btrfs) have a device number of their own and name the disk as their source.
    return [
        each.path
        for each in mounts
        if disks & {*_disks_below(SYS_BLOCK / each.device), each.source.removeprefix("/dev/")}
    ]


def _disks_below(block: Path) -> set[str]:
    """The names of a block device, of the disk that it is a partition of, and of the disks below it (slaves)."""
    if not block.exists():
        return set()
    found = set(block.resolve().parts)
    for slave in (block / "slaves").glob("*"):
        found |= _disks_below(slave)
    return found


def _succeeds(command: Sequence[str]) -> bool:
    """Whether the command ends with status 0 within UNMOUNT_PATIENCE_S seconds.

    After that it is killed; a command that SIGKILL does not end within _KILL_PATIENCE_S seconds is left behind.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        return process.wait(UNMOUNT_PATIENCE_S) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_PATIENCE_S)
        return False
