"""The broker's work for one device does not grow with the number of devices that it serves."""

import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest
import zmq

from ublkpool.bufpool.pool.arena import Arena, arena_prefix
from ublkpool.bufpool.pool.broker import Broker
from ublkpool.bufpool.pool.broker_commands import AddDevice, Command, Reclaim, Register, RemoveDevice, encode
from ublkpool.bufpool.pool.device_leases import DeviceLeases, worker_routing_id
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.wire import Descriptor, Kind, pack_slots

MANY = 30


class Router:
    """Every worker is connected and reads."""

    def __init__(self) -> None:
        self.inbox: list[list[bytes]] = []

    def send_multipart(self, frames: list[bytes], flags: int) -> None:
        """Taken."""

    def recv_multipart(self, flags: int) -> list[bytes]:
        if not self.inbox:
            raise zmq.Again
        return self.inbox.pop(0)


class Scene:
    """A broker of many devices, each with a worker that has its buffers, and the calls that it makes of them."""

    def __init__(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.router = Router()
        self.control, theirs = socket.socketpair()
        stack.enter_context(self.control)
        stack.enter_context(theirs)
        self.now_s = 0.0
        self.broker = Broker(cast(Any, self.router), theirs, False, lambda: self.now_s)
        stack.callback(self.broker.close)
        self.geometry = Geometry.build([(4096, 4)])
        self.stack = stack
        self.touched: Counter[int] = Counter()
        for name in ("take_outbox", "questions", "next_question_at_s"):
            monkeypatch.setattr(DeviceLeases, name, self._counting(getattr(DeviceLeases, name)))
        for number in range(MANY):
            self.add(number)
            self.settle(number)

    def _counting(self, honest: Any) -> Any:
        def call(leases: DeviceLeases, *arguments: Any) -> Any:
            self.touched[leases.device_number] += 1
            return honest(leases, *arguments)

        return call

    def say(self, command: Command, fd: int | None = None) -> None:
        self.broker._command(encode(command), [] if fd is None else [fd], 0)
        self.broker._ask()
        self.broker._timeout_ms()

    def add(self, number: int) -> None:
        prefix = arena_prefix(f"test-many-{os.getpid()}", number)
        arena = self.stack.enter_context(Arena.create(prefix, self.geometry, 1, number, (1,)))
        self.stack.callback(arena.unlink)
        self.say(AddDevice(number), arena.control_fd)
        self.say(Register(number, 0, 1))

    def settle(self, number: int) -> None:
        """The worker's first message, a SYNC."""
        head = Descriptor(Kind.SYNC, 0, device=number, epoch=1)
        self.router.inbox.append([worker_routing_id(number, 0, 1), pack_slots(head, [])])
        self.broker._on_router()
        self.broker._ask()
        self.broker._timeout_ms()

    def of_others(self, number: int) -> int:
        """The calls for other devices than this one since the last question; they are forgotten."""
        others = sum(count for each, count in self.touched.items() if each != number)
        self.touched.clear()
        return others


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(stack, monkeypatch)


def test_a_device_that_comes_works_and_goes_costs_the_others_nothing(scene: Scene) -> None:
    assert scene.broker._timeout_ms() is None, "no question is open"
    scene.touched.clear()
    scene.add(MANY)
    scene.settle(MANY)
    assert scene.touched[MANY] and scene.of_others(MANY) == 0
    scene.say(Reclaim(MANY, 0, 1))
    scene.say(RemoveDevice(MANY))
    assert scene.of_others(MANY) == 0


def test_a_question_that_nobody_answers_is_repeated_and_forgotten_with_its_device(scene: Scene) -> None:
    scene.add(MANY)
    asked = scene.broker.statistics().asked
    waits_ms = scene.broker._timeout_ms()
    assert waits_ms
    scene.now_s += waits_ms / 1000
    scene.broker._ask()
    assert scene.broker.statistics().asked == asked + 1
    scene.say(RemoveDevice(MANY))
    assert scene.broker._timeout_ms() is None
