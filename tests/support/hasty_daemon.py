"""A daemon that waits only seconds for what hangs: `python -m support.hasty_daemon`."""

from support.watched_daemon import watch_daemon
from ublkpool.daemon import attachment, machinery, managed_backend
from ublkpool.daemon.cli import main

PATIENCE_S = 2.0

if __name__ == "__main__":
    setattr(machinery, "STOP_DEADLINE_S", PATIENCE_S)  # noqa: B010
    setattr(attachment, "DETACH_PATIENCE_S", PATIENCE_S)  # noqa: B010
    setattr(attachment, "DEATH_PATIENCE_S", PATIENCE_S)  # noqa: B010
    setattr(managed_backend, "END_PATIENCE_S", PATIENCE_S)  # noqa: B010
    setattr(managed_backend, "DEATH_PATIENCE_S", PATIENCE_S)  # noqa: B010
    watch_daemon()
    main()
