"""The daemon's supervised processes start even if processes, descriptors or room are lacking for a while."""

import asyncio
import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from support.fakes.descriptors import open_descriptors
from support.fakes.device_parts import FakeHolder
from ublkpool.bufpool.errors import PoolError
from ublkpool.daemon.backends import backend_process
from ublkpool.daemon.backends.backend_process import BackendProcess
from ublkpool.daemon.processes import broker_process, holder
from ublkpool.daemon.processes.background import owned
from ublkpool.daemon.processes.backoff import Backoff, start_surely
from ublkpool.daemon.processes.broker_process import BrokerProcess
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.settings.config import BackendConfig
from ublkpool.workers.process import fork_child

DEADLINE_S = 60
CODES = (errno.EAGAIN, errno.EMFILE, errno.ENOMEM, errno.ENOSPC)


def error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Scarce:
    """A start that fails the given number of times."""

    def __init__(self, start: Any, codes: tuple[int, ...] = CODES) -> None:
        self._start, self._codes = start, list(codes)
        self.failures = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._codes:
            self.failures += 1
            raise error(self._codes.pop(0))
        return self._start(*arguments, **options)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (broker_process, "RESTART_MIN_S"),
        (broker_process, "RESTART_MAX_S"),
        (holder, "RESTART_PAUSE_S"),
        (holder, "RESTART_MAX_S"),
        (backend_process, "RESTART_MIN_S"),
        (backend_process, "RESTART_MAX_S"),
    ):
        monkeypatch.setattr(module, name, 0.001)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a starved machine have time to listen and to answer."""
    for module, name in (
        (broker_process, "_LISTEN_PATIENCE_S"),
        (broker_process, "REPLY_DEADLINE_S"),
        (holder, "_ANSWER_TIMEOUT_S"),
    ):
        monkeypatch.setattr(module, name, DEADLINE_S)


def in_loop(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))


def test_each_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    codes = [errno.EAGAIN] * 3 + [errno.EMFILE] * 2
    start = Scarce(lambda: None, tuple(codes))

    async def run() -> None:
        delays = Backoff(asyncio.get_running_loop().time, 0.001, 0.001)
        await start_surely("the thing", start, delays, logging.getLogger("ublkpool.test"))

    in_loop(run)
    assert start.failures == len(codes)
    said = [each.getMessage() for each in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("the thing cannot be started: Resource temporarily unavailable")
    assert "Too many open files" in said[1]


def test_the_broker_is_replaced_as_soon_as_it_can_be_and_commands_fail_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = Scarce(fork_child, CODES[:2] * 50)

    async def run() -> None:
        broker = BrokerProcess(f"ipc://{tmp_path}/pool.sock", FakeHolder())
        broker.start()
        monkeypatch.setattr(broker_process, "fork_child", fork)
        told = asyncio.Event()

        async def restarted() -> None:
            told.set()

        keeper = asyncio.ensure_future(broker.keep_running(restarted))
        await broker.child.kill()
        while not fork.failures:
            await asyncio.sleep(0)
        with pytest.raises(PoolError, match="the pool broker is gone"):
            await broker.forget_all_but([])
        await told.wait()
        await broker.forget_all_but([])
        keeper.cancel()
        await broker.stop()

    in_loop(run)


def test_a_broker_whose_socket_was_removed_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        broker = BrokerProcess(f"ipc://{tmp_path}/pool.sock", FakeHolder())
        broker.start()
        keeper = asyncio.ensure_future(broker.keep_running())
        first = broker.child
        await broker.be_reachable()
        assert broker.child is first
        monkeypatch.setattr(broker_process, "_LISTEN_PATIENCE_S", 0)
        (tmp_path / "pool.sock").unlink()
        await asyncio.gather(broker.be_reachable(), broker.be_reachable())
        assert (tmp_path / "pool.sock").exists() and broker.generation == 2
        keeper.cancel()
        await broker.stop()

    in_loop(run)


def test_the_holder_is_replaced_as_soon_as_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork = Scarce(fork_child)

    async def run() -> None:
        first = Holder(tmp_path)
        first.start()
        reader, writer = os.pipe()
        first.hold("vol0/stderr", reader)
        keeper = asyncio.ensure_future(first.keep_running())
        before = first.child
        monkeypatch.setattr(holder, "fork_child", fork)
        await before.kill()
        while first.child is before or first._channel is None:
            await asyncio.sleep(0)
        assert fork.failures == len(CODES) and not keeper.done()
        keeper.cancel()
        first._channel.close()
        second = Holder(tmp_path)
        found = second.take_over()
        assert list(found) == ["vol0/stderr"]
        for fd in (reader, writer, *found.values(), *first._held.values()):
            os.close(fd)
        await second.stop()

    in_loop(run)


def test_a_backend_is_replaced_as_soon_as_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        backend = BackendProcess("vol", BackendConfig(kind="null", cwd="/"), tmp_path, lambda _fd: None)
        backend.start()
        spawn = Scarce(backend._start)
        monkeypatch.setattr(backend, "_start", spawn)
        keeper = asyncio.ensure_future(backend.keep_running())
        before = backend.child
        await before.kill()
        while backend.child is before:
            await asyncio.sleep(0)
        assert spawn.failures == len(CODES) and not keeper.done()
        keeper.cancel()
        await backend.child.kill()

    in_loop(run)


def test_the_failure_of_an_owned_task_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async def fail() -> None:
            raise AssertionError("a bug")

        task = owned("vol0", asyncio.ensure_future(fail()))
        await asyncio.wait({task})
        await asyncio.sleep(0)

    in_loop(run)
    assert "vol0: internal error: AssertionError: a bug" in caplog.text


def test_a_backend_whose_stderr_cannot_be_read_is_killed_and_its_start_fails(tmp_path: Path) -> None:
    def hold(_fd: int) -> None:
        raise error(errno.EMFILE)

    async def run() -> None:
        asyncio.get_running_loop()
        before = open_descriptors()
        backend = BackendProcess("vol", BackendConfig(kind="null", cwd="/"), tmp_path, hold)
        with pytest.raises(OSError, match="Too many open files"):
            backend.start()
        while open_descriptors() != before:
            await asyncio.sleep(0)

    in_loop(run)
