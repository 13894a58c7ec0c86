"""What a new daemon checks before it asks the one that runs in its run directory to leave.

Owns that a start that would be refused leaves the earlier daemon serving.  The driver and the rights are asked before
(`lifetime.serve`), the config is read before that.  Changes nothing but that a missing state directory is made.
"""

import grp
from pathlib import Path

from ublkpool.daemon.device.records import Records
from ublkpool.daemon.device.state import StateDirectory, candidates
from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.processes.unix_socket import check_replaceable
from ublkpool.daemon.settings.config import ServeConfig
from ublkpool.daemon.settings.run_directory import SOCKETS, check_prepared
from ublkpool.daemon.settings.worker_account import check_account


def group_number(config: ServeConfig) -> int | None:
    """The number of the group that the config names; None without one.  Raises `ConfigError`."""
    if not config.group:
        return None
    try:
        return grp.getgrnam(config.group).gr_gid
    except KeyError:
        raise ConfigError(
            [f"no such group: {config.group}: create it with: groupadd --system {config.group}"]
        ) from None


def check_sockets(run_dir: Path) -> None:
    """Raise `DaemonError` if a file is in the way of a socket: a takeover that has begun would be cut short."""
    for name in SOCKETS:
        check_replaceable(run_dir / name)


def check_before(config: ServeConfig) -> None:
    """Raise `DaemonError`, `ConfigError` or `OSError` if a daemon with this config would be refused here."""
    check_prepared(config.run_dir, group_number(config))
    check_sockets(config.run_dir)
    check_account(config.user, group_number(config), config.run_dir)
    StateDirectory.check(candidates(config.run_dir, config.state_dir))
    Records(config.run_dir / "devices").check()
