"""The stderr of a backend that the daemon runs, copied to the daemon's log.

Built-in backends write JSON lines there, whose level and message are logged; any other line, such as a library's
message, is logged as it is.  A backend that prints without end costs the loop one read a turn, and the log a bounded
number of lines; the lines that were left out are counted.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
import os

import msgspec

from ublkpool.daemon.errors import without_name

LINE_BYTES_MAX = 65536
LINES_MAX = 500
"""Lines that one backend may log in `PERIOD_S`."""
PERIOD_S = 10.0
PAUSE_S = 0.05
"""Between two reads from a backend that has logged `LINES_MAX`: it waits meanwhile if its pipe is full."""
PARTIAL_S = 1.0
"""A line without its end is logged after this time, for nothing more may follow."""
_LAST_READS_MAX = 16
"""A dead backend's pipe holds less, unless a child of it still writes."""
_COMPLAINT = "ublkpool: "
_log = logging.getLogger("ublkpool.backend")


class _Line(msgspec.Struct):
    """A record of `daemon/logs.py`, as JSON."""

    level: str
    message: str
    traceback: str = ""


_decoder = msgspec.json.Decoder(_Line)


class BackendLog:
    """One backend process's stderr, from its first line to its end."""

    def __init__(self, device: str, reader: int) -> None:
        """Takes over `reader`, the pipe's end."""
        self._device = device
        self._rest = b""
        self._loop = asyncio.get_running_loop()
        self._reader: int | None = reader
        self.last_error = ""
        """The last line, if it was an error."""
        self.last_warning = ""
        """The last line, if it was a warning or an error."""
        self._logged = self._left_out = 0
        self._period: asyncio.TimerHandle | None = None
        self._partial: asyncio.TimerHandle | None = None
        os.set_blocking(reader, False)
        self._listen()

    def _listen(self) -> None:
        if self._reader is not None:
            self._loop.add_reader(self._reader, self._hear)

    def _hear(self) -> None:
        self._read_once()
        if self._left_out and self._reader is not None:
            self._loop.remove_reader(self._reader)
            self._loop.call_later(PAUSE_S, self._listen)

    def drain(self) -> None:
        """Log what the backend, which has ended, wrote last."""
        for _ in range(_LAST_READS_MAX):
            if not self._read_once():
                return

    def _read_once(self) -> bool:
        """Take what one read returns; whether more may follow."""
        if self._reader is None:
            return False
        try:
            text = os.read(self._reader, LINE_BYTES_MAX)
        except BlockingIOError:
            return False
        self._take(text)
        if not text:
            self._loop.remove_reader(self._reader)
            os.close(self._reader)
            self._reader = None
        return bool(text)

    def _take(self, text: bytes) -> None:
        *lines, self._rest = (self._rest + text).split(b"\n")
        # An endless line must not fill the daemon's memory; the last line may lack its newline.
        if not text or len(self._rest) > LINE_BYTES_MAX:
            lines.append(self._rest)
            self._rest = b""
        self._await_end_of_line()
        self._hear_lines([line for line in lines if line.strip()])

    def _await_end_of_line(self) -> None:
        if self._partial is not None:
            self._partial.cancel()
            self._partial = None
        # The rest of a record follows when the backend logs again: cut in two it would be no record.
        if self._rest and not self._rest.lstrip().startswith(b"{"):
            self._partial = self._loop.call_later(PARTIAL_S, self._end_line)

    def _end_line(self) -> None:
        rest, self._rest, self._partial = self._rest, b"", None
        self._hear_lines([rest])

    def _hear_lines(self, lines: list[bytes]) -> None:
        room = max(0, LINES_MAX - self._logged)
        for line in lines[:room]:
            self._log(*self._note(line))
        if len(lines) > room:
            # The last line of all may say why it ends.
            self._note(lines[-1])
            self._left_out += len(lines) - room
        self._logged += min(len(lines), room)
        if lines and self._period is None:
            self._period = self._loop.call_later(PERIOD_S, self._begin_period)

    def _begin_period(self) -> None:
        left_out, self._left_out, self._logged, self._period = self._left_out, 0, 0, None
        if left_out:
            _log.warning(
                "%s: its backend wrote more than %d lines in %g s: %d are left out here",
                *(self._device, LINES_MAX, PERIOD_S, left_out),
            )

    def _note(self, line: bytes) -> tuple[int, str, str]:
        """The line's level, message and traceback, kept as the last."""
        level, message, traceback = _read(line)
        message = without_name(self._device, message)
        self.last_error = message if level >= logging.ERROR else ""
        self.last_warning = message if level >= logging.WARNING else ""
        return level, message, traceback

    def _log(self, level: int, message: str, traceback: str) -> None:
        fields = {"traceback": traceback} if traceback else {}
        _log.log(level, "%s: %s", self._device, message, extra={"fields": fields})


def _read(line: bytes) -> tuple[int, str, str]:
    """A line's level, message and traceback."""
    try:
        record = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = line.decode(errors="replace").strip()
        # A command prefixes its line this way only if it fails.
        level = logging.ERROR if text.startswith(_COMPLAINT) else logging.INFO
        return level, text.removeprefix(_COMPLAINT), ""
    known = logging.getLevelNamesMapping()
    return known.get(record.level.upper(), logging.INFO), record.message, record.traceback
