"""Giving up rights: a process becomes an ordinary user, and nothing that it executes has more rights.

Owns the order of the calls, which depend on each other (capabilities(7), credentials(7)): the bounding set and
the securebits need CAP_SETPCAP, which ends with the user.  Used by every process of the daemon that needs no rights
after its start.

The C library changes the user of all threads (nptl(7)), everything else here is the calling thread's alone: so
`forbid_new_rights` comes before the first thread, which later ones inherit from.
"""

import ctypes
import errno
import grp
import os
import pwd
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

_PR_CAPBSET_DROP = 24
_PR_SET_SECUREBITS = 28
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_SECUREBITS = 0b1110_1011
"""User 0 has no capabilities by itself, none are kept or raised, a change of user drops them; all of that locked."""
_CAPABILITY_VERSION = 0x20080522
_CAPABILITIES_MAX = 64
_libc = ctypes.CDLL(None, use_errno=True)


class Account(NamedTuple):
    """A user as which a process can run."""

    name: str
    user: int
    group: int
    groups: tuple[int, ...]
    """The supplementary groups."""
    home: str = "/"


def account_of(user: str, group: str | None = None) -> Account:
    """The account of this name, or number, with `group` in place of its first group.

    Raises `LookupError` with one line that names the way out, if there is no such user or group.  May wait for another
    machine that knows the users (nsswitch.conf(5)), so never on an asyncio loop.
    """
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except (KeyError, ValueError, OverflowError):
        raise LookupError(f"no such user: {user}; create it with: useradd --system {user}") from None
    first = entry.pw_gid if group is None else group_of(group)
    return Account(
        entry.pw_name, entry.pw_uid, first, tuple(os.getgrouplist(entry.pw_name, first)), entry.pw_dir
    )


def group_of(group: str) -> int:
    """The number of the group of this name, or number.  Raises `LookupError` as `account_of`."""
    try:
        return (grp.getgrgid(int(group)) if group.isdecimal() else grp.getgrnam(group)).gr_gid
    except (KeyError, ValueError, OverflowError):
        raise LookupError(f"no such group: {group}; create it with: groupadd --system {group}") from None


def forbid_new_rights() -> None:
    """From now on no program that this process executes gives it rights; it keeps those that it has.

    Without CAP_SETPCAP the bounding set and the securebits stay as they are.  Raises `OSError`.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    try:
        for number in range(_CAPABILITIES_MAX):
            _prctl(_PR_CAPBSET_DROP, number)
    except OSError as error:
        # EINVAL: the number after the kernel's last capability.
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise
    try:
        _prctl(_PR_SET_SECUREBITS, _SECUREBITS)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise


def become(account: Account) -> None:
    """Be this user, in these groups, without a capability.  Raises `OSError`; then it may still be root."""
    os.setgroups(account.groups)
    os.setresgid(account.group, account.group, account.group)
    os.setresuid(account.user, account.user, account.user)
    give_up_capabilities()


def give_up_capabilities() -> None:
    """Have no capability any more, whichever user this is.  Raises `OSError`."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    none = (ctypes.c_uint32 * 6)()
    if _libc.capset(header, none):
        raise _failure("capset")


def give_up_rights(account: Account) -> None:
    """Be this user, or stay root, without a capability.  Raises `OSError`; then it may still be root.

    A change of the user ends the capabilities of every thread; for root they end in this thread only, so that the
    others must come from `run_without_capabilities`.
    """
    if account.user:
        become(account)
    else:
        give_up_capabilities()


def run_without_capabilities(work: Callable[[], None]) -> None:
    """Run this in a thread that has no capability, as then no thread has that it starts.  Raises what it raises.

    Not for a process that becomes another user later: the C library ends a process in which a thread cannot follow.
    """

    def run() -> None:
        give_up_capabilities()
        work()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()


def _prctl(option: int, value: int) -> None:
    # Variadic: each argument is passed as the unsigned long that the kernel reads.
    if _libc.prctl(option, *(ctypes.c_ulong(each) for each in (value, 0, 0, 0))) < 0:
        raise _failure(f"prctl {option}")


def _failure(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}")
