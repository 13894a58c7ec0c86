"""Where the daemon of an ordinary user has its directories, if none are named."""

import os
from collections.abc import Mapping
from pathlib import Path

from ublkpool import RUN_DIR_DEFAULT
from ublkpool.ublk.privilege import is_in_user_namespace


def is_ordinary() -> bool:
    """Whether this process is an ordinary user's to the machine; root of a user namespace is one."""
    return os.geteuid() != 0 or is_in_user_namespace()


def usual_run_dir(serves: bool = False, environment: Mapping[str, str] = os.environ) -> Path:
    """The run directory if none is named.

    An ordinary user's daemon has one below XDG_RUNTIME_DIR; without `serves` it counts only if it is there, since users
    also attach backends to root's daemon.
    """
    own = Path(environment.get("XDG_RUNTIME_DIR", "")) / RUN_DIR_DEFAULT.name
    if own.is_absolute() and is_ordinary() and (serves or own.is_dir()):
        return own
    return RUN_DIR_DEFAULT


def usual_state_dir(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where an ordinary user's daemon keeps what outlives the boot; None for root's, and without a home."""
    if not is_ordinary():
        return None
    below = environment.get("XDG_STATE_HOME") or Path(environment.get("HOME", "")) / ".local/state"
    found = Path(below) / RUN_DIR_DEFAULT.name
    return found if found.is_absolute() else None
