"""The interface of both transports: a backend's links to the queues of its device.

Owns the protocol that `zeromq_links.py` and `ring_links.py` implement.  Each queue has one link: frames travel on it, a
HELLO opens it, also to a worker's successor, and its end says that the worker has ended.  One thread uses the links.
"""

import select
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import msgspec

from ublkpool.bufpool import wire

_FENCE = int(wire.Kind.FENCE)


class Polled(NamedTuple):
    """The result of `Links.poll`: queues with frames, and watched file descriptors."""

    queues: list[int]
    descriptors: list[int]


class LinkStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of the links since they were made; over rings a frame is what was read or written at once."""

    frames_received: int
    frames_sent: int
    bytes_received: int
    bytes_sent: int
    reconnects: int


class Links(Protocol):
    """The links to a device's queues, over one transport."""

    def watch(self, descriptor: int, events: int = select.POLLIN) -> None:
        """Let `poll` report this file descriptor too; `events` as of `select.poll`."""

    def unwatch(self, descriptor: int) -> None:
        """Undo `watch`."""

    def poll(self, timeout_ms: int | None = None) -> Polled:
        """Wait for frames or watched descriptors, for ever if `timeout_ms` is None; may return early with nothing.

        Sends HELLO to the successor of a worker that has ended.  Raises `WireError` if a worker sends what the protocol
        does not allow, and `BackendError` if a queue's socket stays out of reach (`doors.py`).
        """

    def drive(self, engine: Any, serve: Callable[[], None] = ...) -> bool:
        """Let `poll` drive this native engine (`csrc/engine.h`) in C, until `drive(None)`.

        `serve` is called for each batch that the engine hands out; the rest needs no Python.  Returns False if these
        links cannot drive an engine.  With None, answers that found no room in a ring are sent first, within a bound.
        """

    @property
    def linked(self) -> int:
        """How many queues have a worker at the other end."""

    def frames(self, queue: int) -> Iterator[bytes]:
        """The frames that have arrived on a queue, up to a bound, so that the other queues get their turn."""

    def send_frame(self, queue: int, frame: bytes) -> None:
        """Send a frame as it stands.  Never waits, and drops nothing while the worker lives."""

    def stop_receiving(self) -> None:
        """Read no more frames and make no more connections; unread requests go to the successor."""

    def statistics(self) -> LinkStatistics:
        """Counters since the links were made."""

    def close(self) -> None:
        """Send what is queued, within a bound, then end every link."""


class Handshakes:
    """Which queues have a worker, for a transport that connects by itself and keeps the first HELLO until then."""

    def __init__(self, queues: int) -> None:
        self._counts = [0] * queues
        self._linked: set[int] = set()

    def changed(self, queue: int, up: bool) -> bool:
        """Note that a connection was made or ended; returns whether a new worker must be sent a HELLO."""
        if not up:
            self._linked.discard(queue)
            return False
        self._linked.add(queue)
        self._counts[queue] += 1
        return self._counts[queue] > 1

    def has(self, queue: int) -> bool:
        """Whether this queue has a worker."""
        return queue in self._linked

    @property
    def linked(self) -> int:
        """How many queues have a worker."""
        return len(self._linked)

    @property
    def reconnects(self) -> int:
        """How many workers came after the first."""
        return sum(max(0, count - 1) for count in self._counts)


def hello(attached: wire.Attached, queue: int, epoch: int) -> bytes:
    """The frame that opens a link."""
    return wire.Descriptor(wire.Kind.HELLO, device=attached.device_number, queue=queue, epoch=epoch).pack()


def epoch_after(frame: bytes, epoch: int) -> int:
    """The epoch that a HELLO carries after this frame: that of the latest FENCE."""
    kinds = frame[:: wire.DESCRIPTOR_BYTES]
    if _FENCE not in kinds:
        return epoch
    starts = [at * wire.DESCRIPTOR_BYTES for at, kind in enumerate(kinds) if kind == _FENCE]
    return max(epoch, *(int.from_bytes(frame[start + 12 : start + 16], "little") for start in starts))


def unread_max(attached: wire.Attached) -> int:
    """The most descriptors of an honest backend that a queue's worker can have left unread.

    They are an answer for each tag, a POST for each tag and size, HELLO and FENCED.
    """
    return attached.depth * (1 + len(attached.post_bytes)) + 2


def unread(queue: int, attached: wire.Attached) -> str:
    """The reason of the error that ends a link with more than `unread_max` descriptors unread."""
    return f"queue {queue}: more than {unread_max(attached)} answers wait: its worker reads nothing"
