"""Random messages at a queue's transport, from its backend and from a stranger, over a real socket."""

import random

from support.fakes.link_wire import HELLO, TOKEN, Wire
from ublkpool.bufpool.wire import DESCRIPTOR_BYTES, DESCRIPTORS_PER_FRAME_MAX
from ublkpool.ublk.queue import Attention, LinkState

BATCH = 40
SIZES = (0, 1, 63, 64, 65, 128, 4096, DESCRIPTOR_BYTES * DESCRIPTORS_PER_FRAME_MAX)


class LinkFuzz:
    """A queue's link; after a violation cuts the backend off, the backend says HELLO again on the same connection."""

    def __init__(self, rng: random.Random, wire: Wire) -> None:
        self.rng, self.wire = rng, wire
        self.heard = 0
        self._input = wire.desk.queue.input
        wire.serve()
        wire.desk.queue.input = self._count  # type: ignore[method-assign]
        self._stranger = wire.connect(b"S" * 16)

    def play(self, messages: int) -> None:
        """Send `messages` messages; the link counts each once, as a stranger's or as judged by the queue."""
        sent = 0
        while sent < messages:
            for _ in range(BATCH):
                self._send()
            sent += BATCH
            self.wire.until(lambda all_sent=sent: self._turned() == all_sent, f"{sent} messages are counted")  # type: ignore[misc]
        assert not self.wire.desk.queue.attention() & Attention.FAULT

    def _count(self, frame: bytes | memoryview) -> None:
        self.heard += 1
        self._input(frame)
        if self.wire.desk.queue.link is not LinkState.UP:
            self._again()

    def _again(self) -> None:
        queue = self.wire.desk.queue
        assert queue.link is LinkState.CUT and queue.has_violation
        queue.lost()
        self.wire.desk.expect()
        self._input(HELLO)
        self.wire.desk.send()

    def _turned(self) -> int:
        return self.heard + int(self.wire.statistics.strangers)

    def _send(self) -> None:
        rng = self.rng
        sender = self._stranger if rng.random() < 0.3 else self.wire.backend
        parts = [self._part() for _ in range(rng.choice((1, 1, 1, 1, 2, 3, 9)))]
        sender.send_multipart(parts)

    def _part(self) -> bytes:
        rng = self.rng
        # The largest is rare: it costs as much as thousands of the others.
        size = SIZES[-1] if rng.random() < 0.002 else rng.choice(SIZES[:-1])
        if rng.random() < 0.2:
            return rng.choice((TOKEN, HELLO, HELLO * 3))
        return rng.randbytes(size)
