"""The attach socket: who may, what is believed, and what floods, dawdlers and liars cost."""

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from support.attach_door import ATTACH, DEADLINE_S, DEVICE, PAGE, Door, answer, at_the_door, reason, until
from support.vm_process import Forked
from ublkpool.bufpool import client, wire
from ublkpool.bufpool.client import OwnSegment
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.daemon import attach, session
from ublkpool.daemon.attach import ADMITTED_AT_ONCE_MAX, UNHEARD_PER_USER_MAX
from ublkpool.daemon.open_files import file_id, holders_of
from ublkpool.daemon.peer import Peer, check_may_attach, peer_of, peer_pidfd
from ublkpool.daemon.refusals import LINES_PER_PERIOD_MAX, PERIOD_S, REASON_LENGTH_MAX, Refusals, plain
from ublkpool.daemon.session import Session

STRANGER = Peer(4711, 12345, frozenset((12345, 100)))


def test_the_kernel_says_who_has_connected() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        peer = peer_of(ours)
        assert peer == Peer(os.getpid(), os.getuid(), frozenset((os.getgid(), *os.getgroups())))
        pidfd = peer_pidfd(ours, peer.pid)
    assert pidfd is not None
    signal.pidfd_send_signal(pidfd, signal.Signals(signal.SIGCONT))
    os.close(pidfd)


@pytest.mark.parametrize(
    ("peer", "group", "may"),
    [
        (STRANGER, None, False),
        (STRANGER, 99, False),
        (STRANGER, 100, True),
        (STRANGER, 12345, True),
        (STRANGER._replace(uid=0), None, True),
        (STRANGER._replace(uid=os.geteuid()), 99, True),
    ],
)
def test_root_the_daemons_user_and_the_group_may_attach(peer: Peer, group: int | None, may: bool) -> None:
    if may:
        check_may_attach(peer, group)
        return
    with pytest.raises(AttachRefused, match=r"^process 4711 of user 12345 may not attach, only root"):
        check_may_attach(peer, group)


def test_a_stranger_with_a_connection_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(door: Door) -> None:
        monkeypatch.setattr(attach, "peer_of", lambda _: STRANGER)
        with door.connect() as connection:
            assert "user 12345 may not attach" in await reason(answer(connection))
        assert door.server.refusals.count == 1 and not door.sessions

    at_the_door(tmp_path, scene)


