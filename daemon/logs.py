"""The daemon's log on stderr: `human` on a terminal or in the journal, `logfmt` or `json` for machines.

Owns the formats; must not know the messages.  Fields come in `extra={"fields": {...}}`.  In systemd's journal a line
carries its priority as a prefix, and no time or level, because the journal records both.
"""

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TextIO

from ublkpool.daemon import journal
from ublkpool.daemon.settings.config import LogFormat, LogLevel

# asyncio logs the exception of a task that was never awaited.
_LOGGERS = ("ublkpool", "asyncio")


def configure(level: LogLevel, log_format: LogFormat, stream: TextIO | None = None) -> None:
    """Send the logs of ublkpool and asyncio to `stream` (default stderr); replaces the handlers of an earlier call."""
    stream = stream if stream is not None else sys.stderr
    in_journal = journal.is_journal(stream)
    if log_format == "auto":
        log_format = "human" if in_journal or stream.isatty() else "logfmt"
    handler = logging.StreamHandler(stream)
    handler.setFormatter((_JournalFormatter if in_journal else _Formatter)(_FORMATS[log_format]))
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    logging.getLogger("ublkpool").setLevel(level.upper())


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
