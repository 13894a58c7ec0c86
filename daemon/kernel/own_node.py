"""A device's nodes in /dev, when they are to belong to an ordinary user.

The kernel makes every node for root.  A program that udev runs gives those of a user's device to that user
(`config/99-ublkpool.users.rules`); until then the driver refuses the user every command on it.  Every function runs in
a disposable process.
"""

import errno
import os
import time

from ublkpool.ublk.control import node_path
from ublkpool.ublk.errors import UblkError

DEADLINE_S = 20.0
RULES = "config/99-ublkpool.users.rules"
_POLL_S = 0.02


def await_own_node(device: int, deadline_s: float = DEADLINE_S) -> None:
    """Return when this process may read and write /dev/ublkcN.  Raises `UblkError` EACCES after the deadline."""
    path = node_path(device)
    until_s = time.monotonic() + deadline_s
    while not os.access(path, os.R_OK | os.W_OK):
        if time.monotonic() > until_s:
            raise NodeNotOurs(device, deadline_s)
        time.sleep(_POLL_S)


class NodeNotOurs(UblkError):
    """Udev has not given the new node to this user."""

    def __init__(self, device: int, deadline_s: float) -> None:
        self.what = path = node_path(device)
        self.errno = errno.EACCES
        Exception.__init__(
            self,
            f"{path} is not this user's after {deadline_s:g} s: as root install {RULES}, then udevadm control --reload "
            f"and udevadm trigger -s ublk-char; what is left of this attempt: ublkpool del lost-{device}",
        )
