"""One queue core with its driver and its backend, for step-by-step scenarios."""

import random
from collections.abc import Sequence

from support.fakes.backend import FakeBackend, Store
from support.fakes.driver import SECTOR_BYTES, FakeDriver, Request
from support.fakes.liar import Lie, Scene
from support.fakes.queue_rig import Plan, Rig
from ublkpool.bufpool.wire import Descriptor, Op, iter_frame
from ublkpool.workers.tag_state import State

OWN = {"place_in_backend": True, "reads_own": True}
"""A plan with backend placement."""


def data(number: int, sectors: int = 1) -> bytes:
    """A request's data, distinct for each number."""
    return bytes([number]) * (sectors * SECTOR_BYTES)


def kinds(descriptors: Sequence[Descriptor]) -> list[int]:
    return [each.kind for each in descriptors]


class Desk:
    """One queue with its driver, and the present backend."""

    def __init__(self, first_sector: int = 0, connected: bool = True, **plan: int | tuple[int, ...]) -> None:
        self.rig = Rig(Plan(**plan))  # type: ignore[arg-type]
        self.side = self.rig.sides[0]
        self.queue = self.side.queue
        self.driver = FakeDriver(self.side)
        self.store = Store(first_sector * SECTOR_BYTES, 256 * SECTOR_BYTES)
        self.segment = 1
        self.queue.start()
        self.driver.consume()
        self.backend = self.connect() if connected else None

    def connect(self, fence: bool = False) -> FakeBackend:
        """Attach the next backend, up to WELCOME; with `fence` it served an earlier epoch."""
        made = self.expect(fence)
        self.queue.input(made.hello(0))
        self.send()
        return made

    def expect(self, fence: bool = False) -> FakeBackend:
        """Attach the next backend, which has not sent HELLO yet."""
        self.segment += 1
        made = FakeBackend(self.rig, [self.driver], self.store, self.segment, random.Random(1))
        plan = self.rig.plan
        own = self.segment if plan.place_in_backend or plan.reads_own else 0
        assert self.queue.expect(own, made.segment.base, made.segment.size_bytes, plan.reads_own, fence)
        self.backend = made
        return made

    def send(self) -> list[Descriptor]:
        """Deliver the core's descriptors to the backend, if one is attached."""
        output = self.queue.output()
        if not output:
            return []
        assert self.backend is not None
        self.queue.sent(len(output) // 64)
        self.backend.receive(0, output)
        return list(iter_frame(output))

    def write(self, tag: int, sector: int, data: bytes, flags: int = 0) -> Request:
        request = Request(Op.WRITE, sector, len(data) // SECTOR_BYTES, data, flags)
        self.driver.deliver(tag, request)
        return request

    def read(self, tag: int, sector: int, sectors: int = 1) -> Request:
        request = Request(Op.READ, sector, sectors)
        self.driver.deliver(tag, request)
        return request

    def other(self, tag: int, op: int, sectors: int = 8, flags: int = 0) -> Request:
        request = Request(op, 0, sectors, flags=flags)
        self.driver.deliver(tag, request)
        return request

    def place(self, tag: int) -> None:
        """Let the backend name a region, and pass it to the driver."""
        self.send()
        assert self.backend is not None
        frame = self.backend.place((0, tag))
        assert frame is not None
        self.queue.input(frame)
        self.driver.consume()

    def copy(self, tag: int, sectors: int | None = None) -> None:
        self.driver.consume()
        self.driver.copy(tag, sectors)

    def serve(self, tag: int) -> None:
        """Let the backend execute and answer, and the driver take the commit."""
        self.send()
        assert self.backend is not None
        assert self.backend.execute((0, tag))
        self.queue.input(self.backend.answer((0, tag)))
        self.driver.consume()
        self.side.check()

    def kill(self) -> None:
        self.backend = None
        self.queue.lost()

    def lie(self, tag: int, lie: Lie) -> None:
        """Let the backend send a wrong answer to the last request on this tag."""
        assert self.backend is not None
        request = [each for each in self.backend.seen if each.tag == tag][-1]
        plan, segment = self.rig.plan, self.backend.segment
        scene = Scene(
            request, segment.number, segment.size_bytes, plan.block_bytes, plan.depth, random.Random(2)
        )
        self.queue.input(lie(scene))

    def state(self, tag: int) -> State:
        return State(self.queue.tag_state(tag))
