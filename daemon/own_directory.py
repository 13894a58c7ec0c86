"""A directory of the daemon's own: made with a mode, or accepted as it is; a mode or an owner is never changed.

The run directory and the state directory are both made here.  A directory that this process did not make keeps its
mode.  One that another user owns, or may write to, is refused: that user could replace what the daemon trusts.
"""

import os
import stat
from pathlib import Path

from ublkpool.daemon.errors import DaemonError

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def make_own_directory(path: Path, what: str, option: str, mode: int = 0o700) -> bool:
    """Make the directory, with its parents, if there is none; whether it was made.

    `what` and `option` are for the error: "run directory", "--run-dir".  Raises `DaemonError` if the directory cannot
    be made, is none, belongs to another user than this process's or root, or may be written to by others.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = _make(path, mode)
        status = path.stat()
    except OSError as error:
        raise DaemonError(f"{what} {path}: {error.strerror}: choose another with {option}") from error
    if reason := _why_not_ours(status):
        raise DaemonError(f"{what} {path}: {reason}: choose another with {option}")
    return made


def _make(path: Path, mode: int) -> bool:
    try:
        path.mkdir(mode)
    except FileExistsError:
        return False
    # mkdir is subject to the umask.
    path.chmod(mode)
    return True


def _why_not_ours(status: os.stat_result) -> str:
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a directory"
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & _WRITABLE_BY_OTHERS:
        return f"other users may write to it (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""
