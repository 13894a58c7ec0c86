"""The node of a disk in /dev, whose open may wait for ever.

Every function runs in a disposable process (`ControlRunner.look`).
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
    """Open `node` as a block device, then wait until udev has settled; false if the node is missing for `deadline_s`.

    The deadline does not end an open that waits in the kernel.
    """
    until_s = time.monotonic() + deadline_s
    while not _opens(node):
        if time.monotonic() > until_s:
            return False
        time.sleep(_POLL_S)
    _settle_udev()
    return True


def has_gone(disk: str) -> bool:
    """Whether the kernel has begun to remove this disk; from then on no process can open it.

    del_gendisk removes the link `bdi` after it has marked the disk dead, and before it waits for the disk's requests.
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
    # First, since the search of the program looks into every directory of PATH.
    if not Path("/run/udev/control").exists():
        return
    udevadm = shutil.which("udevadm")
    if udevadm is not None:
        subprocess.run(
            [udevadm, "settle", f"--timeout={SETTLE_S}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=False,
        )
