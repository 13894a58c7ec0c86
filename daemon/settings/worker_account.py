"""The user that workers and the pool broker become, chosen once at the daemon's start.

Owns the choice: the config's user, else `DEFAULT_USER` where there is one, else root without its capabilities; and
the trial in a forked process, since a container, a user namespace or a unit may forbid the change.  Names are looked
up here and never again, since a directory service could keep the running loop waiting.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.settings.user_directories import is_ordinary
from ublkpool.workers.privileges import Account, account_of, forbid_new_rights, give_up_rights
from ublkpool.workers.process import fork_child

DEFAULT_USER = "ublkpool-worker"
WAY_OUT = f"useradd --system --no-create-home {DEFAULT_USER}, then restart the daemon"
_KEY = "daemon.user"
_ROOT = Account("root", 0, 0, ())
_REASON_BYTES_MAX = 4096
_log = logging.getLogger("ublkpool.supervisor")


def wanted_accounts(user: str | None, group: int | None) -> Sequence[Account]:
    """The accounts to be tried, the best first; none if this daemon is no root, and its workers are what it is.

    `user` and `group` are the config's.  Raises `ConfigError` for a user that workers cannot be.
    """
    if is_ordinary():
        _check_is_own(user)
        return ()
    if user is not None:
        return (_named(user, group),)
    with suppress(LookupError):
        return _without_groups(account_of(DEFAULT_USER), group), _ROOT
    return (_ROOT,)


def choose_account(wanted: Sequence[Account], user: str | None, run_dir: Path) -> Account | None:
    """The first account that a process can become and then reach the broker's socket in `run_dir`.

    None: workers keep this daemon's rights.  Logs a warning if they are root although the config does not ask for it.
    Raises `ConfigError` if it is the config's `user` that cannot be.
    """
    for account in wanted:
        reason = why_not(account, run_dir / "lock")
        if not reason:
            if account == _ROOT and user is None:
                why = f": there is no user {DEFAULT_USER}: {WAY_OUT}" if len(wanted) == 1 else ""
                _log.warning("workers and the pool broker run as root, without its capabilities%s", why)
            return account
        if user is not None and account != _ROOT:
            raise ConfigError([f"{_KEY}: {reason}"])
        _log.warning("workers and the pool broker do not run as user %s: %s", account.name, reason)
    return None


def check_account(user: str | None, group: int | None, run_dir: Path) -> None:
    """Raise `ConfigError` if a daemon with this config would not start for want of its workers' user."""
    for account in wanted_accounts(user, group) if user is not None else ():
        if account != _ROOT and (reason := why_not(account, run_dir)):
            raise ConfigError([f"{_KEY}: {reason}"])


def why_not(account: Account, path: Path) -> str:
    """Why a process cannot become this user and then find `path`; empty if it can.  A forked process tries it."""
    reader, writer = os.pipe()
    try:
        pid = fork_child(lambda: _try(account, path, writer), [writer], "ublkpool-try")
    finally:
        os.close(writer)
    with os.fdopen(reader, "rb") as said:
        reason = said.read(_REASON_BYTES_MAX).decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    return reason or (f"the process that tried it ended with {status}" if status else "")


def _try(account: Account, path: Path, writer: int) -> int:
    try:
        forbid_new_rights()
        give_up_rights(account)
    except OSError as error:
        os.write(writer, f"a process cannot become user {account.name} here: {explain(error)}".encode())
        return 1
    try:
        path.stat()
    except OSError as error:
        reason = f"user {account.name} cannot reach {path}: {explain(error)}"
        way_out = "let it pass each directory (chmod o+x), choose another with --run-dir, or set user to root"
        os.write(writer, f"{reason}: {way_out}".encode())
        return 1
    return 0


def _named(user: str, group: int | None) -> Account:
    try:
        account = account_of(user)
    except LookupError as error:
        raise ConfigError([f"{_KEY}: {error}"]) from error
    return _without_groups(account, group)


def _without_groups(account: Account, group: int | None) -> Account:
    """Raises `ConfigError` if backends could reach what is the workers' alone."""
    if account.user == 0:
        return _ROOT
    if account.group in (0, group):
        whose = "root's" if account.group == 0 else "that of the backends"
        raise ConfigError(
            [f"{_KEY}: the group of user {account.name} is {whose}: choose a user with a group of its own"]
        )
    return account._replace(groups=(), home="/")


def _check_is_own(user: str | None) -> None:
    if user is None:
        return
    try:
        number = account_of(user).user
    except LookupError as error:
        raise ConfigError([f"{_KEY}: {error}"]) from error
    if number != os.geteuid():
        raise ConfigError([f"{_KEY}: only a daemon that runs as root can have workers of user {user}"])
