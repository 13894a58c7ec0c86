"""Directories and sockets of the daemon's own: made by it, or found and safe to use as they are.

Owns the rule for both: modes and owners are changed only of what the daemon made, what another user owns or may write
to is refused, and nothing but a socket is ever replaced by a socket.  Must not know what a directory is for.
"""

import os
import pwd
import socket
import stat
from contextlib import suppress
from pathlib import Path

from ublkpool.daemon.errors import ConfigError, DaemonError

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def own_directory(path: Path, what: str, way_out: str, mode: int = 0o700) -> bool:
    """Make the directory with this mode, or check that a found one is ours; whether it was made.

    A found one keeps its mode and owner.  `what` says in an error what the directory is for, `way_out` what to do.
    Raises `ConfigError` if another user owns it or may write to it, or it cannot be made.
    """
    try:
        if _make(path, mode):
            return True
        _check_link(path, what, way_out)
        found = path.stat()
    except OSError as error:
        raise ConfigError([f"{what} {path}: {error.strerror}: {way_out}"]) from error
    if reason := _why_not_ours(found):
        raise ConfigError([f"{what} {path}: {reason}: {way_out}"])
    return False


def _make(path: Path, mode: int) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return False
    # The umask may have taken bits away.
    path.chmod(mode)
    return True


def _check_link(path: Path, what: str, way_out: str) -> None:
    """A symbolic link of another user's could lead elsewhere tomorrow.  Raises `ConfigError`, `OSError`."""
    about = path.lstat()
    if stat.S_ISLNK(about.st_mode) and about.st_uid not in (0, os.geteuid()):
        raise ConfigError([f"{what} {path}: a symbolic link of {user_name(about.st_uid)}'s: {way_out}"])


def _why_not_ours(found: os.stat_result) -> str:
    if not stat.S_ISDIR(found.st_mode):
        return "not a directory"
    if found.st_uid != os.geteuid():
        return f"belongs to {user_name(found.st_uid)}, not to {user_name(os.geteuid())}, who runs the daemon"
    if found.st_mode & _WRITABLE_BY_OTHERS:
        who = "everybody" if found.st_mode & stat.S_IWOTH else f"group {found.st_gid}"
        return (
            f"{who} may write to it (mode {stat.S_IMODE(found.st_mode):04o}, owner {user_name(found.st_uid)})"
        )
    return ""


def user_name(uid: int) -> str:
    """The user's name, or the number of one without a name."""
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return f"user {uid}"


def remove_socket(path: Path) -> None:
    """Remove the socket at this path, if there is one.  Raises `DaemonError` if something else is there, `OSError`."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise DaemonError(
                f"{path}: in the way, and not a socket: move it away, or choose another --run-dir"
            )
        path.unlink()


def listen(path: Path, kind: socket.SocketKind, group: int | None = None, backlog: int = 64) -> socket.socket:
    """A socket that listens at `path`, for our user and, if there is one, this group; it replaces a socket there.

    Raises `DaemonError` if something that is not a socket is in the way, or the socket cannot be made.
    """
    remove_socket(path)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    umask = os.umask(0o177)
    try:
        listener.bind(str(path))
        if group is not None:
            os.chown(path, -1, group)
            path.chmod(0o660)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise DaemonError(f"{path}: cannot listen: {error.strerror or error}") from error
    finally:
        os.umask(umask)
    return listener
