"""The broker as a process: the daemon's commands, its own end, what it leaves."""

import os
import signal
import socket
from pathlib import Path

import pytest

from support.fakes.broker_rig import (
    DEVICE,
    INSTANCE,
    BrokerProcess,
    Connect,
    Start,
    introduce,
    receive_reply,
    send_command,
)
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool.arena import Arena
from ublkpool.bufpool.pool.broker import run_broker
from ublkpool.bufpool.pool.broker_commands import (
    AddDevice,
    Command,
    Done,
    Failed,
    GetStatistics,
    Register,
    RemoveDevice,
)


def test_commands_that_cannot_be_are_refused_with_a_reason(
    broker: BrokerProcess, arena: Arena, tmp_path: Path
) -> None:
    def reason(command: Command, fd: int | None = None) -> str:
        reply = broker.call(command, fd)
        assert isinstance(reply, Failed)
        return reply.reason

    assert "is served already" in reason(AddDevice(DEVICE), arena.control_fd)
    assert "without its control segment" in reason(AddDevice(6))
    assert "of device 5, not 6" in reason(AddDevice(6), arena.control_fd)
    assert "not a control segment" in reason(AddDevice(6), arena.data_fd)
    with (tmp_path / "empty").open("wb") as empty:
        assert "no header" in reason(AddDevice(6), empty.fileno())
    assert "device 6 is not served" in reason(Register(6, 0, 1))
    assert "queue 2 is none" in reason(Register(DEVICE, 2, 1))
    assert "not served" in reason(GetStatistics(6))
    broker.control.send(b'{"type":"dance"}')
    assert isinstance(receive_reply(broker.control), Failed)
    broker.control.send(b'{"x":' + b"[" * 50_000)
    assert isinstance(receive_reply(broker.control), Failed)
    broker.control.send(b" " * 100_000)
    assert isinstance(receive_reply(broker.control), Failed)
    assert broker.statistics().devices == (DEVICE,)


def test_refused_descriptors_do_not_pile_up(broker: BrokerProcess, arena: Arena) -> None:
    broker.call(GetStatistics())
    before = broker.descriptor_count()
    for _ in range(20):
        broker.call(AddDevice(6), arena.control_fd)
        broker.call(GetStatistics(), arena.control_fd)
    assert broker.descriptor_count() == before


def test_a_removed_device_is_unmapped_and_may_come_again(broker: BrokerProcess, arena: Arena) -> None:
    maps = Path(f"/proc/{broker.process.pid}/maps")
    assert INSTANCE in maps.read_text()
    assert broker.call(RemoveDevice(DEVICE)) == Done()
    assert INSTANCE not in maps.read_text()
    introduce(broker, arena)


def test_the_broker_never_maps_the_data(broker: BrokerProcess) -> None:
    assert f"{INSTANCE}-{DEVICE}-data" not in Path(f"/proc/{broker.process.pid}/maps").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_leases_stay(
    broker: BrokerProcess, arena: Arena, endpoint: str, number: signal.Signals
) -> None:
    before = list(arena.control.slot_owners())
    broker.process.send_signal(number)
    assert broker.wait() == (0, "")
    assert list(arena.control.slot_owners()) == before
    assert not Path(endpoint.removeprefix("ipc://")).exists()
    with pytest.raises(PoolError, match="broker is gone"):
        receive_reply(broker.control)


def test_the_end_of_the_daemon_ends_it(broker: BrokerProcess) -> None:
    broker.control.close()
    assert broker.wait() == (0, "")


def test_it_can_outlive_the_daemon(start: Start, arena: Arena, worker: Connect) -> None:
    broker = start(exit_on_eof=False)
    introduce(broker, arena)
    broker.control.close()
    first = worker(0, 1)
    first.say_hello()
    assert broker.process.poll() is None


def test_a_daemon_that_does_not_read_its_replies_blocks_no_worker(
    broker: BrokerProcess, worker: Connect
) -> None:
    for _ in range(3000):
        try:
            send_command(broker.control, GetStatistics(DEVICE))
        except TimeoutError:
            pytest.fail("the broker stopped reading commands")
    worker(0, 1).say_hello()


def test_an_endpoint_that_cannot_be_bound_is_one_clear_error(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    umask = os.umask(0o077)
    try:
        with ours, theirs, pytest.raises(PoolError, match="cannot listen on ipc://"):
            run_broker(f"ipc://{tmp_path}/missing/broker", theirs)
    finally:
        os.umask(umask)


def test_its_socket_is_private(broker: BrokerProcess, endpoint: str) -> None:
    assert Path(endpoint.removeprefix("ipc://")).stat().st_mode & 0o077 == 0
