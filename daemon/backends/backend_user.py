"""The user as which the daemon runs a device's backend: whether that can be, and the change to it.

Owns what such a process gets besides its user: the group by which the daemon's sockets let it in, and what root
alone may set for it (locked memory, PR_SET_IO_FLUSHER).  It has no capability and gets none.
"""

import os
import resource
from collections.abc import Mapping
from contextlib import suppress

from ublkpool.bufpool.sdk.process import IO_FLUSHER_SET
from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.settings.config import BackendConfig
from ublkpool.ublk import process_calls
from ublkpool.workers.privileges import account_of, become, forbid_new_rights


def check_can_run(device: str, config: BackendConfig, group: int | None) -> None:
    """Raise `ConfigError` if this daemon, whose config has this `group`, can run no backend as another user.

    Whether there is such a user the forked child finds out (`change_user`).
    """
    if config.user is None:
        return
    if os.geteuid() != 0:
        raise ConfigError(
            [f"{device}: backend.user: only a daemon that runs as root can run a backend as {config.user}"]
        )
    if group is None:
        raise ConfigError(
            [
                f"{device}: backend.user: set group in the config's [daemon]: by that group the daemon's sockets let "
                f"a backend of user {config.user} in"
            ]
        )


def change_user(config: BackendConfig, group: int | None) -> Mapping[str, str]:
    """In the forked child: become the backend's user, if it has one; the backend's environment.

    Raises `OSError`, `LookupError`.
    """
    if config.user is None:
        return os.environ
    account = account_of(config.user, config.group)
    groups = account.groups if group is None else (*account.groups, group)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    environment = {**os.environ, "HOME": account.home, "USER": account.name, "LOGNAME": account.name}
    with suppress(OSError):
        process_calls.set_io_flusher()
        environment[IO_FLUSHER_SET] = "1"
    forbid_new_rights()
    become(account._replace(groups=groups))
    return environment


def asked_for(config: BackendConfig | None, user: int) -> str | None:
    """The user that a process of `user` must be in order to serve the device; None if it may serve it as it is."""
    return None if config is None or user in (0, os.geteuid()) else config.user


def why_not(wanted: str, user: int) -> str:
    """Why a process of this user may not serve a device whose backend runs as `wanted`; empty if it may.

    Asks for that user, see `account_of`.
    """
    try:
        number = account_of(wanted).user
    except LookupError as error:
        return str(error)
    return (
        ""
        if user == number
        else f"user {user} may not serve it: the daemon runs its backend as user {wanted}"
    )
