"""A daemon that takes itself for a newer version than the one before it: `python -m support.newer_daemon`."""

import uuid

from ublkpool.daemon import device
from ublkpool.daemon.cli import main

if __name__ == "__main__":
    setattr(device, "build_id", lambda: uuid.uuid4().hex)  # noqa: B010
    main()
