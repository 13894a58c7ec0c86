"""The daemon's commands to the broker, and the broker's replies.

Owns both and their encoding; `broker.py` executes the commands.

A SOCK_SEQPACKET socketpair; each packet is one `Command`, answered by one `Reply` in order, which repeats the
command's `id`.  An `id` of 0 is not sent: brokers and daemons of earlier versions know none.  `AddDevice` brings the
control segment's descriptor.  After a restart of the broker: `AddDevice`, then `Reclaim` for workers that have died,
then `Register` for every worker that lives.  `Reclaim` must come before the `Register` of the next epoch, and only when
no process uses the dead worker's buffers any more.
"""

import msgspec

from ublkpool.bufpool.errors import WireError
from ublkpool.bufpool.pool.lease import LeaseStatistics

COMMAND_BYTES_MAX = 65536


class _Packet(msgspec.Struct, tag_field="type", frozen=True, omit_defaults=True):
    """A command or a reply."""


class _Command(_Packet, frozen=True, forbid_unknown_fields=True):
    """A command; a broker of another version refuses one with fields that it does not know."""


class AddDevice(
    msgspec.Struct,
    tag="add_device",
    tag_field="type",
    frozen=True,
    omit_defaults=True,
    forbid_unknown_fields=True,
):
    """Serve this device; its control segment's descriptor travels with the packet."""

    device_number: int
    id: int = 0


class RemoveDevice(
    msgspec.Struct,
    tag="remove_device",
    tag_field="type",
    frozen=True,
    omit_defaults=True,
    forbid_unknown_fields=True,
):
    """Forget the device and unmap its control segment."""

    device_number: int
    id: int = 0


class Register(
    msgspec.Struct,
    tag="register",
    tag_field="type",
    frozen=True,
    omit_defaults=True,
    forbid_unknown_fields=True,
):
    """This worker is alive, or about to start."""

    device_number: int
    queue: int
    epoch: int
    id: int = 0


class Reclaim(
    msgspec.Struct,
    tag="reclaim",
    tag_field="type",
    frozen=True,
    omit_defaults=True,
    forbid_unknown_fields=True,
):
    """This worker is dead, and no process uses its buffers."""

    device_number: int
    queue: int
    epoch: int
    id: int = 0


class GetStatistics(
    msgspec.Struct,
    tag="statistics",
    tag_field="type",
    frozen=True,
    omit_defaults=True,
    forbid_unknown_fields=True,
):
    """The broker's counters, and one device's leases if it is named."""

    device_number: int | None = None
    id: int = 0


class Ping(_Command, tag="ping", frozen=True):
    """Answer with this number: a new daemon drops all replies before it, which its predecessor had asked for."""

    number: int
    id: int = 0


class Stop(_Command, tag="stop", frozen=True):
    """Answer, then end."""

    id: int = 0


Command = AddDevice | RemoveDevice | Register | Reclaim | GetStatistics | Ping | Stop


class BrokerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the broker started: messages and frames, then those that were not valid."""

    messages: int = 0
    frames: int = 0
    malformed: int = 0
    """Frames that the wire format does not allow, or of a kind that no worker sends."""
    mismatched: int = 0
    """Frames whose device, queue or epoch are not the sender's."""
    unknown_worker: int = 0
    """Messages of unregistered senders: a dead epoch, a removed device, garbage."""
    out_of_sync: int = 0
    """Frames dropped because a SYNC is due, or no longer due."""
    asked: int = 0
    undeliverable: int = 0
    replies_dropped: int = 0


class Done(_Packet, tag="done", frozen=True):
    """The command was executed.  `slots`: how many buffers a Reclaim took back."""

    slots: int = 0
    id: int = 0


class Failed(_Packet, tag="failed", frozen=True):
    """The command failed, and nothing has changed."""

    reason: str
    id: int = 0


class StatisticsReply(_Packet, tag="statistics", frozen=True):
    """The answer to `GetStatistics`."""

    broker: BrokerStatistics
    devices: tuple[int, ...]
    leases: LeaseStatistics | None = None
    id: int = 0


class Pong(_Packet, tag="pong", frozen=True):
    """The answer to `Ping`."""

    number: int
    id: int = 0


Reply = Done | Failed | StatisticsReply | Pong
_encoder = msgspec.json.Encoder()
_command_decoder: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
_reply_decoder: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


def encode(packet: Command | Reply) -> bytes:
    """One packet; the control segment's descriptor travels beside it."""
    return _encoder.encode(packet)


def decode_command(packet: bytes) -> Command:
    """Decode at the broker.  Raises `msgspec.DecodeError`, `UnicodeDecodeError`, `RecursionError`."""
    return _command_decoder.decode(packet)


def decode_reply(packet: bytes) -> Reply:
    """Decode at the daemon.  Raises `WireError`."""
    try:
        return _reply_decoder.decode(packet)
    except msgspec.DecodeError as error:
        raise WireError(f"broker: {error}") from error
