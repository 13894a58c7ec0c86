"""A daemon that takes itself for a newer version than the one before it: `python -m support.newer_daemon`."""

import uuid

from ublkpool.daemon import surroundings
from ublkpool.daemon.cli import main

if __name__ == "__main__":
    setattr(surroundings, "build_id", lambda: uuid.uuid4().hex)  # noqa: B010
    main()
