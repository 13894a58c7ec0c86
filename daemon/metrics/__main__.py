"""What the daemon becomes by exec when it starts its exporter.

Its arguments are the run directory, two inherited descriptors, of the listening socket and of the connection, and the
log's level and format.  `ublkpool metrics` is the command for people.
"""

import sys
from pathlib import Path
from typing import Any

from ublkpool.daemon import logs
from ublkpool.daemon.metrics.exporter import run_inherited


def main(run_dir: str, listener: str, connection: str, log_level: Any, log_format: Any) -> int:
    """Serve until SIGTERM; the exit status."""
    logs.configure(log_level, log_format)
    return run_inherited(Path(run_dir), int(listener), int(connection))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
