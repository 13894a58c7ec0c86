"""Descriptors that untrusted peers send: their last close, which may wait for ever, never happens on the loop."""

import asyncio
import ctypes
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support.fakes.attach_door import (
    ATTACH,
    DEADLINE_S,
    DEVICE,
    Door,
    at_the_door,
    no_more_open_than,
    open_files,
    until,
)
from support.fakes.standstill import STANDS_MAX_S, watched_loop
from ublkpool.bufpool import wire
from ublkpool.daemon.processes.guarded_socket import GuardedSocket, NotMemory, UndueDescriptors

LINGER_S = 60
_libc = ctypes.CDLL(None, use_errno=True)
PACKETS = {
    "describe": wire.encode_message(wire.Describe(v=1, device=DEVICE)),
    "lease": wire.encode_message(wire.LeaseBuffer(v=1, device=DEVICE)),
    "attach": wire.encode_message(ATTACH),
    "garbage": b"garbage",
    "empty": b"",
}


@contextmanager
def lingering() -> Iterator[int]:
    """A TCP socket whose last close waits `LINGER_S`, because its peer reads nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    with peer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_S))
        sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                sock.send(bytes(1 << 16))
        yield sock.detach()


def send(connection: socket.socket, packet: bytes, fd: int) -> None:
    """Send the descriptor, and keep no copy of it."""
    with suppress(ConnectionError):
        socket.send_fds(connection, [packet], [fd])

    def close() -> None:
        # The last close of a refused descriptor is the sender's to wait for.
        with suppress(OSError):
            os.close(fd)

    threading.Thread(target=close).start()
    # A helper that inherits it would wait for its own close.
    while os.path.lexists(f"/proc/self/fd/{fd}"):
        time.sleep(0.001)


@pytest.mark.parametrize("name", PACKETS)
@pytest.mark.parametrize("is_read", [True, False])
def test_a_descriptor_whose_close_waits_stops_no_other_device(
    tmp_path: Path, name: str, is_read: bool
) -> None:
    async def scene(door: Door) -> None:
        before = open_files()
        with lingering() as fd, door.connect() as connection:
            async with watched_loop() as seen:
                if not is_read:
                    connection.send(b"garbage")
                send(connection, PACKETS[name], fd)
                await until(lambda: door.server.refusals.count == 1, "it is refused")
                connection.setblocking(True)
                with suppress(ConnectionError):
                    await asyncio.to_thread(connection.recv, 65536)
            assert seen.longest_s < STANDS_MAX_S
        await until(lambda: no_more_open_than(before), "everything is closed")

    at_the_door(tmp_path, scene)


def test_a_backend_that_sends_descriptors_after_its_attach_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux before 6.16 lets it send them."""
    monkeypatch.setattr(GuardedSocket, "refuse_descriptors", lambda _sock: None)

    async def scene(door: Door) -> None:
        before = open_files()
        session, connection = await door.admit()
        with lingering() as fd, connection:
            async with watched_loop() as seen:
                send(connection, b"x", fd)
                await asyncio.wait_for(session.gone(), DEADLINE_S)
                session.close()
            assert seen.longest_s < STANDS_MAX_S
        await until(lambda: no_more_open_than(before), "everything is closed")

    at_the_door(tmp_path, scene)


