"""Where a queue's backend, a process of its own, comes in: ZeroMQ frames or rings in shared memory.

Owns that one backend is expected at both, and which descriptors wake the worker for them.
"""

from collections.abc import Callable

from ublkpool.bufpool.wire import Grown, Resized
from ublkpool.ublk.queue import WATCH_SHIFT, IoUring
from ublkpool.workers.backend_link import BackendLink
from ublkpool.workers.ring_link import RingLink

WATCH_FRAMES = 2
"""The first of the watches: of frames, of the gate, of the monitor (`BackendLink.filenos`)."""
_WATCH_RINGS = WATCH_FRAMES + 3
RINGS = 1 << WATCH_SHIFT + _WATCH_RINGS
_CONNECTIONS = 0b11 << WATCH_SHIFT + WATCH_FRAMES + 1
"""A connection came or ended: the second and third descriptor of `BackendLink.filenos`."""


class BackendDoors:
    """Both transports of one queue."""

    def __init__(self, frames: BackendLink, rings: RingLink) -> None:
        self.frames = frames
        self.rings = rings

    def serve_on(self, ring: IoUring) -> None:
        """Wake through this io_uring, and move the rings' descriptors through it."""
        for number, fd in enumerate(self.frames.filenos(), WATCH_FRAMES):
            ring.watch(number, fd)
        ring.watch(_WATCH_RINGS, self.rings.fileno())
        self.rings.serve_on(ring)

    @property
    def token(self) -> str:
        """The token of the expected or serving backend, hexadecimal; empty without one."""
        return self.frames.token.hex()

    @property
    def needs_looks(self) -> bool:
        """Whether something may be to be done that no watch announces."""
        return self.frames.is_full

    def failure(self) -> str:
        """Empty: a backend's end is no failure of its worker."""
        return ""

    is_excluded = False
    """See `EngineConnected`: a backend's process tells the daemon itself."""

    def connect(self, done: Callable[[str, str], None], grown: Callable[[Resized | Grown], None]) -> None:
        """Nothing: the store is the backend's."""
        done("", "this worker has no store")

    def grow(self, size_bytes: int) -> None:
        """Nothing: the daemon asks the backend itself."""

    def serve(self) -> None:
        """Nothing: a backend greets the queue itself."""

    def leave(self) -> None:
        """Nothing: the process's end does what is to be done."""

    def expect(self, token: bytes, user: int | None = None) -> None:
        """Accept this backend over either transport; b"" and None: no backend.  Raises `OSError`, `zmq.ZMQError`."""
        self.rings.expect(token, user)
        self.frames.expect(token, user)
        self.frames.is_idle = False

    def resize(self, size_bytes: int) -> None:
        """Nothing: a backend learns it from its SDK."""

    def take_places(self) -> None:
        """Make the sockets now, since this process is about to give up the right to."""
        self.frames.take_place()
        self.rings.take_place()

    def turn(self, bits: int) -> bool:
        """Handle what the watches in `bits` announce; whether there is more to do at once."""
        if bits & RINGS:
            self.rings.turn()
            self.frames.is_idle = self.rings.is_open
        return self.frames.turn(not bits or bool(bits & _CONNECTIONS))

    def close(self) -> None:
        """Close both."""
        self.rings.close()
        self.frames.close()
