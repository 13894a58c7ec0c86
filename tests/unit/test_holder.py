"""The holder: the descriptors that it keeps open for the next supervisor, and its replacement when it dies."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest

from support.fakes.descriptors import no_descriptor_left
from support.stopping import stop
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes import holder as holder_module
from ublkpool.daemon.processes.holder import Holder, Take
from ublkpool.daemon.processes.unix_socket import listen

DEADLINE_S = 60


def in_loop(test: Callable[[Path], Awaitable[None]]) -> Callable[[Path], None]:
    def plain(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(test(tmp_path), DEADLINE_S))

    plain.__name__ = test.__name__
    return plain


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(DEADLINE_S)
    return ours, theirs


def die(holder: Holder) -> None:
    """Close the supervisor's descriptors, as its death does."""
    assert holder._channel is not None
    holder._channel.close()
    for name in list(holder._held):
        holder._forget(name)


async def successor(run_dir: Path) -> tuple[Holder, dict[str, int]]:
    holder = Holder(run_dir)
    return holder, holder.take_over()


@in_loop
async def test_a_descriptor_outlives_its_supervisor_and_its_connection_goes_on(tmp_path: Path) -> None:
    first = Holder(tmp_path)
    assert first.take_over() == {}
    first.start()
    ours, theirs = pair()
    first.hold("vol0/worker/0", ours.fileno())
    ours.close()
    die(first)
    second, found = await successor(tmp_path)
    assert list(found) == ["vol0/worker/0"]
    with socket.socket(fileno=found["vol0/worker/0"]) as again, theirs:
        again.send(b"still there")
        assert theirs.recv(100) == b"still there"
    await second.stop()
    assert not (tmp_path / "held.sock").exists()