def _attributes(inode: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if inode == 1 else stat.S_IFREG | 0o644
    return struct.pack("<6Q10I", inode, 4096, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def _answer(opcode: int, node: int) -> bytes | None:
    """A FUSE server's answer; None for FLUSH, FORGET and INTERRUPT."""
    match opcode:
        case 1:
            return struct.pack("<4Q2I", 2, 0, 0, 0, 0, 0) + _attributes(2)
        case 3:
            return struct.pack("<Q2I", 0, 0, 0) + _attributes(node)
        case 14:
            return struct.pack("<Q2I", 1, 0, 0)
        case 26:
            return struct.pack("<4I2H2I", 7, 31, 65536, 0, 12, 9, 65536, 1) + bytes(64 - 28)
        case 2 | 25 | 36:
            return None
    return b""


def _serve(fuse: int) -> None:
    with suppress(OSError):
        while True:
            packet = os.read(fuse, 1 << 20)
            _, opcode, unique, node = struct.unpack_from("<IIQQ", packet)
            if (answer := _answer(opcode, node)) is not None:
                error = 0 if answer else -38
                os.write(fuse, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)


@contextmanager
def fuse_file(at: Path) -> Iterator[int]:
    """A file whose server never answers FLUSH; the mount is aborted at the end."""
    at.mkdir()
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"no FUSE here: {error}")
    data = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    if _libc.mount(b"test", bytes(at), b"fuse", 0, data):
        os.close(fuse)
        pytest.skip(f"no FUSE mount here: {os.strerror(ctypes.get_errno())}")
    threading.Thread(target=_serve, args=(fuse,), daemon=True).start()
    try:
        yield os.open(at / "file", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        # MNT_FORCE aborts the connection, MNT_DETACH removes the mount.
        _libc.umount2(bytes(at), 1)
        _libc.umount2(bytes(at), 2)
        os.close(fuse)


def test_a_file_whose_server_answers_no_flush_stops_nothing(tmp_path: Path) -> None:
    async def scene(door: Door) -> None:
        before = open_files()
        with fuse_file(tmp_path / "mnt") as fd, door.connect() as connection:
            async with watched_loop() as seen:
                send(connection, PACKETS["describe"], fd)
                await until(lambda: door.server.refusals.count == 1, "it is refused")
            assert seen.longest_s < STANDS_MAX_S
        await until(lambda: no_more_open_than(before), "everything is closed")

    at_the_door(tmp_path, scene)


def _pair() -> tuple[GuardedSocket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return GuardedSocket(ours), theirs


def test_memory_is_passed_on_and_everything_else_is_not() -> None:
    async def scene() -> None:
        ours, theirs = _pair()
        memory = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
        with ours, theirs, Path(os.devnull).open() as null:
            socket.send_fds(theirs, [b"memory"], [memory])
            theirs.send(b"none")
            socket.send_fds(theirs, [b"both"], [memory, null.fileno()])
            theirs.send(b"long" * 10)
            data, files, is_cut = await ours.receive(32, 4)
            assert (data, is_cut) == (b"memory", False)
            assert os.fstat(files[0]).st_ino == os.fstat(memory).st_ino
            os.close(files[0])
            assert await ours.receive(32, 4) == (b"none", [], False)
            with pytest.raises(NotMemory):
                await ours.receive(32, 4)
            assert (await ours.receive(32, 4)).is_cut
        os.close(memory)

    before = open_files()
    asyncio.run(scene())
    assert no_more_open_than(before)


def test_a_read_leaves_a_packet_with_descriptors_where_it_is() -> None:
    async def scene() -> None:
        before = open_files()
        ours, theirs = _pair()
        with ours, theirs, Path(os.devnull).open() as null:
            theirs.send(b"plain")
            socket.send_fds(theirs, [b"more"], [null.fileno()])
            assert ours.recv(16) == b"plain"
            for _ in range(2):
                with pytest.raises(UndueDescriptors):
                    ours.recv(16)
        await until(lambda: no_more_open_than(before), "the helper ends")

    asyncio.run(scene())


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
def test_the_peer_receives_what_was_said_before_the_end(kind: socket.SocketKind) -> None:
    one, theirs = socket.socketpair(socket.AF_UNIX, kind)
    ours = GuardedSocket(one)
    theirs.send(b"")
    theirs.send(b"unread")
    ours.send(b"the reason")
    ours.close()
    with theirs:
        assert theirs.recv(16) == b"the reason"
        assert theirs.recv(16) == b""
