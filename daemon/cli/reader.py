"""The process that reads what a command prints line by line; the command ends in order when that process is gone."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil


class ReaderGone(Exception):
    """No process reads what is printed; not a failure of the connection to the daemon, as BrokenPipeError is."""


@contextmanager
def ends_with_reader() -> Iterator[None]:
    """The block ends without an error when the reader is gone: it has what it wanted."""
    try:
        yield
    except ReaderGone:
        if sys.stdout is not None:
            # Python's own flush at the exit must not fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())


def print_text(text: str) -> None:
    """Print the text as it is, at once.  Raises `ReaderGone`."""
    if sys.stdout is None:
        raise ReaderGone
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderGone from None


def wait_while_read(seconds: float) -> None:
    """Return after this time, which a sleep of the machine lengthens.  Raises `ReaderGone` once the reader is gone."""
    if sys.stdout is None:
        raise ReaderGone
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if poll.poll(max(0, ceil(seconds * 1000))):
        raise ReaderGone


def check_reader() -> None:
    """Raise `ReaderGone` if the reader is gone."""
    wait_while_read(0)
