"""Workers and the pool broker as real processes: which rights they have once they serve, and none serves with more."""

import asyncio
import errno
import logging
import os
import resource
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from support.fakes.device_parts import FakeHolder
from support.fakes.loop_rig import DEVICE, HELLO, TOKEN, NoRing
from support.fakes.queue_rig import Plan
from support.fakes.ring_peer import RingPeer
from support.fakes.worker_spec import queue_config, worker_spec
from support.rights import expect_threads_without_rights
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool import broker_commands
from ublkpool.bufpool.pool.arena import Arena, arena_prefix
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.processes import broker_process
from ublkpool.daemon.processes.broker_process import BrokerProcess, Leases
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.daemon.settings import worker_account
from ublkpool.daemon.settings.run_directory import let_workers_connect
from ublkpool.daemon.settings.worker_account import check_account, choose_account, wanted_accounts, why_not
from ublkpool.ublk import _native, process_calls
from ublkpool.workers import messages, queue_loop
from ublkpool.workers.listening import Place
from ublkpool.workers.privileges import Account
from ublkpool.workers.process import EXIT_FAULT, fork_child, run_worker
from ublkpool.workers.queue_loop import WorkerSpec, buffer_classes
from ublkpool.workers.record_gate import RecordGate

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
ACCOUNT = Account("daemon", 1, 1, ())
ROOT = Account("root", 0, 0, ())
DEADLINE_S = 60.0


@pytest.fixture
def place() -> Iterator[Path]:
    """A run directory that every user can pass, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o711)
        (Path(made) / "queues").mkdir(mode=0o700)
        yield Path(made)


@pytest.fixture
def without_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver, and what root can do only outside of a container."""
    monkeypatch.setattr(queue_loop, "IoUring", NoRing)
    monkeypatch.setattr(process_calls, "set_io_flusher", lambda: None)
    monkeypatch.setattr(process_calls, "lock_memory", lambda: None)
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)


@contextmanager
def arena_of(place: Path) -> Iterator[Arena]:
    geometry = Geometry.build([(4096, 4), (Plan().max_io_bytes, 4)])
    prefix = arena_prefix(f"test-{place.name}", DEVICE)
    with Arena.create(prefix, geometry, queues=1, device_number=DEVICE, reserve=(1, 1)) as arena:
        yield arena
        arena.unlink()


class Scene:
    """A broker and one worker, with the supervisor's ends of their sockets."""

    def __init__(self, place: Path, arena: Arena, account: Account | None) -> None:
        self.place, self.arena, self._account = place, arena, account
        self.broker = BrokerProcess(f"ipc://{place}/pool.sock", FakeHolder(), account)
        self.broker.start()
        self.leases = Leases(self.broker, DEVICE, 1, arena.control_fd)
        self.workers: list[WorkerProcess] = []

    def _spec(self) -> WorkerSpec:
        return worker_spec(
            queue_config(buffer_classes(self.arena)),
            self.place / "queues/0.0",
            ring_socket=self.place / "queues/0.0.ring",
            pool_endpoint=self.broker.endpoint,
            account=self._account,
        )

    def fork_worker(self) -> WorkerProcess:
        spec, gate = self._spec(), RecordGate()
        ours, theirs = messages.pair()
        descriptors = _native.ffi.new("struct uq_iod[]", 4)
        inherited = [self.arena.data_fd, self.arena.control_fd, theirs.fileno(), gate.reader]
        pid = fork_child(
            lambda: run_worker(spec, -1, [descriptors], self.arena, theirs, gate), inherited, "worker"
        )
        theirs.close()
        worker = WorkerProcess(0, None, pid, ours, lambda *_: None)
        gate.open()
        self.workers.append(worker)
        return worker


@asynccontextmanager
async def scene(place: Path, account: Account | None = ACCOUNT) -> AsyncIterator[Scene]:
    with arena_of(place) as arena:
        made = Scene(place, arena, account)
        try:
            yield made
        finally:
            for worker in made.workers:
                await worker.child.kill()
                worker.close()
            await made.broker.stop()


def in_loop(test: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))


@needs_root
@pytest.mark.parametrize("account", [ACCOUNT, ROOT], ids=["user", "root"])
def test_what_serves_is_an_ordinary_user_or_root_without_its_capabilities(
    place: Path, without_ring: None, account: Account
) -> None:
    async def run() -> None:
        async with scene(place, account) as made:
            await made.leases.register(1)
            worker = made.fork_worker()
            await worker.fetched()
            expect_threads_without_rights(worker.child.pid, account.user, account.group)
            # It was told of the device, so it has begun.
            expect_threads_without_rights(made.broker.child.pid, account.user, account.group)
            await worker.child.kill()

    in_loop(run)


