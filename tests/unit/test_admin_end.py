"""The admin server's end: what clients have sent and not read does not keep the daemon from ending."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from support.fakes.daemon import FakeService
from ublkpool.daemon.admin import server as module
from ublkpool.daemon.admin.server import AdminServer
from ublkpool.daemon.settings.config import DeviceConfig

DEADLINE_S = 100
FOREVER_S = 10_000.0
LIST = b'{"v":1,"op":"list"}\n'
PIPELINED = 200


class ManyDevices(FakeService):
    """A service whose list is longer than what the kernel keeps for a client that does not read."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(1000):
            name = f"vol{number}"
            self.configs[name], self.states[name] = DeviceConfig(name=name), "waiting"


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(), DEADLINE_S)

    asyncio.run(run())


def connect(run_dir: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(run_dir / "admin.sock"))
    connection.setblocking(False)
    return connection


async def begun(server: AdminServer, requests: int) -> None:
    while server.statistics()["requests"] < requests:
        await asyncio.sleep(0.001)


async def unread(server: AdminServer) -> None:
    """Return when a client's answers wait for it to read."""
    while not any(writer.transport.get_write_buffer_size() for _, writer in server._connections.values()):
        await asyncio.sleep(0.001)


def test_a_client_that_sends_many_commands_and_reads_nothing_does_not_delay_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNREAD_S", 0.01)

    async def run() -> None:
        server = AdminServer(ManyDevices(), tmp_path)
        await server.start()
        with connect(tmp_path) as mute:
            mute.send(LIST * PIPELINED)
            await unread(server)
            await server.close(FOREVER_S)
            assert server.statistics()["connections"] == 0
            assert server.statistics()["requests"] < PIPELINED

    in_loop(run)


def test_a_client_that_reads_gets_every_answer_though_another_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow reader has as long as it goes on reading."""
    # So long that this process does not stand still for it: then the reader would be taken for the other.
    monkeypatch.setattr(module, "UNREAD_S", 2.0)

    async def run() -> None:
        server = AdminServer(ManyDevices(), tmp_path)
        await server.start()
        loop = asyncio.get_running_loop()
        with connect(tmp_path) as mute, connect(tmp_path) as reading:
            mute.send(LIST * PIPELINED)
            reading.send(LIST * 3)
            await begun(server, 2)
            ending = asyncio.ensure_future(server.close(FOREVER_S))
            received = bytearray()
            while data := await loop.sock_recv(reading, 1 << 16):
                received += data
            answers = [json.loads(each) for each in received.splitlines()]
            assert len(answers[0]["result"]) == 1000
            assert len(answers) == 3
            for each in answers[1:]:
                assert "result" in each or each["error"] == "the daemon is stopping"
            await ending

    in_loop(run)


def test_what_was_sent_ahead_is_not_begun_once_the_daemon_ends(tmp_path: Path) -> None:
    async def run() -> None:
        service = FakeService()
        service.configs["vol0"] = DeviceConfig(name="vol0")
        service.hold_deletes = asyncio.Event()
        server = AdminServer(service, tmp_path)
        await server.start()
        loop = asyncio.get_running_loop()
        delete, add = b'{"v":1,"op":"del","names":["vol0"]}\n', b'{"v":1,"op":"rebind","name":"vol0"}\n'
        with connect(tmp_path) as client:
            client.send(delete + add)
            await begun(server, 1)
            ending = asyncio.ensure_future(server.close(FOREVER_S))
            await asyncio.sleep(0)
            service.hold_deletes.set()
            received = b""
            while data := await loop.sock_recv(client, 1 << 16):
                received += data
            await ending
        first, second = map(json.loads, received.splitlines())
        assert first["result"] == ["vol0"]
        assert second["error"] == "the daemon is stopping"
        assert service.rebound == []

    in_loop(run)
