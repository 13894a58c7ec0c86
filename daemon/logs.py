"""The daemon's log on stderr: `human` on a terminal or in the journal, `logfmt` or `json` for machines.

Owns the formats; must not know the messages.  Fields come in `extra={"fields": {...}}`.  In systemd's journal a line
carries its priority as a prefix, and no time or level, because the journal records both.  A pipe or socket that nothing
reads stops no device: lines that it has no room for are dropped and counted.
"""

import json
import logging
import os
import select
import socket
import stat
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TextIO

from ublkpool.daemon import journal
from ublkpool.daemon.settings.config import LogFormat, LogLevel

# asyncio logs the exception of a task that was never awaited.
_LOGGERS = ("ublkpool", "asyncio")
# Libraries that log each of their requests: a backend would log each of its own.
_CHATTY = ("httpx", "boto3", "botocore")


def configure(
    level: LogLevel, log_format: LogFormat, stream: TextIO | None = None, *, all_loggers: bool = False
) -> None:
    """Send the logs of ublkpool and asyncio to `stream` (default stderr); replaces the handlers of an earlier call.

    `all_loggers`: also those of every other logger, such as a backend author's own, and Python's warnings.
    """
    stream = stream if stream is not None else sys.stderr
    in_journal = journal.is_journal(stream)
    if log_format == "auto":
        log_format = "human" if in_journal or stream.isatty() else "logfmt"
    handler = _Handler(stream)
    handler.setFormatter((_JournalFormatter if in_journal else _Formatter)(_FORMATS[log_format]))
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    logging.getLogger("ublkpool").setLevel(level.upper())
    if all_loggers:
        root = logging.getLogger()
        root.handlers[:] = [*(each for each in root.handlers if not isinstance(each, _Handler)), handler]
        root.setLevel(level.upper())
        logging.captureWarnings(True)
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)


class _Handler(logging.StreamHandler[TextIO]):
    """Waits for no reader: what a pipe or socket does not take at once is kept, up to one record; the next are lost."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._put = _put_for(stream)
        self._rest = b""
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self._put is None:
            super().emit(record)
            return
        try:
            self._push()
            if self._rest:
                self._lost += 1
                return
            self._rest = self._loss() + self._line(record)
            self._push()
        except Exception:
            self.handleError(record)

    def _loss(self) -> bytes:
        lost, self._lost = self._lost, 0
        if not lost:
            return b""
        words = "%d lines of this log were lost: nothing read it"
        return self._line(logging.LogRecord("ublkpool.log", logging.WARNING, "", 0, words, (lost,), None))

    def _line(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + "\n").encode(errors="backslashreplace")

    def _push(self) -> None:
        assert self._put is not None
        while self._rest and (count := self._put(self._rest)):
            self._rest = self._rest[count:]


def _put_for(stream: TextIO) -> Callable[[bytes], int] | None:
    """What writes to this stream without waiting and returns how much it took; None if a write never waits long."""
    try:
        fd = stream.fileno()
        kind = os.fstat(fd).st_mode
    except (OSError, ValueError):
        return None
    if stat.S_ISFIFO(kind):
        return lambda text: _put_into_pipe(fd, text)
    return (lambda text: _send(fd, text)) if stat.S_ISSOCK(kind) else None


def _put_into_pipe(fd: int, text: bytes) -> int:
    # O_NONBLOCK would hold for every process that shares the open file.
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return os.write(fd, text[: select.PIPE_BUF]) if poll.poll(0) else 0


def _send(fd: int, text: bytes) -> int:
    sock = socket.socket(fileno=fd)
    try:
        return sock.send(text, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return 0
    finally:
        sock.detach()


Fields = dict[str, object]


class _Formatter(logging.Formatter):
    def __init__(self, render: Callable[[Fields], str]) -> None:
        super().__init__()
        self._render = render

    def format(self, record: logging.LogRecord) -> str:
        return self._render(self._head(record) | self._body(record))

    def _head(self, record: logging.LogRecord) -> Fields:
        return {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }

    def _body(self, record: logging.LogRecord) -> Fields:
        fields: Fields = {"logger": record.name.removeprefix("ublkpool."), "message": record.getMessage()}
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return fields


class _JournalFormatter(_Formatter):
    """Omits the time, which the journal records, and turns the level into the line's prefix."""

    def format(self, record: logging.LogRecord) -> str:
        return journal.with_priority(super().format(record), journal.priority_of(record.levelno))

    def _head(self, record: logging.LogRecord) -> Fields:
        return {}


def _human(fields: Fields) -> str:
    shown = dict(fields)
    head = f"{shown.pop('logger')}: {shown.pop('message')}"
    if "time" in shown:
        head = f"{str(shown.pop('time'))[11:23]} {shown.pop('level'):7} {head}"
    traceback = shown.pop("traceback", None)
    tail = "".join(f" {key}={_quoted(value)}" for key, value in shown.items())
    return head + tail + (f"\n{traceback}" if traceback else "")


def _logfmt(fields: Fields) -> str:
    return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())


def _quoted(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and not any(each in ' "=' for each in text)
    return text if plain and text else json.dumps(text)


_FORMATS: dict[str, Callable[[Fields], str]] = {
    "human": _human,
    "logfmt": _logfmt,
    "json": lambda fields: json.dumps(fields, default=str),
}
