"""The admin protocol: what a client and the daemon say to each other on `RUN_DIR/admin.sock`.

Owns the messages and their framing, for both halves.  JSON, one message a line:

    client:  {"v":1,"op":"add","device":{...}}
    daemon:  {"progress":"..."}                                 any number of times
             {"ok":true,"result":...}                           or
             {"ok":false,"error":"one line","status":1 or 2}

A connection may carry several requests, one after the other.
"""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from ublkpool.daemon.errors import ConfigError, DaemonError
from ublkpool.daemon.settings.config import DeviceConfig

ADMIN_VERSION = 1
REQUEST_BYTES_MAX = 64 * 1024
REPLY_BYTES_MAX = 64 * 1024 * 1024


class _Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", forbid_unknown_fields=True):
    v: int = ADMIN_VERSION


class AddRequest(_Request, frozen=True, kw_only=True, tag="add"):
    """Create a device; the result is its DeviceStatus."""

    device: DeviceConfig


class DeleteRequest(_Request, frozen=True, kw_only=True, tag="del"):
    """Delete devices, all with `names` null; the result is the list of names deleted."""

    names: list[str] | None
    force: bool = False


class WaitRequest(_Request, frozen=True, kw_only=True, tag="wait"):
    """Answer when a device is live; the result is its DeviceStatus.  Given up when the client hangs up."""

    name: str
    timeout_s: Annotated[float, Meta(gt=0)] | None = None


class RebindRequest(_Request, frozen=True, kw_only=True, tag="rebind"):
    """Have the next store that attaches become this device's own."""

    name: str


class ListRequest(_Request, frozen=True, kw_only=True, tag="list"):
    """The result is a list of DeviceStatus."""


class StatsRequest(_Request, frozen=True, kw_only=True, tag="stats"):
    """The result is a list of DeviceStats, of one device or all."""

    name: str | None = None


class StopRequest(_Request, frozen=True, kw_only=True, tag="stop"):
    """Stop the daemon; with `leave` its devices stay, served, for the next one."""

    leave: bool = False


class ShutdownRequest(_Request, frozen=True, kw_only=True, tag="shutdown"):
    """The machine goes down: from now on requests fail where no backend is.

    With `final` all devices are deleted, in use or not; the answer comes when they are, and then the daemon ends.
    """

    final: bool = False


Request = (
    AddRequest
    | DeleteRequest
    | WaitRequest
    | RebindRequest
    | ListRequest
    | StatsRequest
    | StopRequest
    | ShutdownRequest
)


class Progress(msgspec.Struct, frozen=True):
    """Something to show while the operation runs."""

    progress: str


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """The operation succeeded."""

    ok: bool = True
    result: object = None


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """The operation failed; `status` is the exit status for the command."""

    ok: bool = False
    error: str
    status: int


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """Any line of the daemon's, as a client reads it: `ok` is None in a progress line."""

    ok: bool | None = None
    progress: str = ""
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    status: int = 1


class _Envelope(msgspec.Struct, frozen=True):
    v: int


_encoder = msgspec.json.Encoder()
_envelope_decoder = msgspec.json.Decoder(_Envelope)
_request_decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_reply_decoder = msgspec.json.Decoder(Reply)


def admin_socket(run_dir: Path) -> Path:
    """Where the daemon of this run directory listens."""
    return run_dir / "admin.sock"


def encode_line(message: Request | Progress | Done | Failed) -> bytes:
    """One line, its newline included."""
    return _encoder.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """A client's line.  Raises `ConfigError` with a reason that names the field."""
    try:
        version = _envelope_decoder.decode(line).v
        if version == ADMIN_VERSION:
            return _request_decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"bad request: {error}"]) from error
    raise ConfigError([f"bad request: version {version}, this daemon speaks {ADMIN_VERSION}"])


def decode_reply(line: bytes) -> Reply:
    """A line of the daemon's.  Raises `DaemonError`."""
    try:
        return _reply_decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DaemonError(f"the daemon's answer makes no sense: {error}") from error
