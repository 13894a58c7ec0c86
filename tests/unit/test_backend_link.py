"""The worker's transport: what a backend does not read stays bounded."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from support.queue_desk import Desk
from support.queue_rig import DEVICE
from ublkpool.bufpool.wire import Descriptor, Kind
from ublkpool.ublk.queue import Attention, Link
from ublkpool.workers.backend_link import BackendLink

TOKEN = b"T" * 16
REQUESTS_MAX = 20_000
WAIT_MS = 10_000


class Wire:
    """A queue's link over a real socket, and a backend's socket that the test reads or does not."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", path: Path) -> None:
        self.desk = Desk(need_get_data=False, depth=1)
        self.link = BackendLink(context, path, self.desk.queue, 0o600, None)
        self.link.expect(TOKEN)
        self.backend = context.socket(zmq.DEALER)
        self.backend.setsockopt(zmq.ROUTING_ID, TOKEN)
        self.backend.setsockopt(zmq.RCVHWM, 1)
        self.backend.setsockopt(zmq.LINGER, 0)
        self.backend.connect(f"ipc://{path}")
        # The worker must know the connection before it can send: any frame of ours will do.
        stale = Descriptor(Kind.DONE, device=DEVICE, epoch=2)
        self.backend.send(stale.pack())
        for _ in range(WAIT_MS):
            self.link.turn()
            if self.desk.side.statistics.stale_answers:
                return
            time.sleep(0.001)
        raise AssertionError("no frame came")

    def guess(self, sequence: int) -> None:
        """A request comes; the backend answers it without having read it."""
        self.desk.read(0, 0)
        self.link.turn()
        done = Descriptor(Kind.DONE, device=DEVICE, epoch=3, sequence=sequence, result=512)
        self.desk.queue.input(done.pack())
        self.desk.driver.consume()

    def is_full(self) -> bool:
        return bool(self.desk.queue.output()) and not self.desk.queue.attention() & Attention.OUTPUT


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    wire = Wire(context, tmp_path / "q0")
    yield wire
    wire.link.close()
    wire.backend.close()
    context.term()


def test_a_backend_that_answers_what_it_does_not_read_is_cut_off(wire: Wire) -> None:
    for sequence in range(1, REQUESTS_MAX):
        wire.guess(sequence)
        if wire.desk.queue.link is not Link.UP:
            break
    assert wire.desk.queue.link is Link.CUT, "a pipe without bounds"
    assert wire.desk.side.statistics.violations == 1


def test_a_full_pipe_delays_and_loses_nothing(wire: Wire) -> None:
    sequence = 0
    while not wire.is_full():
        sequence += 1
        assert sequence < REQUESTS_MAX
        wire.guess(sequence)
        wire.link.turn()
    seen: list[int] = []
    while len(seen) < sequence:
        assert wire.backend.poll(WAIT_MS), f"{len(seen)} of {sequence} came"
        frame = wire.backend.recv()
        seen += [int.from_bytes(frame[at + 16 : at + 24], "little") for at in range(0, len(frame), 64)]
        wire.link.turn()
    assert seen == list(range(1, sequence + 1))
    assert wire.desk.queue.link is Link.UP and not wire.is_full()
