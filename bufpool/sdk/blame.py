"""Where in the author's own code an exception comes from, and the error that names that line.  Pure.

The SDK calls the author's code, which calls libraries: the line to look at is the deepest one of the author's own.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

from ublkpool.bufpool.errors import PoolError

_LIBRARIES = ("site-packages", "dist-packages")


class PluginError(PoolError):
    """The author's code raised an exception while the backend was started or ended; the text names the line."""


def line_of(error: BaseException) -> str:
    """`FILE.py:12` of the author's code in which `error` was raised; empty if it has no traceback.

    For a SyntaxError it is the line that Python could not read.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno or 0}"
    frames = list(_frames(error.__traceback__))
    return _deepest_of_author(frames) or (str(frames[-1]) if frames else "")


def lines_of_threads() -> str:
    """The lines of the author's code that the SDK's calls are in now, on every thread but this one."""
    stacks = [
        list(_stack(frame))
        for thread, frame in sys._current_frames().items()
        if thread != threading.get_ident()
    ]
    called = [each for each in stacks if any(frame.is_ours for frame in each)]
    return ", ".join(sorted(set(filter(None, map(_deepest_of_author, called)))))


def _deepest_of_author(frames: "list[_Frame]") -> str:
    theirs = [each for each in frames if not each.is_ours and not each.is_python_s]
    if not theirs:
        return ""
    home = Path(theirs[0].file).parent
    return str([each for each in theirs if _is_below(each.file, home)][-1])


def words_of(error: BaseException) -> str:
    """The exception's class and text, in one line."""
    try:
        text = " ".join(str(error).split())
    except Exception as another:
        # A request is answered also if the class of its exception has a bug.
        text = f"its __str__ raised {type(another).__name__}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def blamed(error: BaseException) -> str:
    """The author's line, the exception's class and its text, in one line."""
    place = line_of(error)
    return f"{place}: {words_of(error)}" if place else words_of(error)


@contextmanager
def authors_code(doing: str) -> Iterator[None]:
    """Turn an exception of the author's code into a `PluginError` that names the line; `doing` ends its text.

    An `OSError` and the package's own errors pass: they have texts of their own.
    """
    try:
        yield
    except (OSError, PoolError):
        raise
    except Exception as error:
        raise PluginError(f"{blamed(error)} ({doing})") from error


class _Frame(NamedTuple):
    file: str
    line: int
    is_ours: bool
    is_python_s: bool
    """Whether it is of Python's own library."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def _frames(trace: TracebackType | None) -> Iterator[_Frame]:
    while trace is not None:
        yield from _frame(trace.tb_frame, trace.tb_lineno)
        trace = trace.tb_next


def _stack(frame: FrameType | None) -> list[_Frame]:
    found: list[_Frame] = []
    while frame is not None:
        found = [*_frame(frame, frame.f_lineno), *found]
        frame = frame.f_back
    return found


def _frame(frame: FrameType, line: int) -> Iterator[_Frame]:
    name, file = str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename
    if not file.startswith("<"):
        package = name.partition(".")[0]
        yield _Frame(
            file, line, package == "ublkpool" and name != package, package in sys.stdlib_module_names
        )


def _is_below(file: str, directory: Path) -> bool:
    """Whether the file is in this directory and no library that is installed below it."""
    try:
        rest = Path(file).relative_to(directory)
    except ValueError:
        return False
    return not any(each in rest.parts for each in _LIBRARIES)
