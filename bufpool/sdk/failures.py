"""The errno that answers a failed request, and what the log says about it.

Owns the counters of failed requests of this process.  A store that fails may fail each request: the first failure of
each kind is logged with its text, the next ones when there are ten, a hundred, a thousand of the kind.  Thread-safe.
"""

import errno
import logging
import os
import threading

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.sdk.blame import blamed, line_of, words_of

log = logging.getLogger("ublkpool.backend")

KINDS_MAX = 64
"""Kinds of failures that are told apart; the others are counted as one."""
_ERRNO_MAX = 4095
_OTHER = "other failures"


class Failures:
    """How many requests failed, by operation and error."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._bugs: set[tuple[type[BaseException], str]] = set()

    def answer(self, error: BaseException, what: str) -> int:
        """Count and log a failure; returns the negative errno that answers it."""
        number = _errno_in(error)
        kind = f"{what.rstrip('0123456789').removesuffix(' at ')} {_name(error, number)}"
        count = self._count(kind)
        if isinstance(error, OSError | PoolError):
            self._tell(kind, count, f"{what} failed, answered {_code(number)}: {_text(error)}")
        elif self._is_new(error):
            log.error(
                "%s failed with a bug, answered EIO (said once): %s", what, blamed(error), exc_info=error
            )
        return -number

    def counts(self) -> dict[str, int]:
        """The failures of each kind, such as `write ENOSPC`."""
        with self._lock:
            return dict(self._counts)

    def sum_up(self, device: str) -> None:
        """Log how many requests failed, if any did."""
        counts = self.counts()
        if counts:
            shown = ", ".join(f"{kind} {count}" for kind, count in counts.items())
            log.warning("%s: failed requests: %s", device, shown)

    def forget(self) -> None:
        """Begin anew, for a process that serves again."""
        with self._lock:
            self._counts.clear()
            self._bugs.clear()

    def _count(self, kind: str) -> int:
        with self._lock:
            if kind not in self._counts and len(self._counts) >= KINDS_MAX:
                kind = _OTHER
            self._counts[kind] = self._counts.get(kind, 0) + 1
            return self._counts[kind]

    def _tell(self, kind: str, count: int, first: str) -> None:
        if count == 1:
            log.error("%s (further ones are counted)", first)
        elif str(count).strip("0") == "1":
            log.error("%s: %d failures so far", kind, count)

    def _is_new(self, error: BaseException) -> bool:
        bug = (type(error), line_of(error))
        with self._lock:
            is_new = bug not in self._bugs and len(self._bugs) < KINDS_MAX
            self._bugs.add(bug)
        return is_new


failures = Failures()
"""Of this process, which serves one device."""


def errno_of(error: BaseException, what: str) -> int:
    """The negative errno that answers a request which failed with `error`.

    `what` names the operation, and after it the number that differs between requests: `write at 4096`.  An `OSError`
    without an errno, such as a network library's, answers EIO.  Any other exception without an errno is a bug: it is
    logged with its traceback, once for each type and line, and answers EIO.
    """
    return failures.answer(error, what)


def _errno_in(error: BaseException) -> int:
    number = error.errno if isinstance(error, OSError | PoolError) else None
    return number if isinstance(number, int) and 0 < number <= _ERRNO_MAX else errno.EIO


def _code(number: int) -> str:
    return errno.errorcode.get(number, f"errno {number}")


def _name(error: BaseException, number: int) -> str:
    is_plain = isinstance(error, OSError) and error.errno == number
    return _code(number) if is_plain else f"{_code(number)} ({type(error).__name__})"


def _text(error: BaseException) -> str:
    """Its own text, or the errno's; with the class where the class says more."""
    if isinstance(error, OSError) and error.errno and not str(error.strerror or ""):
        return os.strerror(error.errno)
    if isinstance(error, OSError) and error.errno and type(error).__module__ == "builtins":
        name = f": {error.filename}" if error.filename else ""
        return " ".join(f"{error.strerror}{name}".split())
    return words_of(error)
