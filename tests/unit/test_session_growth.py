"""The store's growth on an attach connection: questions to the backend, its answers, what it may announce."""

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from support.fakes.attach_door import ATTACH, DEADLINE_S, Door, answer, at_the_door, until
from ublkpool.bufpool import wire
from ublkpool.daemon.backends.session import GROWN_PACKETS_MAX, UNDUE_PACKETS_MAX, Session
from ublkpool.daemon.errors import DaemonError

Scene = Callable[[Session, socket.socket], Awaitable[None]]
SOON_S = 0.01


def with_backend(tmp_path: Path, scene: Scene) -> None:
    """Run a scene with an attached backend, whose end of the connection is the test's."""

    async def play(door: Door) -> None:
        session, connection = await door.admit()
        with connection:
            await scene(session, connection)
            session.close()
        door.sessions.clear()

    at_the_door(tmp_path, play)


def say(connection: socket.socket, message: wire.SessionMessage) -> None:
    connection.send(wire.encode_message(message))


def test_a_backend_is_asked_and_its_answer_counts(tmp_path: Path) -> None:
    async def scene(session: Session, connection: socket.socket) -> None:
        asked = asyncio.ensure_future(session.resize(4096, DEADLINE_S))
        assert await answer(connection) == wire.Resize(size_bytes=4096)
        # The answer to an earlier question, of a daemon before this one.
        say(connection, wire.Resized(size_bytes=8192, reason="no"))
        say(connection, wire.Resized(size_bytes=4096))
        await asked
        asked = asyncio.ensure_future(session.resize(8192, DEADLINE_S))
        assert await answer(connection) == wire.Resize(size_bytes=8192)
        say(connection, wire.Resized(size_bytes=8192, reason="the disk is\nfull\x1b[2J"))
        with pytest.raises(DaemonError, match=r"^its backend test refuses: the disk is\?full\?\[2J$"):
            await asked

    with_backend(tmp_path, scene)


def test_a_backend_that_does_not_answer_is_left_alone_and_can_be_asked_again(tmp_path: Path) -> None:
    async def scene(session: Session, connection: socket.socket) -> None:
        with pytest.raises(DaemonError, match=r"has not answered within 0\.01 s: if it does later"):
            await session.resize(4096, SOON_S)
        assert not session.is_leaving
        say(connection, wire.Resized(size_bytes=4096, reason="late"))
        asked = asyncio.ensure_future(session.resize(8192, DEADLINE_S))
        for size_bytes in (4096, 8192):
            assert await answer(connection) == wire.Resize(size_bytes=size_bytes)
        say(connection, wire.Resized(size_bytes=8192))
        await asked

    with_backend(tmp_path, scene)


def test_a_store_that_has_grown_too_late_for_the_answer_is_growth_that_the_device_follows(
    tmp_path: Path,
) -> None:
    async def scene(session: Session, connection: socket.socket) -> None:
        heard: list[int] = []
        session.on_grown = heard.append
        with pytest.raises(DaemonError, match="has not answered"):
            await session.resize(4096, SOON_S)
        asked = asyncio.ensure_future(session.resize(8192, DEADLINE_S))
        for size_bytes in (4096, 8192):
            assert await answer(connection) == wire.Resize(size_bytes=size_bytes)
        say(connection, wire.Resized(size_bytes=4096))
        await until(lambda: heard == [4096], "the late answer is heard")
        assert not asked.done() and session.grown_bytes == 4096
        say(connection, wire.Resized(size_bytes=8192))
        await asked
        assert heard == [4096], "the caller puts this size on record"

    with_backend(tmp_path, scene)


def test_a_backend_that_ends_ends_the_question(tmp_path: Path) -> None:
    async def scene(session: Session, connection: socket.socket) -> None:
        asked = asyncio.ensure_future(session.resize(4096, DEADLINE_S))
        await answer(connection)
        connection.close()
        with pytest.raises(DaemonError, match="ended before it answered: try again"):
            await asked

    with_backend(tmp_path, scene)


def test_a_size_announced_before_the_device_watches_is_remembered(tmp_path: Path) -> None:
    async def scene(session: Session, connection: socket.socket) -> None:
        assert session.grown_bytes == 0
        for size_bytes in (512, 1024):
            say(connection, wire.Grown(size_bytes=size_bytes))
        await until(lambda: session.grown_bytes == 1024, "the last one is known")

    with_backend(tmp_path, scene)


def test_sizes_that_rise_are_announcements_and_anything_else_is_undue(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(session: Session, connection: socket.socket) -> None:
        heard: list[int] = []
        session.on_grown = heard.append
        rising = range(512, 512 * (GROWN_PACKETS_MAX + 1), 512)
        for size_bytes in rising:
            say(connection, wire.Grown(size_bytes=size_bytes))
        await until(lambda: heard == list(rising), "every rising size is heard")
        assert not session.is_leaving
        undue = (
            wire.encode_message(wire.Grown(size_bytes=512)),
            wire.encode_message(wire.Grown(size_bytes=1 << 63)),
            wire.encode_message(wire.Resized(size_bytes=4096)),
            wire.encode_message(ATTACH),
            b'{"type":"grown"}',
            b'{"type":"grown","size_bytes":1e9}',
            b'{"type":"grown","size_bytes":99999999999999999999999999}',
            b'{"type":"grown","size_bytes":99999999,"more":1}',
            b"\xff\x00 no json",
            b"[" * 60000,
        )
        for number in range(UNDUE_PACKETS_MAX + 1):
            connection.send(undue[number % len(undue)])
        await until(lambda: session.is_leaving, "it is cut off")
        assert heard == list(rising)

    with_backend(tmp_path, scene)
    assert "it talks on its attach connection" in caplog.text


def test_a_backend_that_announces_more_than_it_may_is_cut_off(tmp_path: Path) -> None:
    async def scene(session: Session, connection: socket.socket) -> None:
        now_s, sizes, heard = [1000.0], itertools.count(512, 512), list[int]()
        session._clock = lambda: now_s[0]
        session.on_grown = heard.append

        async def announce(count: int) -> None:
            said = [next(sizes) for _ in range(count)]
            for size_bytes in said:
                say(connection, wire.Grown(size_bytes=size_bytes))
            await until(lambda: heard[-count:] == said, "every size is heard")

        await announce(GROWN_PACKETS_MAX)
        for _ in range(2 * UNDUE_PACKETS_MAX):
            now_s[0] += 1
            await announce(1)
        assert not session.is_leaving, "one a second is no burden"
        now_s[0] += 10 * GROWN_PACKETS_MAX
        # A burst after a rest, and what every backend may send that is not expected.
        await announce(GROWN_PACKETS_MAX)
        await announce(UNDUE_PACKETS_MAX)
        assert not session.is_leaving
        await announce(1)
        assert session.is_leaving

    with_backend(tmp_path, scene)


def test_answers_to_other_questions_are_undue(tmp_path: Path) -> None:
    async def scene(session: Session, connection: socket.socket) -> None:
        asked = asyncio.ensure_future(session.resize(4096, DEADLINE_S))
        assert await answer(connection) == wire.Resize(size_bytes=4096)
        # The first one may be late; it is not said twice.
        for _ in range(UNDUE_PACKETS_MAX + 2):
            say(connection, wire.Resized(size_bytes=8192))
        with pytest.raises(DaemonError, match="ended before it answered"):
            await asked
        assert session.is_leaving

    with_backend(tmp_path, scene)
