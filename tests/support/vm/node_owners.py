"""udev's part in a guest without udev: `python -m support.vm.node_owners`, as root, until SIGTERM.

Gives the control node to the group that is named, and each new node of a user's device to that user, as
`config/99-ublkpool.users.rules` does.
"""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from ublkpool.ublk.abi import CONTROL_PATH, Feature
from ublkpool.ublk.control import device_info_by_path
from ublkpool.ublk.errors import UblkError

_POLL_S = 0.02


def give_nodes() -> None:
    """Give away each node that is still root's."""
    for path in Path("/dev").glob("ublk[bc]*"):
        with suppress(UblkError, FileNotFoundError):
            if path.stat().st_uid:
                continue
            info = device_info_by_path(int(path.name.removeprefix("ublkb").removeprefix("ublkc")))
            if info.flags & Feature.UNPRIVILEGED_DEV:
                os.chown(path, info.owner_uid, info.owner_gid)


def main(group: int) -> None:
    """Never returns."""
    os.chown(CONTROL_PATH, 0, group)
    Path(CONTROL_PATH).chmod(0o660)
    while True:
        give_nodes()
        time.sleep(_POLL_S)


if __name__ == "__main__":
    main(int(sys.argv[1]))