BAD = {
    "garbage": b"\xff\x00garbage",
    "nothing": b"{}",
    "deep": b'{"x":' + b"[" * 60000,
    "large": b" " * (wire.ATTACH_MESSAGE_BYTES_MAX + 1),
    "device": wire.encode_message(wire.Attach(v=1, device="x\ny" * 1000, kind="k")),
    "kind": wire.encode_message(wire.Attach(v=1, device=DEVICE, kind="two\nlines")),
    "nameless": wire.encode_message(wire.Attach(v=1, device=DEVICE, kind="")),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_nonsense_is_refused_in_one_line_and_its_descriptors_are_closed(
    tmp_path: Path, name: str, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(door: Door) -> None:
        file = os.memfd_create("passed")
        try:
            said = await reason(door.say(BAD[name], *[file] * count))
        finally:
            os.close(file)
        assert said.isprintable() and len(said) <= REASON_LENGTH_MAX
        assert door.server.refusals.count == 1 and said in caplog.text

    at_the_door(tmp_path, scene)


def test_descriptors_that_nobody_asked_for_are_closed(tmp_path: Path) -> None:
    async def scene(door: Door) -> None:
        file = os.memfd_create("passed")
        described = await door.say(wire.Describe(v=1, device=DEVICE), file)
        assert isinstance(described, wire.Described)
        assert "go together" in await reason(door.say(ATTACH, file))
        assert "no device" in await reason(door.say(wire.Describe(v=1, device="x"), file))
        os.close(file)
        own = OwnSegment.create(PAGE)
        unknown = wire.Attach(v=1, device="x", kind="k", segment_bytes=PAGE)
        assert "no device" in await reason(door.say(unknown, own.descriptor))
        own.close()

    at_the_door(tmp_path, scene)


def test_who_says_nothing_is_sent_away_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(door: Door) -> None:
        monkeypatch.setattr(attach, "ATTACH_DEADLINE_S", 0.01)
        with door.connect() as silent:
            assert "no attach message came in time" in await reason(answer(silent))

    at_the_door(tmp_path, scene)


def test_a_users_silent_connections_are_bounded_and_leave_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(door: Door) -> None:
        silent = [door.connect() for _ in range(UNHEARD_PER_USER_MAX)]
        assert "try later" in await reason(door.say(ATTACH))
        with monkeypatch.context() as other:
            other.setattr(attach, "peer_of", lambda _: Peer(os.getpid(), 0xFFFF, frozenset()))
            other.setattr(attach, "check_may_attach", lambda *_: None)
            _, theirs = await door.admit()
            theirs.close()
        silent.pop().close()
        await until(lambda: door.server.refusals.count == 2, "the end of one is noticed")
        _, ours = await door.admit()
        ours.close()
        for each in silent:
            each.close()
        await until(lambda: door.server.refusals.count == UNHEARD_PER_USER_MAX + 1, "and of the others")

    at_the_door(tmp_path, scene)


def test_backends_that_wait_for_a_device_are_bounded(tmp_path: Path) -> None:
    async def scene(door: Door) -> None:
        door.opens.clear()
        waiting = [door.connect() for _ in range(ADMITTED_AT_ONCE_MAX)]
        for each in waiting:
            each.send(wire.encode_message(ATTACH))
        assert "attaching already" in await reason(door.say(ATTACH))
        door.opens.set()
        await until(lambda: len(door.sessions) == ADMITTED_AT_ONCE_MAX, "the first ones get in")
        for each in waiting:
            each.close()

    at_the_door(tmp_path, scene)


def test_without_descriptors_the_server_waits_instead_of_spinning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Exhausted:
        accepts = 0

        def accept(self) -> None:
            self.accepts += 1
            raise OSError(errno.EMFILE, "Too many open files")

    async def scene(door: Door) -> None:
        door.server.start()
        real, door.server._listener = door.server._listener, exhausted  # type: ignore[assignment]
        monkeypatch.setattr(Exhausted, "fileno", lambda _: real.fileno(), raising=False)  # type: ignore[union-attr]
        monkeypatch.setattr(attach, "ACCEPT_PAUSE_S", 0.01)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(tmp_path / "attach.sock"))
            client.setblocking(False)
            await until(lambda: exhausted.accepts == 1, "it is tried")
            door.server._listener = real
            client.send(wire.encode_message(ATTACH))
            await until(lambda: bool(door.sessions), "it is tried again")

    exhausted = Exhausted()
    at_the_door(tmp_path, scene)
    assert caplog.text.count("Too many open files") == 1


def test_a_flood_is_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    refusals = Refusals(lambda: now_s)
    for _ in range(1000):
        refusals.note("the same")
    for number in range(1000):
        refusals.note(f"reason {number}")
    assert len(caplog.records) == LINES_PER_PERIOD_MAX
    now_s = PERIOD_S
    refusals.note("the same")
    assert [each.getMessage() for each in caplog.records[LINES_PER_PERIOD_MAX:]] == [
        f"{2000 - LINES_PER_PERIOD_MAX} more backends were refused, 2000 in all",
        "backend refused: the same",
    ]


def test_a_strangers_words_stay_on_one_line() -> None:
    assert plain("a\nb\x1b[2Jc") == "a?b?[2Jc"
    assert plain("x" * REASON_LENGTH_MAX) == "x" * REASON_LENGTH_MAX
    assert len(plain("x" * (REASON_LENGTH_MAX + 1))) == REASON_LENGTH_MAX


class Host:
    """A process that is a session's backend."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.process = Forked(lambda: len(os.read(self.reader, 1)))

    def session(self, sock: socket.socket) -> Session:
        made = Session(sock, Peer(self.process.pid, os.getuid(), frozenset()), ATTACH, None)
        own, made._pidfd = made._pidfd, os.pidfd_open(self.process.pid)
        assert own is not None
        os.close(own)
        return made

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


async def with_session(scene: Callable[[Session, socket.socket, Host], Coroutine[Any, Any, None]]) -> None:
    host = Host()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    made = host.session(ours)
    await scene(made, theirs, host)
    made.close()
    theirs.close()
    host.close()


def test_a_backend_that_hung_up_and_stays_is_killed() -> None:
    async def scene(made: Session, theirs: socket.socket, host: Host) -> None:
        hanging = asyncio.ensure_future(made.hung_up(0.01))
        await asyncio.to_thread(host.process.wait)
        theirs.close()
        await asyncio.wait_for(hanging, DEADLINE_S)
        assert host.process.wait() == -signal.SIGKILL and made.is_gone

    asyncio.run(with_session(scene))


def test_a_backend_that_hung_up_and_goes_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(made: Session, theirs: socket.socket, host: Host) -> None:
        hanging = asyncio.ensure_future(made.hung_up(DEADLINE_S))
        await asyncio.sleep(0)
        theirs.close()
        await asyncio.wait_for(hanging, DEADLINE_S)
        assert host.process.running
        host.process.kill()

    asyncio.run(with_session(scene))
    assert not caplog.records


def test_a_backend_that_talks_where_it_has_nothing_to_say_is_cut_off() -> None:
    async def scene(made: Session, theirs: socket.socket, host: Host) -> None:
        for _ in range(session.WORDS_MAX):
            theirs.send(b"blah")
        await asyncio.sleep(0.01)
        assert host.process.running
        theirs.send(b"blah")
        assert await asyncio.to_thread(host.process.wait) == -signal.SIGKILL
        theirs.close()
        await asyncio.wait_for(made.gone(), DEADLINE_S)

    asyncio.run(with_session(scene))


def test_a_connection_that_outlives_its_process_does_not_keep_the_device_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "CLOSE_PATIENCE_S", 0.01)

    async def scene(made: Session, theirs: socket.socket, host: Host) -> None:
        await asyncio.wait_for(made.cut_off(), DEADLINE_S)
        assert made.is_gone and "outlives it" in caplog.text

    asyncio.run(with_session(scene))


def _wait_for_a_child() -> int:
    """The number of the signal that ended it."""
    pid = os.fork()
    if not pid:
        signal.pause()
    return -os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_who_has_a_dead_backends_memory_is_ended_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CLOSE_PATIENCE_S", 0.05)
    pool = os.memfd_create("pool")
    wanted = {file_id(os.fstat(pool))}
    child = Forked(_wait_for_a_child)
    holders: list[int] = []

    async def scene(made: Session, theirs: socket.socket, host: Host) -> None:
        nonlocal holders
        made.entrust(pool, lambda: [child.pid])
        await until(lambda: bool(holders_of(wanted, [child.pid, host.process.pid])), "somebody else has it")
        holders = holders_of(wanted, [child.pid, host.process.pid])
        await asyncio.wait_for(made.cut_off(), DEADLINE_S)
        assert made.is_gone

    asyncio.run(with_session(scene))
    # The child, which has it too, was spared; its own child was not.
    assert child.wait() == signal.SIGKILL and len(holders) == 1
    os.close(pool)


@pytest.mark.parametrize("sent_before", [False, True])
@pytest.mark.parametrize("asks", [False, True])
def test_a_backend_that_is_refused_unheard_learns_why(tmp_path: Path, sent_before: bool, asks: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "attach.sock"))
        listener.listen()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(tmp_path / "attach.sock"))
            if sent_before:
                connection.send(b"what the daemon leaves unread")
            server, _ = listener.accept()
            server.send(wire.encode_message(wire.Refused(reason="too many")))
            server.close()
            if asks:
                packet, files = client._ask(connection, wire.Describe(v=1, device=DEVICE), [])
            else:
                packet, files = client._receive(connection)
    assert (wire.decode_daemon_message(packet), files) == (wire.Refused(reason="too many"), [])
