"""The attach socket: the users that may attach, the checks on what they send, and the cost of floods and silence."""

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.fakes.attach_door import (
    ATTACH,
    DEADLINE_S,
    DEVICE,
    PAGE,
    Door,
    answer,
    at_the_door,
    reason,
    until,
)
from support.vm.process import Forked
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.bufpool.sdk import client
from ublkpool.bufpool.sdk.client import OwnSegment
from ublkpool.daemon.backends import attach, session
from ublkpool.daemon.backends.attach import ADMITTED_AT_ONCE_MAX, UNHEARD_PER_USER_MAX
from ublkpool.daemon.backends.peer import Peer, check_may_attach, peer_of
from ublkpool.daemon.backends.refusals import (
    LINES_PER_PERIOD_MAX,
    PERIOD_S,
    REASON_LENGTH_MAX,
    Refusals,
    plain,
)
from ublkpool.daemon.backends.session import Session
from ublkpool.workers.credentials import peer_pidfd

LONG_S = 600
"""A time limit that no test may reach."""
STRANGER = Peer(4711, 12345, frozenset((12345, 100)))


def test_the_kernel_says_who_has_connected() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        peer = peer_of(ours)
        assert peer == Peer(os.getpid(), os.getuid(), frozenset((os.getgid(), *os.getgroups())))
        pidfd = peer_pidfd(ours)
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


def test_a_peer_that_may_not_attach_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_a_malformed_attach_is_refused_in_one_line_and_its_descriptors_are_closed(
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


def test_unsolicited_descriptors_are_closed(tmp_path: Path) -> None:
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


def test_a_device_is_told_why_a_backend_for_it_was_refused(tmp_path: Path) -> None:
    async def scene(door: Door) -> None:
        odd = msgspec.structs.replace(ATTACH, size_bytes=513)
        said = await reason(door.say(odd))
        await reason(door.say(msgspec.structs.replace(ATTACH, device="x")))
        here = f"process {os.getpid()}"
        assert door.refusals == [
            (DEVICE, f"{here} was refused as its backend: {said}"),
            ("x", f"backend test, {here}, was refused: no device 'x'"),
        ]

    at_the_door(tmp_path, scene)


def test_a_silent_connection_is_refused_at_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(door: Door) -> None:
        monkeypatch.setattr(attach, "ATTACH_DEADLINE_S", 0.01)
        with door.connect() as silent:
            assert "no attach message came in time" in await reason(answer(silent))

    at_the_door(tmp_path, scene)


def test_a_users_silent_connections_are_bounded_and_leave_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(door: Door) -> None:
        monkeypatch.setattr(attach, "ATTACH_DEADLINE_S", LONG_S)
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


def test_a_peers_text_stays_on_one_line_of_the_log() -> None:
    assert plain("a\nb\x1b[2Jc") == "a?b?[2Jc"
    assert plain("x" * REASON_LENGTH_MAX) == "x" * REASON_LENGTH_MAX
    assert len(plain("x" * (REASON_LENGTH_MAX + 1))) == REASON_LENGTH_MAX


class Host:
    """A process that connects to a listener and is a session's backend; it runs `conduct`."""

    def __init__(self, path: Path, conduct: Callable[[socket.socket], int]) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self.process = Forked(lambda: conduct(self._connect(path)))

    @staticmethod
    def _connect(path: Path) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(path))
        return connection

    def session(self) -> Session:
        ours, _ = self._listener.accept()
        ours.setblocking(False)
        return Session(ours, peer_of(ours), ATTACH, None)

    def close(self) -> None:
        self._listener.close()
        if self.process.running:
            self.process.kill()


def staying(connection: socket.socket) -> int:
    """Keeps its connection open, and lives on."""
    signal.pause()
    return 0


def closing(connection: socket.socket) -> int:
    """Closes its connection, and lives on with the memory that it was handed."""
    connection.recv(1)
    connection.close()
    signal.pause()
    return 0


def leaving(connection: socket.socket) -> int:
    """Closes its connection, then ends, as a backend should."""
    connection.recv(1)
    connection.close()
    return 3


def daemonising(connection: socket.socket) -> int:
    """Ends, with a child that keeps the connection."""
    connection.recv(1)
    if not os.fork():
        connection.recv(1)
        os._exit(0)
    os._exit(0)


def talking(connection: socket.socket) -> int:
    """Sends packets after its attach."""
    connection.recv(1)
    for _ in range(session.UNDUE_PACKETS_MAX + 1):
        connection.send(b"blah")
    return staying(connection)


MEMORY = wire.Live(path="stands for what comes with its device's memory")


def with_session(
    tmp_path: Path,
    conduct: Callable[[socket.socket], int],
    scene: Callable[[Session, Host], Coroutine[Any, Any, None]],
) -> None:
    async def play() -> None:
        host = Host(tmp_path / "host.sock", conduct)
        made = host.session()
        try:
            await scene(made, host)
        finally:
            made.close()
            host.close()

    asyncio.run(play())


async def _gone(made: Session) -> None:
    await asyncio.wait_for(made.gone(), DEADLINE_S)


def test_a_backend_that_closes_its_connection_and_lives_on_is_killed_before_a_successor_is_admitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "LEAVE_PATIENCE_S", 0.01)

    async def scene(made: Session, host: Host) -> None:
        made.entrust(MEMORY, [])
        await until(lambda: made.is_leaving, "the end of the connection is seen")
        await _gone(made)
        assert host.process.wait() == -signal.SIGKILL
        assert "has closed its connection and lives on" in caplog.text

    with_session(tmp_path, closing, scene)


