"""One event, and its line in the file, on the admin socket and in `ublkpool events --json`.

Owns the form of the line: JSON on one line of bounded length.  A reader accepts codes and fields that it does not know,
because an event may be of another version of ublkpool.
"""

import json
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ublkpool.daemon.events.kinds import Details, Severity, kinds

TEXT_MAX = 500
LINE_BYTES_MAX = 16384
SEQ_MAX = 1 << 62
"""A damaged file must not use the numbers up."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to `device`, or to the daemon if that is empty."""

    seq: Annotated[int, Meta(ge=0, le=SEQ_MAX)]
    """Rises with every event, over restarts of the daemon, too; not by one."""
    time: str
    """The wall clock in UTC with milliseconds, such as 2026-11-26T15:44:25.123Z: two of them compare as texts."""
    code: str
    device: str
    severity: Severity
    text: str
    """For people, as in the log."""
    details: dict[str, Any] = {}

    def typed(self) -> Details | None:
        """The details as the class of this code; None for a code or for fields of another version."""
        kind = kinds().get(self.code)
        try:
            return None if kind is None else msgspec.convert(self.details, kind)
        except msgspec.ValidationError:
            return None


_decoder = msgspec.json.Decoder(Event)


def make_event(
    seq: int, wall_s: float, device: str, details: Details, text: str, severity: Severity | None
) -> Event:
    """The event; `wall_s` is the wall clock in seconds since the epoch."""
    return Event(
        seq=seq,
        time=shown_time(wall_s),
        code=details.code,
        device=device,
        severity=severity or details.severity,
        text=plain(text),
        details={name: _bounded(value) for name, value in msgspec.to_builtins(details).items()},
    )


def shown_time(wall_s: float) -> str:
    """These seconds since the epoch as an event has them."""
    moment = datetime.fromtimestamp(wall_s, UTC).replace(tzinfo=None)
    return moment.isoformat(timespec="milliseconds") + "Z"


def plain(text: str) -> str:
    """The text on one line of bounded length, printable characters only: part of it may be a backend's."""
    line = "".join(each if each.isprintable() else "?" for each in text[: TEXT_MAX + 1])
    return line if len(line) <= TEXT_MAX else f"{line[: TEXT_MAX - 3]}..."


def encode(event: Event) -> bytes:
    """The event's line with its newline."""
    return msgspec.json.encode(event) + b"\n"


def decode(line: bytes) -> Event | None:
    """The event of a line; None if the line is none, such as one that was cut short."""
    if len(line) > LINE_BYTES_MAX:
        return None
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def render(event: Event) -> str:
    """The event as one line for people."""
    day, _, time = event.time.partition("T")
    device = plain(event.device) or "-"
    head = f"{plain(day)} {plain(time.removesuffix('Z'))} {event.severity:7} {device:12}"
    return f"{head} {plain(event.code):18} {plain(event.text)}"


def render_json(event: Event) -> str:
    """The event as one line for scripts; other than ASCII characters are escaped, so that no terminal acts on them."""
    return json.dumps(msgspec.to_builtins(event))


def _bounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _bounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_bounded(each) for each in value]
    return plain(value) if isinstance(value, str) else value
