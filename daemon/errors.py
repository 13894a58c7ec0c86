"""The daemon's errors, and the text and exit status of every error.

Owns the exit statuses: 1 for an operation that failed, 2 for user input that cannot work (a bad option, a bad config
file, an unusable backend).  Must not know which module prints the text.
"""

import errno
from typing import Literal

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.way_out import explain

STATUS_FAILED = 1
STATUS_USAGE = 2
_SHORTAGES = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.EAGAIN,
        errno.ENOMEM,
        errno.ENOBUFS,
        errno.ENOSPC,
        errno.EDQUOT,
    }
)


Code = Literal["", "bad-request", "exists", "in-use", "no-device", "stopping", "timeout", "version"]
"""What went wrong, for programs; empty: the text says it.  Names are added, never renamed."""


class DaemonError(Exception):
    """A failure; its text is one line for the user, its `code` is for programs."""

    status = STATUS_FAILED
    may_pass = False
    """Whether it ends when the machine gets better, whatever errno it has."""

    def __init__(self, message: str = "", *, code: Code = "") -> None:
        super().__init__(message)
        self.code: str = code


class ConfigError(DaemonError):
    """User input that cannot work; `lines` has one line per mistake."""

    status = STATUS_USAGE

    def __init__(self, lines: list[str], *, code: Code = "") -> None:
        super().__init__("\n".join(lines), code=code)
        self.lines = lines


class DaemonUnreachable(DaemonError):
    """No daemon answers on the admin socket; the text names the socket and the way out."""


class DaemonSilent(DaemonUnreachable):
    """The daemon has the request and has not answered in time; it is not known what becomes of the request."""


class BadAnswer(DaemonError):
    """The daemon's answer cannot be read: the daemon is of another version."""


class RemoteError(DaemonError):
    """The error that the daemon sent as its answer, with the exit status and the code that it chose."""

    def __init__(self, message: str, status: int = STATUS_FAILED, *, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class NoSuchDevice(RemoteError):
    """The daemon has no device of this name."""


class DeviceExists(RemoteError):
    """The daemon has a device of this name."""


class DeviceInUse(RemoteError):
    """The device has users, which the text names, and stays."""


class DaemonStopping(RemoteError):
    """The daemon ends, and begins nothing new."""


class TimedOut(RemoteError):
    """The daemon has given the operation up, because it has not happened in the time that was asked for."""


class BadRequest(RemoteError):
    """The daemon does not know the operation or one of its fields: it is of an earlier version."""


class OtherVersion(RemoteError):
    """The daemon speaks another version of the protocol: `speaks`, None if it does not say which."""

    speaks: int | None = None


_REMOTE: dict[str, type[RemoteError]] = {
    "no-device": NoSuchDevice,
    "exists": DeviceExists,
    "in-use": DeviceInUse,
    "stopping": DaemonStopping,
    "timeout": TimedOut,
    "bad-request": BadRequest,
    "version": OtherVersion,
}


def remote_error(message: str, status: int, code: str, speaks: int | None) -> RemoteError:
    """The daemon's error as the class of its code; a `RemoteError` itself if this version does not know the code."""
    error = _REMOTE.get(code, RemoteError)(message, status, code=code)
    if isinstance(error, OtherVersion):
        error.speaks = speaks
    return error


def status_of(error: BaseException) -> int:
    """The exit status for this error."""
    if isinstance(error, DaemonError):
        return error.status
    return STATUS_USAGE if isinstance(error, BackendError) else STATUS_FAILED


def is_shortage(error: BaseException | None) -> bool:
    """Whether the error, or one that caused it, is a lack of descriptors, processes, memory or room: it may pass."""
    while error is not None:
        if getattr(error, "errno", None) in _SHORTAGES or getattr(error, "may_pass", False):
            return True
        error = error.__cause__
    return False


def lines_of(error: BaseException) -> list[str]:
    """The lines for the user: the error's own text if its class is ours; for others the failure and how to see more."""
    if type(error).__module__.startswith("ublkpool."):
        return str(error).splitlines() or [type(error).__name__]
    if isinstance(error, OSError) and error.strerror:
        return [f"{error.filename}: {explain(error)}" if error.filename else explain(error)]
    summary = " ".join(str(error).split())
    return [f"internal error: {type(error).__name__}: {summary} (UBLKPOOL_DEBUG=1 shows where)"]


def one_line(error: BaseException) -> str:
    """`lines_of` joined to one line, for a reply or a log record."""
    return "; ".join(lines_of(error))


def without_name(name: str, text: str) -> str:
    """The message without the prefix `NAME: `, for a caller that puts the name before it."""
    return text.removeprefix(f"{name}: ")