@needs_root
def test_a_worker_without_rights_is_reached_by_its_backend_and_by_the_next_broker(
    place: Path, without_ring: None
) -> None:
    async def run() -> None:
        async with scene(place) as made:
            await made.leases.register(1)
            worker = made.fork_worker()
            await worker.fetched()
            await worker.ask(messages.Expect(TOKEN.hex(), 0, 0, False, os.getuid()))
            with RingPeer(place / "queues/0.0.ring", TOKEN) as peer:
                peer.open()
            keeper = asyncio.ensure_future(made.broker.keep_running())
            await made.broker.child.kill()
            while made.broker.generation == 1:
                await asyncio.sleep(0.01)
            await made.leases.refresh()
            # The new broker grants nothing before the worker, which must connect to it for that, has told what it has.
            while not await _answered(made.broker):
                await asyncio.sleep(0.01)
            expect_threads_without_rights(made.broker.child.pid, ACCOUNT.user, ACCOUNT.group)
            keeper.cancel()
            await worker.child.kill()

    in_loop(run)


async def _answered(broker: BrokerProcess) -> int:
    reply = await broker.command(broker_commands.GetStatistics())
    assert isinstance(reply, broker_commands.StatisticsReply)
    return reply.broker.frames


@needs_root
def test_a_backend_over_zeromq_reaches_a_worker_without_rights(place: Path, without_ring: None) -> None:
    async def run() -> None:
        async with scene(place) as made:
            await made.leases.register(1)
            worker = made.fork_worker()
            await worker.fetched()
            await worker.ask(messages.Expect(TOKEN.hex(), 0, 0, False, os.getuid()))
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            backend = context.socket(zmq.DEALER)
            backend.setsockopt(zmq.ROUTING_ID, TOKEN)
            backend.setsockopt(zmq.LINGER, 0)
            backend.connect(f"ipc://{place}/queues/0.0")
            backend.send(HELLO)
            await worker.linked()
            backend.close()
            context.term()
            await worker.child.kill()

    in_loop(run)


@needs_root
def test_a_worker_that_cannot_give_up_its_rights_ends_before_it_serves(
    place: Path, without_ring: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_account: Account) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(queue_loop, "give_up_rights", refused)

    async def run() -> None:
        async with scene(place) as made:
            await made.leases.register(1)
            worker = made.fork_worker()
            with pytest.raises(
                Exception, match=r"queue 0: its worker cannot become user daemon: .*not permitted"
            ):
                await worker.fetched()
            assert await worker.child.wait() == EXIT_FAULT

    in_loop(run)


@needs_root
def test_a_worker_that_cannot_prepare_for_that_fetches_nothing(
    place: Path, without_ring: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(resource, "setrlimit", refused)

    async def run() -> None:
        async with scene(place) as made:
            await made.leases.register(1)
            worker = made.fork_worker()
            with pytest.raises(Exception, match=r"queue 0 cannot start: .*not permitted"):
                await worker.fetched()

    in_loop(run)


@needs_root
@pytest.mark.parametrize("call", ["give_up_rights", "forbid_new_rights"])
def test_a_broker_that_cannot_give_up_its_rights_serves_nothing_and_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], call: str
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(broker_process, call, refused)
    logging.getLogger("ublkpool").addHandler(
        handler := logging.StreamHandler(os.fdopen(2, "w", closefd=False))
    )

    async def run() -> None:
        broker = BrokerProcess(f"ipc://{place}/pool.sock", FakeHolder(), ACCOUNT)
        broker.start()
        with pytest.raises(PoolError):
            await broker.forget_all_but([])
        assert await broker.child.wait() == EXIT_FAULT
        await broker.stop()

    try:
        in_loop(run)
    finally:
        logging.getLogger("ublkpool").removeHandler(handler)
    said = capfd.readouterr().err
    assert "the pool broker cannot become user daemon: [Errno 1] Operation not permitted" in said
    assert "Traceback" not in said


