"""A backend that ends because it was told to says so, and the daemon hears it however fast the backend ends."""

import asyncio
import logging
import os
import signal
import socket
from pathlib import Path

import pytest

from support.fakes.attach_door import Door, at_the_door
from support.fakes.device_parts import FakeHolder
from support.fakes.worker import DEADLINE_S, FakeWorker, finish, spawn
from ublkpool.bufpool import wire
from ublkpool.daemon.processes.broker_process import REPLACED, BrokerProcess
from ublkpool.daemon.processes.children import Child


def packets(connection: socket.socket) -> list[object]:
    """What the backend has sent, until it closed the connection."""
    connection.settimeout(DEADLINE_S)
    found: list[object] = []
    while packet := connection.recv(wire.ATTACH_MESSAGE_BYTES_MAX):
        found.append(wire.decode_session_message(packet))
    return found


@pytest.mark.parametrize("knows", [True, False])
def test_a_backend_that_is_stopped_says_so_to_a_daemon_that_knows_it(tmp_path: Path, knows: bool) -> None:
    with FakeWorker(tmp_path) as worker:
        worker.described = {"knows_leaving": knows}
        process = spawn(tmp_path, "null", {"size": "1M"})
        worker.accept()
        assert worker.connection is not None
        # It serves, so its signals are in place.
        worker.read(0, 512)
        process.send_signal(signal.SIGTERM)
        assert packets(worker.connection) == ([wire.Leaving()] if knows else [])
        assert finish(process)[0] == 0


@pytest.mark.parametrize("sent", [(), (wire.Leaving(),), (wire.Leaving(), wire.Leaving())])
def test_the_daemon_hears_it_even_if_it_sees_the_end_first(
    tmp_path: Path, sent: tuple[wire.SessionMessage, ...]
) -> None:
    async def play(door: Door) -> None:
        session, connection = await door.admit()
        with connection:
            for each in sent:
                connection.send(wire.encode_message(each))
            # The loop has not turned since: it sees the process's death first.
            session._on_death()
        assert session.is_gone and session.has_said_end == bool(sent)

    at_the_door(tmp_path, play)


class FakeBroker(BrokerProcess):
    """A broker without a socket."""

    def _start(self) -> None:
        self.child = Quiet()

    def _use(self, *_: object) -> None:
        """It has no channel."""


class Quiet(Child):
    """A process of an earlier daemon: how it ended is unknown."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._exited = asyncio.get_running_loop().create_future()

    def exits(self) -> None:
        self._exited.set_result(255)

    async def end(self, patience_s: float) -> int:
        self.exits()
        return await self.wait()


class NoChannel:
    """A connection to no broker."""

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("planned", [True, False])
def test_a_broker_that_the_daemon_replaces_is_no_reason_to_warn(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, planned: bool
) -> None:
    monkeypatch.setattr(logging.getLogger("ublkpool"), "propagate", True)
    told: list[tuple[bool, str]] = []

    async def run() -> None:
        broker = FakeBroker("ipc://nowhere", FakeHolder())
        broker._channel = NoChannel()  # type: ignore[assignment]
        broker.start()

        async def restarted() -> None:
            told.append((broker.was_replaced, broker.last_end))

        keeper = asyncio.ensure_future(broker.keep_running(restarted))
        await asyncio.sleep(0)
        if planned:
            await broker.renew()
        else:
            broker.child.exits()  # type: ignore[attr-defined]
        async with asyncio.timeout(DEADLINE_S):
            while not told:
                await asyncio.sleep(0)
        assert not broker.is_replaced, "the next one's end is another matter"
        keeper.cancel()

    with caplog.at_level(logging.INFO, "ublkpool.broker"):
        asyncio.run(run())
    unknown = "exit status unknown, an earlier daemon was its parent"
    assert told == [(planned, REPLACED if planned else unknown)]
    levels = [each.levelno for each in caplog.records if "broker ended" in each.getMessage()]
    assert levels == [logging.INFO if planned else logging.ERROR]
