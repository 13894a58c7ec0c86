"""How the daemon logs: to stderr, for people on a terminal, as logfmt or JSON for machines.

Owns the formats; must not know what is logged.  Fields come in `extra={"fields": {...}}`.
"""

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TextIO

from ublkpool.daemon.config import LogFormat, LogLevel


def configure(level: LogLevel, log_format: LogFormat, stream: TextIO | None = None) -> None:
    """Send everything logged below `ublkpool` to `stream` (stderr); replaces what an earlier call set up."""
    stream = stream if stream is not None else sys.stderr
    if log_format == "auto":
        log_format = "human" if stream.isatty() else "logfmt"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter(_FORMATS[log_format]))
    logger = logging.getLogger("ublkpool")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())


Fields = dict[str, object]


class _Formatter(logging.Formatter):
    def __init__(self, render: Callable[[Fields], str]) -> None:
        super().__init__()
        self._render = render

    def format(self, record: logging.LogRecord) -> str:
        fields: Fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name.removeprefix("ublkpool."),
            "message": record.getMessage(),
        }
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return self._render(fields)


def _human(fields: Fields) -> str:
    shown = dict(fields)
    time, level = str(shown.pop("time"))[11:23], shown.pop("level")
    head = f"{time} {level:7} {shown.pop('logger')}: {shown.pop('message')}"
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
