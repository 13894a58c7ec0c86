"""Linux block devices served from user space: ublk, io_uring, and backends that own the memory writes land in."""

from pathlib import Path

__version__ = "0.1.0"

RUN_DIR_DEFAULT = Path("/run/ublkpool")
"""The directory of a daemon's lock, sockets and records, unless the user names another."""
