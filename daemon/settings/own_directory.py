"""Makes the run directory and the state directory, or checks one that exists.

A directory that this process did not make keeps its mode and owner.  A directory that another user owns or may write to
is refused, because that user could replace files that the daemon trusts.
"""

import errno
import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.errors import ConfigError

SYSTEM_DIRECTORIES = frozenset(
    [
        *(
            "/",
            "/boot",
            "/dev",
            "/dev/shm",
            "/etc",
            "/home",
            "/mnt",
            "/opt",
            "/proc",
            "/root",
            "/run",
            "/run/lock",
        ),
        *("/srv", "/sys", "/tmp", "/usr", "/var", "/var/lib", "/var/run", "/var/tmp"),
    ]
)
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def make_own_directory(path: Path, what: str, option: str, mode: int = 0o700) -> bool:
    """Make the directory, with its parents, if it does not exist; returns whether it was made.

    `what` and `option` are for the error: "run directory", "--run-dir".  Raises `ConfigError` if the directory cannot
    be made, if `path` is no directory, belongs to a user other than this process's and root, or may be written to by
    others, if `path` is a symbolic link of another user, and for a directory of the system, such as /etc.
    """
    try:
        reason = _why_not_to_be_used(path)
        made = not reason and _make_durably(path, mode)
        reason = reason or ("" if made else _why_not_ours(path))
    except OSError as error:
        raise ConfigError([f"{what} {path}: {explain(error)}: choose another with {option}"]) from error
    if reason:
        raise ConfigError([f"{what} {path}: {reason}: choose another with {option}"])
    return made


def _why_not_to_be_used(path: Path) -> str:
    if path == Path():
        return "it is the current directory"
    return "it is a directory of the system" if str(path.resolve()) in SYSTEM_DIRECTORIES else ""


def _make_durably(path: Path, mode: int) -> bool:
    """Make the directory with its parents, so that it survives a power failure; returns whether it was made."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    made = _make(path, mode)
    for each in missing:
        _sync(each.parent)
    return made


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # A file system that has nothing to sync for a directory.
        if error.errno not in (errno.EINVAL, errno.EROFS):
            raise
    finally:
        os.close(fd)


def _make(path: Path, mode: int) -> bool:
    try:
        path.mkdir(mode)
    except FileExistsError:
        return False
    # The umask has reduced the mode of mkdir(2).
    path.chmod(mode)
    return True


def _why_not_ours(path: Path) -> str:
    link, status = path.lstat(), path.stat()
    if stat.S_ISLNK(link.st_mode) and not _is_ours(link):
        return f"it is a symbolic link of {_user(link.st_uid)}"
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a directory"
    if not _is_ours(status):
        return f"it belongs to {_user(status.st_uid)} (mode {stat.S_IMODE(status.st_mode):04o})"
    if status.st_mode & _WRITABLE_BY_OTHERS:
        about = (
            f"mode {stat.S_IMODE(status.st_mode):04o}, owner {_user(status.st_uid)}, group {status.st_gid}"
        )
        return f"other users may write to it ({about})"
    return ""


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid())


def _user(uid: int) -> str:
    with suppress(KeyError):
        return f"user {pwd.getpwuid(uid).pw_name}"
    return f"user {uid}"
