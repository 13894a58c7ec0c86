"""Makes the run directory and the state directory, or checks one that exists.

A directory that this process did not make keeps its mode and owner.  A directory that another user owns or may write to
is refused, because that user could replace files that the daemon trusts.  So is one below another user's directory or
symbolic link, since that user could put another directory in its place.  Below a directory with the sticky bit, such as
/tmp, only an entry's owner can do that.
"""

import errno
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.errors import ConfigError
from ublkpool.ublk.privilege import is_in_user_namespace

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
_PARENT_MODE = 0o755
_LINKS_MAX = 40
"""As the kernel follows at most in one path (MAXSYMLINKS, include/linux/namei.h)."""
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def make_own_directory(path: Path, what: str, option: str, mode: int = 0o700) -> bool:
    """Make the directory, with its parents, if it does not exist; returns whether it was made.

    `what` and `option` are for the error: "run directory", "--run-dir".  Raises `ConfigError` if the directory cannot
    be made, if `path` is no directory, belongs to a user other than this process's and root, or may be written to by
    others, if another user could replace it, a link on the way to it or one of its parents, and for a directory of the
    system, such as /etc.
    """
    try:
        reason = _why_replaceable(path) or _why_not_to_be_used(path)
        made = not reason and _make_durably(path, mode)
        # Checked again, since another user may have made a missing parent meanwhile.
        reason = reason or ("" if made else _why_not_ours(path)) or _why_replaceable(path)
    except OSError as error:
        raise ConfigError([f"{what} {path}: {explain(error)}: choose another with {option}"]) from error
    if reason:
        raise ConfigError([f"{what} {path}: {reason}: choose another with {option}"])
    return made


def why_refused(path: Path) -> str:
    """Why `make_own_directory` would refuse this path as it is now, empty if it would not; changes nothing.

    Raises `OSError`.
    """
    reason = _why_replaceable(path) or _why_not_to_be_used(path)
    return reason or (_why_not_ours(path) if path.exists() else "")


def _why_not_to_be_used(path: Path) -> str:
    if path == Path():
        return "it is the current directory"
    return "it is a directory of the system" if str(path.resolve()) in SYSTEM_DIRECTORIES else ""


def _make_durably(path: Path, mode: int) -> bool:
    """Make the directory with its parents, so that it survives a power failure; returns whether it was made."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing[1:]):
        with suppress(FileExistsError):
            each.mkdir(_PARENT_MODE)
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
    status = path.stat()
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


def _why_replaceable(path: Path) -> str:
    """Which parent of the directory, or of a link on the way, another user could replace; empty if none.

    A part that does not exist yet is replaceable if its parent is.
    """
    for parent in _parents(path.absolute()):
        about = parent.lstat()
        mode, owner = stat.S_IMODE(about.st_mode), _user(about.st_uid)
        kind = "the symbolic link" if stat.S_ISLNK(about.st_mode) else "the directory"
        if parent == path.absolute() and not _is_ours(about):
            return f"it is a symbolic link of {owner}"
        if not _is_ours(about) and not _may_be_roots(about):
            return f"{kind} {parent} on its way belongs to {owner}, who could put another in its place"
        if not stat.S_ISLNK(about.st_mode) and _may_be_written_by_others(about):
            about_it = f"mode {mode:04o}, owner {owner}, group {about.st_gid}"
            return f"other users may write to {parent} on its way, and could put another in its place ({about_it})"
    return ""


def _parents(path: Path) -> Iterator[Path]:
    """Every directory and symbolic link that a look-up of the path goes through, as far as they exist; not its end.

    Raises `OSError`.
    """
    at, links = Path("/"), 0
    yield at
    names = list(reversed(path.parts[1:]))
    while names:
        name = names.pop()
        here = at.parent if name == ".." else at / name
        try:
            mode = here.lstat().st_mode
        except FileNotFoundError:
            return
        if stat.S_ISLNK(mode):
            yield here
            links += 1
            if links > _LINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            target = here.readlink()
            names.extend(reversed(target.parts[target.is_absolute() :]))
            at = Path("/") if target.is_absolute() else at
        elif names:
            yield here
            at = here


def _may_be_written_by_others(about: os.stat_result) -> bool:
    """Whether another user could replace an entry of the directory: under a sticky bit only its own."""
    if about.st_mode & stat.S_ISVTX:
        return False
    # The group of a user's own, in which a umask of 002 makes directories, is no other user.
    by_group = about.st_mode & stat.S_IWGRP and about.st_gid not in (0, os.getegid())
    return bool(by_group or about.st_mode & stat.S_IWOTH)


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid())


def _may_be_roots(about: os.stat_result) -> bool:
    """Whether this is a user namespace that knows root no better than `about`'s owner, who is then trusted as root is.

    Where root is not mapped the kernel shows all such owners as one and the same.
    """
    return is_in_user_namespace() and about.st_uid == _roots_owner()


def _roots_owner() -> int:
    return Path("/").stat().st_uid


def _user(uid: int) -> str:
    with suppress(KeyError):
        return f"user {pwd.getpwuid(uid).pw_name}"
    return f"user {uid}"
