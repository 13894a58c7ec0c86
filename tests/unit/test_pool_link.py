"""A worker's link to the broker: buffers on order are those that the broker reports and those it has not seen yet."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from support.fakes.queue_desk import Desk
from support.fakes.queue_rig import DEVICE
from ublkpool.bufpool.pool.device_leases import OP_SYNC_ASKED
from ublkpool.bufpool.wire import Descriptor, Kind, pack_slots, unpack_slots
from ublkpool.workers.pool_link import Orders, PoolLink

WAIT_MS = 60_000
END = b"the end"


def test_leases_that_a_grant_does_not_know_of_are_still_on_order() -> None:
    orders = Orders()
    assert [orders.ask(4), orders.ask(2)] == [1, 2]
    assert orders.granted(0, 0) == 6
    assert orders.granted(1, 3) == 5
    assert orders.granted(2, 1) == 1
    assert orders.ask(7) == 3
    orders.forget()
    assert orders.granted(2, 0) == 0


class Conversation:
    """A queue's link, and the broker's end of it in the test's hands."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str) -> None:
        self.router = context.socket(zmq.ROUTER)
        self.router.bind(endpoint)
        self.desk = Desk(depth=16, spare=4)
        self.link = PoolLink(context, endpoint, self.desk.queue)
        self.routing_id, *_ = self.router.recv_multipart()

    def leases(self) -> list[tuple[int, int, int]]:
        """The LEASEs that the link sends now: class, sequence, count."""
        self.link.balance()
        # A link's messages arrive in order.
        self.link._socket.send(END)
        found = []
        while (frames := self.hear()) != [END]:
            heads = [unpack_slots(frame)[0] for frame in frames]
            found += [(each.op, each.sequence, each.length) for each in heads if each.kind == Kind.LEASE]
        return found

    def hear(self) -> list[bytes]:
        """The frames of the link's next message."""
        assert self.router.poll(WAIT_MS)
        _, *frames = self.router.recv_multipart()
        return frames

    def say(self, kind: Kind, op: int, sequence: int, on_order: int = 0) -> None:
        head = Descriptor(kind, op, device=DEVICE, epoch=3, sequence=sequence, offset=on_order)
        frame = pack_slots(head, []) if kind == Kind.GRANT else head.pack()
        self.router.send_multipart([self.routing_id, frame])
        assert self.link._socket.poll(WAIT_MS)
        self.link.receive()


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Conversation]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    talk = Conversation(context, f"ipc://{tmp_path}/broker")
    yield talk
    talk.link.close()
    talk.router.close()
    context.term()


def test_orders_that_the_broker_cut_are_leased_again(talk: Conversation) -> None:
    for tag in range(4):
        talk.desk.read(tag, 16 * tag, 16)
    (wish,) = [each for each in talk.leases() if each[0] == 1]
    assert talk.leases() == [], "asked once"
    talk.say(Kind.GRANT, 1, wish[1], on_order=wish[2])
    assert talk.leases() == [], "the broker knows, and they will come"
    talk.say(Kind.GRANT, 1, wish[1], on_order=1)
    assert talk.leases() == [(1, wish[1] + 1, wish[2] - 1)]


def test_a_sync_drops_earlier_orders(talk: Conversation) -> None:
    talk.desk.read(0, 0, 16)
    talk.desk.read(1, 16, 16)
    (wish,) = [each for each in talk.leases() if each[0] == 1]
    talk.say(Kind.RECALL, OP_SYNC_ASKED, 77)
    assert (1, wish[1] + 1, wish[2]) in talk.leases()