@needs_root
def test_the_broker_s_socket_is_the_daemon_s_and_workers_of_either_kind_can_connect(place: Path) -> None:
    async def run() -> None:
        broker = BrokerProcess(f"ipc://{place}/pool.sock", FakeHolder(), ACCOUNT)
        broker.start()
        await broker.forget_all_but([])
        path = place / "pool.sock"

        def shown() -> tuple[int, int, int]:
            about = path.stat()
            return about.st_uid, about.st_gid, about.st_mode & 0o777

        assert shown() == (0, ACCOUNT.group, 0o770)
        # systemd gives it to root at each start.
        os.chown(path, 0, 0)
        let_workers_connect(path, ACCOUNT)
        assert shown() == (0, ACCOUNT.group, 0o770)
        let_workers_connect(path, ROOT)
        assert shown() == (0, 0, 0o700)
        await broker.stop()
        # It may not remove its socket, which is no failure of its own.
        assert broker.child.exit_status == 0 and not path.exists()
        let_workers_connect(path, ACCOUNT)

    in_loop(run)


def test_a_socket_that_could_not_be_made_in_time_is_missed_with_the_reason_and_the_way_out(
    place: Path,
) -> None:
    missing = Place(place / "none/0.0", 1, 0o600, None, 1)  # type: ignore[arg-type]
    missing.take()
    with pytest.raises(OSError, match=rf"No such file.*at the worker's start.*kill {os.getpid()}"):
        missing.listen()


def test_a_taken_place_refuses_connections_until_it_listens(place: Path) -> None:
    import socket

    path = place / "queues/0.0"
    taken = Place(path, socket.SOCK_STREAM, 0o600, None, 1)
    taken.take()
    with socket.socket(socket.AF_UNIX) as peer, pytest.raises(ConnectionRefusedError):
        peer.connect(str(path))
    (place / "queues").rename(place / "elsewhere")
    with taken.listen(), socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(place / "elsewhere/0.0"))


@needs_root
def test_without_a_user_of_ours_they_are_root_without_capabilities_and_the_log_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_account, "DEFAULT_USER", "no-such-user")
    (place / "lock").touch()
    wanted = wanted_accounts(None, None)
    assert choose_account(wanted, None, place) == ROOT
    assert "run as root, without its capabilities: there is no user no-such-user: useradd" in caplog.text


@needs_root
def test_the_user_of_ours_is_taken_where_it_exists_and_can_do_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_account, "DEFAULT_USER", "daemon")
    (place / "lock").touch()
    assert choose_account(wanted_accounts(None, None), None, place) == ACCOUNT
    assert not caplog.records
    # Where it cannot reach the broker's socket they stay root; the log has both reasons.
    place.chmod(0o700)
    assert choose_account(wanted_accounts(None, None), None, place) == ROOT
    assert f"user daemon cannot reach {place}/lock: Permission denied: let it pass" in caplog.text
    assert "run as root, without its capabilities" in caplog.text


@needs_root
def test_a_user_of_the_config_is_taken_or_the_start_is_refused(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (place / "lock").touch()
    assert choose_account(wanted_accounts("daemon", None), "daemon", place) == ACCOUNT
    assert choose_account(wanted_accounts("root", None), "root", place) == ROOT
    check_account("daemon", None, place)
    assert not caplog.records
    place.chmod(0o700)
    with pytest.raises(
        ConfigError, match=r"daemon.user: user daemon cannot reach .*: let it pass each directory"
    ):
        choose_account(wanted_accounts("daemon", None), "daemon", place)
    with pytest.raises(ConfigError, match=r"no such user: no-such-user; create it with"):
        wanted_accounts("no-such-user", None)
    with pytest.raises(ConfigError, match=r"the group of user daemon is that of the backends"):
        wanted_accounts("daemon", 1)
    parent = place / "queues"
    with pytest.raises(ConfigError, match=r"user daemon cannot reach"):
        check_account("daemon", None, parent / "below")


@needs_root
def test_where_no_process_can_change_its_user_workers_keep_their_rights_and_the_log_says_why(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_account: Account) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(worker_account, "give_up_rights", refused)
    (place / "lock").touch()
    assert choose_account((ACCOUNT, ROOT), None, place) is None
    assert "a process cannot become user daemon here: Operation not permitted" in caplog.text
    assert "do not run as user root" in caplog.text
    with pytest.raises(ConfigError, match=r"daemon.user: a process cannot become user daemon here"):
        choose_account((ACCOUNT,), "daemon", place)


@needs_root
def test_a_trial_that_dies_is_no_success(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_account, "give_up_rights", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    assert why_not(ACCOUNT, place) == "the process that tried it ended with 9"


def test_a_daemon_that_is_no_root_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    assert wanted_accounts(None, None) == ()
    assert wanted_accounts("daemon", None) == ()
    with pytest.raises(ConfigError, match="only a daemon that runs as root can have workers of user root"):
        wanted_accounts("root", None)