@in_loop
async def test_a_dropped_or_replaced_descriptor_is_closed(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    holder.start()
    kept = []
    for name in ("vol0/worker/0", "vol0/worker/1", "vol0/session", "vol0/session"):
        ours, theirs = pair()
        holder.hold(name, ours.fileno())
        ours.close()
        kept.append(theirs)
    worker_0, worker_1, old_session, session = kept
    assert old_session.recv(1) == b"", "the older one of a name is closed"
    holder.drop("vol0/worker")
    assert (worker_0.recv(1), worker_1.recv(1)) == (b"", b"")
    session.setblocking(False)
    with pytest.raises(BlockingIOError):
        session.recv(1)
    await holder.stop()
    session.setblocking(True)
    assert session.recv(1) == b"", "nothing is held after the end"
    for each in kept:
        each.close()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("how", [kill, stop])
def test_a_holder_that_dies_or_hangs_is_replaced_and_given_every_descriptor(
    tmp_path: Path, how: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    @in_loop
    async def run(run_dir: Path) -> None:
        holder = Holder(run_dir)
        holder.start()
        keeper = asyncio.ensure_future(holder.keep_running())
        ours, theirs = pair()
        holder.hold("vol0/session", ours.fileno())
        before = holder.child
        how(before.pid)
        with monkeypatch.context() as patched:
            patched.setattr(holder_module, "_ANSWER_TIMEOUT_S", 0.5)
            while holder.child is before:
                # One that hangs is noticed when it takes nothing more.
                holder.drop("nothing")
                await asyncio.sleep(0.001)
        die(holder)
        keeper.cancel()
        second, found = await successor(run_dir)
        assert list(found) == ["vol0/session"]
        ours.close()
        theirs.close()
        os.close(found["vol0/session"])
        await second.stop()

    run(tmp_path)


def begun(holder: Holder) -> None:
    """Return when the holder's process answers: then it listens itself, and the next daemon can tell which it is."""
    channel = holder_module._connect(holder._path)
    assert channel is not None
    found: dict[str, int] = {}
    with closing(channel):
        assert holder_module._take(channel, found) == holder.pid
    for fd in found.values():
        os.close(fd)


@in_loop
async def test_a_holder_that_is_stopped_at_a_takeover_is_ended_with_what_it_holds(tmp_path: Path) -> None:
    first = Holder(tmp_path)
    first.start()
    ours, theirs = pair()
    first.hold("vol0/pool", ours.fileno())
    ours.close()
    first._forget("vol0/pool")
    begun(first)
    die(first)
    stop(first.pid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder_module, "_ANSWER_TIMEOUT_S", 0.1)
        second = Holder(tmp_path)
        assert second.take_over() == {}
    assert await first.child.wait() == 128 + signal.SIGKILL
    with theirs:
        assert theirs.recv(1) == b"", "nothing keeps the socket open"
    second.start()
    await second.stop()


@in_loop
async def test_a_process_that_only_began_to_listen_for_the_holder_is_not_killed(tmp_path: Path) -> None:
    with listen(tmp_path / holder_module.PATH, socket.SOCK_SEQPACKET), pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder_module, "_ANSWER_TIMEOUT_S", 0.1)
        assert Holder(tmp_path).take_over() == {}, "this process has sent itself no signal"


@in_loop
async def test_a_lack_of_descriptors_at_a_takeover_leaves_the_holder_as_it_is(tmp_path: Path) -> None:
    first = Holder(tmp_path)
    first.start()
    with Path(os.devnull).open() as null:
        for number in range(100):
            first.hold(f"vol{number}/pool", null.fileno())
    await first.settled()
    die(first)
    for number in range(100):
        first._forget(f"vol{number}/pool")
    refusal = "held.sock: cannot take over .* RLIMIT_NOFILE"
    with no_descriptor_left(but=20), pytest.raises(DaemonError, match=refusal):
        Holder(tmp_path).take_over()
    second, found = await successor(tmp_path)
    assert len(found) == 100, "a later start finds everything"
    for fd in found.values():
        os.close(fd)
    await second.stop()


@in_loop
async def test_a_holder_gets_more_descriptors_than_its_socket_takes_at_once(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    holder.start()
    keeper = asyncio.ensure_future(holder.keep_running())
    names = [f"vol{number}/pool" for number in range(400)]
    with Path(os.devnull).open() as null:
        for name in names:
            holder.hold(name, null.fileno())
    holder.drop(names.pop())
    await holder.settled()
    before = holder.child
    os.kill(before.pid, signal.SIGKILL)
    while holder.child is before or holder._channel is None:
        await asyncio.sleep(0.01)
    second = holder.child
    await holder.settled()
    assert holder.child is second, "the second holder lives"
    keeper.cancel()
    await asyncio.wait({keeper})
    die(holder)
    heir, found = await successor(tmp_path)
    assert sorted(found) == sorted(names)
    for fd in found.values():
        os.close(fd)
    await heir.stop()


@in_loop
async def test_what_a_supervisor_sent_before_it_died_is_in_the_answer_to_the_next(tmp_path: Path) -> None:
    first = Holder(tmp_path)
    first.start()
    stop(first.pid)
    names = [f"vol{number}/session" for number in range(100)]
    with Path(os.devnull).open() as null:
        for name in names:
            first.hold(name, null.fileno())
    assert not first._unsent
    channel = holder_module._connect(tmp_path / holder_module.PATH)
    assert channel is not None
    channel.send(Take())
    os.kill(first.pid, signal.SIGCONT)
    found = []
    with channel.timeout(DEADLINE_S):
        while True:
            answer, fd = channel.receive_with_descriptor()
            assert answer is not None
            if fd is None:
                break
            found.append(answer.name)
            os.close(fd)
    assert sorted(found) == sorted(names)
    channel.close()
    await first.stop()


@pytest.mark.parametrize(("renewed", "level"), [(True, logging.INFO), (False, logging.WARNING)])
def test_an_end_by_an_upgrade_is_logged_as_info_and_a_death_as_warning(
    tmp_path: Path,
    renewed: bool,
    level: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("ublkpool"), "propagate", True)
    caplog.set_level(logging.INFO, "ublkpool.holder")

    @in_loop
    async def run(run_dir: Path) -> None:
        holder = Holder(run_dir)
        holder.start()
        keeper = asyncio.ensure_future(holder.keep_running())
        before = holder.child
        if renewed:
            holder.renew()
        else:
            before.send(signal.SIGKILL)
        while holder.child is before:
            await asyncio.sleep(0)
        keeper.cancel()
        await holder.stop()

    run(tmp_path)
    assert [each.levelno for each in caplog.records if "holder is gone" in each.getMessage()] == [level]