def test_while_a_backend_is_leaving_neither_a_hang_up_nor_a_cut_ends_before_its_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LEAVE_PATIENCE_S", LONG_S)

    async def scene(made: Session, host: Host) -> None:
        made.entrust(MEMORY, [])
        await until(lambda: made.is_leaving, "the end of the connection is seen")
        await asyncio.wait_for(made.hung_up(0.0), DEADLINE_S)
        assert not made.is_gone and host.process.running, "it has its time to end by itself"
        await asyncio.wait_for(made.cut_off(), DEADLINE_S)
        assert made.is_gone and host.process.wait() == -signal.SIGKILL

    with_session(tmp_path, closing, scene)


def test_a_backend_that_closes_its_connection_and_ends_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "LEAVE_PATIENCE_S", LONG_S)

    async def scene(made: Session, host: Host) -> None:
        made.entrust(MEMORY, [])
        await _gone(made)
        assert host.process.wait() == 3

    with_session(tmp_path, leaving, scene)
    assert not caplog.records


def test_a_process_without_memory_may_close_its_connection_and_live_on(tmp_path: Path) -> None:
    def hasty(connection: socket.socket) -> int:
        connection.close()
        signal.pause()
        return 0

    async def scene(made: Session, host: Host) -> None:
        await _gone(made)
        made.entrust(MEMORY, [])
        await asyncio.wait_for(made.cut_off(), DEADLINE_S)
        assert host.process.running

    with_session(tmp_path, hasty, scene)


def test_a_backend_whose_child_has_its_connection_is_gone_when_its_own_process_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(made: Session, host: Host) -> None:
        made.entrust(MEMORY, [])
        await _gone(made)
        assert "another has its connection" in caplog.text

    with_session(tmp_path, daemonising, scene)


def test_a_process_that_is_dead_before_it_is_admitted_gets_no_memory(tmp_path: Path) -> None:
    """Another process may have its connection, and would get the memory in its place."""

    def leaves_a_child(connection: socket.socket) -> int:
        if not os.fork():
            os._exit(len(connection.recv(1)))
        os._exit(0)

    async def scene(made: Session, host: Host) -> None:
        # Its child has what `Forked.wait` waits for.
        os.waitid(os.P_PID, host.process.pid, os.WEXITED | os.WNOWAIT)
        made.entrust(MEMORY, [])
        assert not made._has_memory
        await _gone(made)

    with_session(tmp_path, leaves_a_child, scene)


def test_a_process_that_was_reaped_is_known_to_be_dead_and_one_without_a_pidfd_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a reaped process Linux 6.12 answers SO_PEERPIDFD with an error, later kernels with a pidfd."""

    def reaped(_sock: socket.socket) -> int:
        raise ProcessLookupError

    async def scene(made: Session, host: Host) -> None:
        monkeypatch.setattr(session, "peer_pidfd", reaped)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            late = Session.adopt(ours, ATTACH, None, made.token, 0)
            assert late.is_gone
            await asyncio.wait_for(late.cut_off(), DEADLINE_S)
            late.close()

    with_session(tmp_path, staying, scene)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOPROTOOPT])
def test_a_backend_whose_pidfd_cannot_be_opened_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def none_left(_sock: socket.socket) -> int:
        raise OSError(code, os.strerror(code))

    async def scene(door: Door) -> None:
        monkeypatch.setattr(session, "peer_pidfd", none_left)
        own = OwnSegment.create(PAGE)
        message = wire.Attach(v=1, device=DEVICE, kind="k", segment_bytes=PAGE)
        assert os.strerror(code) in await reason(door.say(message, own.descriptor))
        own.close()
        assert not door.sessions

    at_the_door(tmp_path, scene)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.EINVAL, ProcessLookupError),
        (errno.ESRCH, ProcessLookupError),
        (errno.EMFILE, OSError),
        (errno.ENOPROTOOPT, OSError),
    ],
)
def test_only_the_kernels_errno_for_a_reaped_process_counts_as_its_death(
    code: int, expected: type[OSError]
) -> None:
    class Refusing:
        def getsockopt(self, *_: int) -> bytes:
            raise OSError(code, os.strerror(code))

    with pytest.raises(OSError) as failure:
        peer_pidfd(Refusing())  # type: ignore[arg-type]
    assert type(failure.value) is expected


def test_a_backend_that_hung_up_on_a_queue_and_stays_is_killed(tmp_path: Path) -> None:
    async def scene(made: Session, host: Host) -> None:
        made.entrust(MEMORY, [])
        await asyncio.wait_for(made.hung_up(0.01), DEADLINE_S)
        assert made.is_gone and host.process.wait() == -signal.SIGKILL

    with_session(tmp_path, staying, scene)


def test_a_backend_that_sends_packets_after_its_attach_is_cut_off(tmp_path: Path) -> None:
    async def scene(made: Session, host: Host) -> None:
        made.entrust(MEMORY, [])
        await _gone(made)
        assert host.process.wait() == -signal.SIGKILL

    with_session(tmp_path, talking, scene)


def test_when_its_device_ends_a_backend_need_only_close_its_connection(tmp_path: Path) -> None:
    """No other backend uses its memory, and its process may go on with other work."""

    async def scene(made: Session, host: Host) -> None:
        made.entrust(MEMORY, [])
        await asyncio.wait_for(made.detach("the end", DEADLINE_S, keep=False), DEADLINE_S)
        made.close()
        await asyncio.sleep(0.01)
        assert host.process.running

    with_session(tmp_path, closing, scene)


@pytest.mark.parametrize("sent_before", [False, True])
@pytest.mark.parametrize("asks", [False, True])
def test_a_backend_that_is_refused_before_it_is_read_receives_the_reason(
    tmp_path: Path, sent_before: bool, asks: bool
) -> None:
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
