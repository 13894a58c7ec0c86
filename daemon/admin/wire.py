"""The admin protocol on `RUN_DIR/admin.sock`.

Owns the messages and their framing, for client and server.  JSON, one message per line:

    client:  {"v":1,"op":"add","device":{...}}
    daemon:  {"progress":"..."} or {"event":{...}}              any number of times
             {"ok":true,"result":...}                           or
             {"ok":false,"error":"one line","status":1 or 2,"code":"in-use"}

A connection may carry several requests, one after the other.  docs/ADMIN_PROTOCOL.md describes it for other programs.
"""

from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ublkpool.daemon.errors import BadAnswer, ConfigError, remote_error
from ublkpool.daemon.events.event import Event
from ublkpool.daemon.settings.config import DeviceConfig

ADMIN_VERSION = 1
REQUEST_BYTES_MAX = 64 * 1024
REPLY_BYTES_MAX = 64 * 1024 * 1024

_T = TypeVar("_T")


class _Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", forbid_unknown_fields=True):
    v: int = ADMIN_VERSION


class AddRequest(_Request, frozen=True, kw_only=True, tag="add"):
    """Create a device; the result is its DeviceStatus."""

    device: DeviceConfig
    take_over: bool | UnsetType = UNSET
    """The backend breaks its store's lock, no matter which client holds it; unset in what an earlier daemon may be
    asked, too."""


class DeleteRequest(_Request, frozen=True, kw_only=True, tag="del"):
    """Delete these devices, or all if `names` is null; the result is the list of names deleted."""

    names: list[str] | None
    force: bool = False
    keeps_stores: bool | UnsetType = UNSET
    """The names keep their stores, as at the daemon's end; unset in what an earlier daemon may be asked, too."""


class WaitRequest(_Request, frozen=True, kw_only=True, tag="wait"):
    """Answer when a device is live; the result is its DeviceStatus.  Cancelled when the client disconnects."""

    name: str
    timeout_s: Annotated[float, Meta(gt=0)] | None = None


class RebindRequest(_Request, frozen=True, kw_only=True, tag="rebind"):
    """Let the next attach give this device another store."""

    name: str


class SetRequest(_Request, frozen=True, kw_only=True, tag="set"):
    """Change settings of a device that exists, all or none, by the user's keys; the result is a list of Setting.

    Without values nothing changes.
    """

    name: str
    values: dict[str, bool | int | float | str] = {}


class ReloadRequest(_Request, frozen=True, kw_only=True, tag="reload"):
    """Read the config file again; the result is a list of Reloaded."""


class DrainRequest(_Request, frozen=True, kw_only=True, tag="drain"):
    """Have the device's requests wait and its backend leave.  Given up when the client disconnects before that."""

    name: str
    flush: bool = True
    timeout_s: Annotated[float, Meta(gt=0)] | None = None


class ResumeRequest(_Request, frozen=True, kw_only=True, tag="resume"):
    """Have the requests of a drained device served again."""

    name: str


class ResizeRequest(_Request, frozen=True, kw_only=True, tag="resize"):
    """Give a live device this size, or with `is_relative` this many bytes more; the result is a ResizeResult."""

    name: str
    size_bytes: int
    is_relative: bool = False


class ListRequest(_Request, frozen=True, kw_only=True, tag="list"):
    """Show all devices; the result is a list of DeviceStatus."""


class StatsRequest(_Request, frozen=True, kw_only=True, tag="stats"):
    """Show the counters of one device, or of all; the result is a list of DeviceStats."""

    name: str | None = None


class DaemonRequest(_Request, frozen=True, kw_only=True, tag="daemon"):
    """Show the daemon itself; the result is its DaemonStatus."""


class StopRequest(_Request, frozen=True, kw_only=True, tag="stop"):
    """End the daemon; with `leave` its workers go on serving the devices until the next daemon takes them over."""

    leave: bool = False


class ShutdownRequest(_Request, frozen=True, kw_only=True, tag="shutdown"):
    """Announce the machine's shutdown: from now on the requests of a device without a backend fail after a few seconds.

    With `final` the daemon deletes all devices, in use or not, then answers and ends.
    """

    final: bool = False


class EventsRequest(_Request, frozen=True, kw_only=True, tag="events"):
    """Tell the events with a number above `after`, of these devices, each on a line of its own (`Told`), oldest first.

    With `follow` also those to come, until the client disconnects or the daemon ends, which answers then.
    """

    after: Annotated[int, Meta(ge=0)] = 0
    names: list[str] | None = None
    since: Annotated[str, Meta(max_length=64)] = ""
    """A time as in `Event.time`; older events are left out."""
    follow: bool = False


Request = (
    AddRequest
    | DeleteRequest
    | WaitRequest
    | RebindRequest
    | SetRequest
    | DrainRequest
    | ReloadRequest
    | ResumeRequest
    | ResizeRequest
    | ListRequest
    | StatsRequest
    | DaemonRequest
    | StopRequest
    | ShutdownRequest
    | EventsRequest
)


class Progress(msgspec.Struct, frozen=True):
    """A text to show while the operation runs."""

    progress: str


class Told(msgspec.Struct, frozen=True):
    """An event, see `daemon/events/event.py`."""

    event: msgspec.Raw


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """The operation succeeded."""

    ok: bool = True
    result: object = None


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """The operation failed; `status` is the exit status for the command.

    `code` is one of `daemon/errors.py`; with `version` the daemon `speaks` that one.  This object has the same fields
    in every version of the protocol, so that each version can read the other's refusal.
    """

    ok: bool = False
    error: str
    status: int
    code: str | UnsetType = UNSET
    speaks: int | UnsetType = UNSET


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon's line as the client decodes it: Progress or Told (`ok` is None), Done or Failed."""

    ok: bool | None = None
    progress: str = ""
    event: Event | None = None
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    status: int = 1
    code: str = ""
    speaks: int | None = None


class _Envelope(msgspec.Struct, frozen=True):
    v: int


_encoder = msgspec.json.Encoder()
_envelope_decoder = msgspec.json.Decoder(_Envelope)
_request_decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_reply_decoder = msgspec.json.Decoder(Reply)


def admin_socket(run_dir: Path) -> Path:
    """The path of this run directory's admin socket."""
    return run_dir / "admin.sock"


def encode_line(message: Request | Progress | Told | Done | Failed) -> bytes:
    """The message as one line with its newline."""
    return _encoder.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """The request in a client's line.  Raises `ConfigError` with a reason that names the field."""
    try:
        version = _envelope_decoder.decode(line).v
        if version == ADMIN_VERSION:
            return _request_decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError([f"bad request: {error}"], code="bad-request") from error
    text = f"bad request: version {version}, this daemon speaks {ADMIN_VERSION}"
    raise ConfigError([text], code="version")


def decode_reply(line: bytes) -> Reply:
    """The message in a daemon's line.  Raises `BadAnswer`."""
    try:
        return _reply_decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadAnswer(f"the daemon's answer makes no sense: {error}") from error


def result_of(reply: Reply, result: type[_T] | None) -> _T:
    """What the daemon answered.  Raises its `RemoteError`, or `BadAnswer`."""
    if not reply.ok:
        raise remote_error(reply.error, reply.status, reply.code, reply.speaks)
    try:
        answer: _T = msgspec.json.decode(reply.result, type=result)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadAnswer(f"the daemon's answer makes no sense: {error}") from error
    return answer
