"""The stderr of a backend that the daemon runs, copied to the daemon's log.

Built-in backends write JSON lines there, whose level and message are logged; any other line, such as a library's
message, is logged as it is.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
import os

import msgspec

from ublkpool.daemon.errors import without_name

LINE_BYTES_MAX = 65536
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
        os.set_blocking(reader, False)
        self._loop.add_reader(reader, self.hear)

    def hear(self) -> None:
        """Log every line that has come."""
        while self._reader is not None:
            try:
                text = os.read(self._reader, LINE_BYTES_MAX)
            except BlockingIOError:
                return
            self._take(text)
            if not text:
                self._loop.remove_reader(self._reader)
                os.close(self._reader)
                self._reader = None

    def _take(self, text: bytes) -> None:
        *lines, self._rest = (self._rest + text).split(b"\n")
        # An endless line must not fill the daemon's memory; the last line may lack its newline.
        if not text or len(self._rest) > LINE_BYTES_MAX:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            if line.strip():
                self._say(line)

    def _say(self, line: bytes) -> None:
        level, message, traceback = _read(line)
        message = without_name(self._device, message)
        self.last_error = message if level >= logging.ERROR else ""
        self.last_warning = message if level >= logging.WARNING else ""
        fields = {"traceback": traceback} if traceback else {}
        _log.log(level, "%s: %s", self._device, message, extra={"fields": fields})


def _read(line: bytes) -> tuple[int, str, str]:
    """A line's level, message and traceback."""
    try:
        record = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = line.decode(errors="replace").strip()
        # A command prefixes its line this way only if it fails.
        level = logging.ERROR if text.startswith(_COMPLAINT) else logging.INFO
        return level, text.removeprefix(_COMPLAINT), ""
    known = logging.getLevelNamesMapping()
    return known.get(record.level.upper(), logging.INFO), record.message, record.traceback
