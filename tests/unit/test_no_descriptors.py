"""A daemon without a free descriptor still answers commands, and tells a backend why it cannot attach."""

import asyncio
import socket
from contextlib import suppress
from pathlib import Path

from support.fakes.attach_door import Door, at_the_door, no_more_open_than, open_files, until
from support.fakes.daemon import FakeService
from support.fakes.descriptors import no_descriptor_left, open_descriptors
from ublkpool.bufpool import wire
from ublkpool.bufpool.sdk.keeper import DROP
from ublkpool.daemon.admin.server import AdminServer
from ublkpool.daemon.admin.wire import ListRequest, admin_socket, encode_line
from ublkpool.daemon.device.kept_memory import drop_kept
from ublkpool.daemon.processes.unix_socket import ReservedListener, listen

DEADLINE_S = 60


def test_a_listener_accepts_with_its_reserved_descriptor_and_reserves_another_later(
    tmp_path: Path,
) -> None:
    listener = ReservedListener(listen(tmp_path / "door", socket.SOCK_STREAM))
    clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for client in clients:
        client.connect(str(tmp_path / "door"))
    with no_descriptor_left():
        first, _ = listener.accept()
        assert listener.was_short
        with suppress(OSError):
            listener.accept()[0].close()
            raise AssertionError("there is none left")
        first.close()
        second, _ = listener.accept()
        second.close()
    third, _ = listener.accept()
    assert not listener.was_short
    for each in (third, *clients):
        each.close()
    before = open_descriptors()
    listener.close()
    assert len(before - open_descriptors()) == 2


def test_a_command_is_answered(tmp_path: Path) -> None:
    async def run() -> None:
        server = AdminServer(FakeService(), tmp_path)
        await server.start()
        for _ in range(2):
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            client.connect(str(admin_socket(tmp_path)))
            with no_descriptor_left():
                client.send(encode_line(ListRequest()))
                assert b'"ok":true' in await asyncio.get_running_loop().sock_recv(client, 65536)
            client.close()
            while server.statistics()["connections"]:
                await asyncio.sleep(0)
        await server.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_backend_is_told_why(tmp_path: Path) -> None:
    async def scene(door: Door) -> None:
        door.server.start()
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.setblocking(False)
        client.connect(str(tmp_path / "attach.sock"))
        with no_descriptor_left():
            packet = await asyncio.get_running_loop().sock_recv(client, 65536)
        answer = wire.decode_daemon_message(packet)
        assert isinstance(answer, wire.Refused) and "Too many open files" in answer.reason
        client.close()

    at_the_door(tmp_path, scene)


def test_a_segment_without_a_free_descriptor_is_not_counted_as_the_backends_breach(tmp_path: Path) -> None:
    async def scene(door: Door) -> None:
        door.server.start()
        before = open_files()
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.setblocking(False)
        client.connect(str(tmp_path / "attach.sock"))
        while not door.server._background._tasks:
            await asyncio.sleep(0)
        with no_descriptor_left():
            packet = wire.encode_message(wire.Attach(v=1, device="d", kind="k", segment_bytes=4096))
            socket.send_fds(client, [packet], [0])
            answer = wire.decode_daemon_message(await asyncio.get_running_loop().sock_recv(client, 65536))
        assert isinstance(answer, wire.Refused) and "Too many open files" in answer.reason
        client.close()
        await until(lambda: no_more_open_than(before), "its connection is ended once a descriptor is free")

    at_the_door(tmp_path, scene)


def test_a_keeper_is_asked_to_end_once_a_descriptor_is_free(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "memory-vol.keep"
        with no_descriptor_left():
            await drop_kept(path)
        keeper = listen(path, socket.SOCK_SEQPACKET)
        with no_descriptor_left():
            dropping = asyncio.ensure_future(drop_kept(path))
            await asyncio.sleep(0)
        connection, _ = await asyncio.get_running_loop().sock_accept(keeper)
        assert await asyncio.get_running_loop().sock_recv(connection, 16) == DROP
        connection.close()
        await dropping
        keeper.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))
