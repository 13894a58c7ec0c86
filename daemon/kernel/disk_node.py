"""The node of a disk in /dev: opening it, which may wait for ever.

Every function runs in a helper process (`ControlRunner.look`).
"""

import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

SETTLE_S = 10
_POLL_S = 0.02


def wait_until_open(node: str, deadline_s: float) -> bool:
    """Whether `node` was there and could be opened as a block device before the deadline, with udev settled then.

    The deadline is for a node that is missing; an open that waits in the kernel is waited for.
    """
    until_s = time.monotonic() + deadline_s
    while not _opens(node):
        if time.monotonic() > until_s:
            return False
        time.sleep(_POLL_S)
    _settle_udev()
    return True


def has_gone(disk: str) -> bool:
    """Whether the kernel has begun to remove this disk, after which it cannot be opened any more.

    del_gendisk takes the link `bdi` away between marking the disk dead and waiting for its requests.
    """
    return not os.path.lexists(f"/sys/block/{disk}/bdi")


def _opens(node: str) -> bool:
    try:
        fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return stat.S_ISBLK(os.fstat(fd).st_mode)
    finally:
        os.close(fd)


def _settle_udev() -> None:
    udevadm = shutil.which("udevadm")
    if udevadm is not None and Path("/run/udev/control").exists():
        subprocess.run(
            [udevadm, "settle", f"--timeout={SETTLE_S}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=False,
        )
