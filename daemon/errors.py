"""The daemon's errors, and how any error becomes one line and an exit status.

Owns the meaning of exit statuses: 1 is an operation that failed, 2 is something the user wrote that cannot
work (a bad option, a bad config file, an unusable backend).  Must not know who prints the line.
"""

from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.way_out import explain

STATUS_FAILED = 1
STATUS_USAGE = 2


class DaemonError(Exception):
    """A failure with a one-line reason that is fit to be shown to a user as it stands."""

    status = STATUS_FAILED


class ConfigError(DaemonError):
    """Something the user wrote that cannot work; one line per mistake."""

    status = STATUS_USAGE

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class DaemonUnreachable(DaemonError):
    """No daemon answers on the admin socket; the text says which one and what to do."""


class RemoteError(DaemonError):
    """The daemon's own answer to a request, with the status that it chose."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: BaseException) -> int:
    """The exit status for this error."""
    if isinstance(error, DaemonError):
        return error.status
    return STATUS_USAGE if isinstance(error, BackendError) else STATUS_FAILED


def lines_of(error: BaseException) -> list[str]:
    """What to tell a user: the error's own words if it is ours, else what broke and how to see more."""
    if type(error).__module__.startswith("ublkpool."):
        return str(error).splitlines() or [type(error).__name__]
    if isinstance(error, OSError) and error.strerror:
        return [f"{error.filename}: {explain(error)}" if error.filename else explain(error)]
    summary = " ".join(str(error).split())
    return [f"internal error: {type(error).__name__}: {summary} (UBLKPOOL_DEBUG=1 shows where)"]


def one_line(error: BaseException) -> str:
    """The same in one line, for a reply or a log record."""
    return "; ".join(lines_of(error))


def without_name(name: str, text: str) -> str:
    """A message about `name` that does not begin with it: whoever says it puts the name before it, once."""
    return text.removeprefix(f"{name}: ")
