"""What a backend's author prints, as lines of the log.

The daemon runs a backend with one pipe for its log and its output: a printed line becomes a record, so that it cannot
run into a record of the log, and a pipe that is full stops no backend.  Elsewhere a printed line is written at once.
"""

import io
import logging
import os
import sys
from typing import Any

_log = logging.getLogger("print")
_LINE_BYTES_MAX = 16384


class _Lines(io.RawIOBase):
    """Logs each complete line that is written, and what is left when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self._rest = b""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def write(self, text: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        *lines, self._rest = (self._rest + bytes(text)).split(b"\n")
        for line in lines:
            self._say(line)
        if len(self._rest) > _LINE_BYTES_MAX:
            self.say_rest()
        return len(text)

    def say_rest(self) -> None:
        """Log the line that has no end yet."""
        rest, self._rest = self._rest, b""
        self._say(rest)

    def _say(self, line: bytes) -> None:
        for start in range(0, len(line.rstrip()), _LINE_BYTES_MAX):
            piece = line[start : start + _LINE_BYTES_MAX]
            _log.info("%s", piece.decode(errors="replace").rstrip())


class _Printed(io.TextIOWrapper):
    """A stdout whose lines are logged; `flush` logs a line without its end, as `print(..., flush=True)` asks for."""

    def __init__(self) -> None:
        self._lines = _Lines()
        raw: Any = self._lines
        super().__init__(io.BufferedWriter(raw, 1), encoding="utf-8", errors="replace", write_through=True)

    def write(self, text: str) -> int:
        count = super().write(text)
        self.buffer.flush()
        return count

    def flush(self) -> None:
        super().flush()
        if not self.closed:
            self._lines.say_rest()


def show_at_once() -> None:
    """Let what this process prints appear line by line, in the log if that goes to the same pipe as stdout."""
    if _is_one_pipe():
        sys.stdout = _Printed()
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)


def _is_one_pipe() -> bool:
    try:
        if sys.stdout.fileno() != 1 or os.isatty(1):
            return False
        return os.path.sameopenfile(1, 2)
    except (AttributeError, OSError, ValueError):
        return False
