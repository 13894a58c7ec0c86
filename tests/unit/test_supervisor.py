"""The daemon from its start to its end, without a driver: what it says, what it leaves, what holds it up."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ublkpool.daemon import supervisor
from ublkpool.daemon.admin_client import AdminClient
from ublkpool.daemon.config import BackendConfig, DeviceConfig, ServeConfig
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.holder import Holder
from ublkpool.daemon.records import Record, Records
from ublkpool.daemon.takeover import TakeOver

DEADLINE_S = 60
SIZE_BYTES = 1 << 20


class Systemd:
    """The service manager's end of NOTIFY_SOCKET."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def told(self) -> list[str]:
        """What it was told since the last time."""
        said = []
        with suppress(BlockingIOError):
            while True:
                said.append(self._sock.recv(4096, socket.MSG_DONTWAIT).decode())
        return said


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        yield Systemd(sock)


def serving(config: ServeConfig, test: Callable[[AdminClient], Awaitable[None]]) -> None:
    """Run the daemon, and the test beside it once the daemon answers; both must end."""

    async def run() -> None:
        daemon = asyncio.ensure_future(supervisor._serve(config, None))
        client = AdminClient(config.run_dir)
        while not await answers(client):
            assert not daemon.done(), daemon.result()
        try:
            await test(client)
        finally:
            await asyncio.to_thread(client.stop)
            assert await daemon == 0

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


async def answers(client: AdminClient) -> bool:
    with suppress(DaemonError):
        await asyncio.to_thread(client.devices)
        return True
    return False


async def states(client: AdminClient) -> dict[str, str]:
    return {each.name: each.state for each in await asyncio.to_thread(client.devices)}


def device(name: str, kind: str | None = None) -> DeviceConfig:
    backend = BackendConfig(kind=kind, cwd="/") if kind else None
    return DeviceConfig(name=name, size_bytes=SIZE_BYTES, backend=backend)


def test_it_is_ready_though_a_device_is_not_there_and_leaves_nothing(
    tmp_path: Path, systemd: Systemd
) -> None:
    hangs = tmp_path / "hangs.py"
    hangs.write_text("import time\n\n\ndef open() -> None:\n    time.sleep(3600)\n")
    config = ServeConfig(run_dir=tmp_path / "run", devices=(device("stuck", str(hangs)), device("alone")))

    async def test(client: AdminClient) -> None:
        assert "READY=1\nSTATUS=serving 0 devices; waiting for stuck, alone" in systemd.told()
        assert await states(client) == {"stuck": "waiting", "alone": "waiting"}
        await asyncio.to_thread(client.delete, ["alone", "alone"])
        assert await states(client) == {"stuck": "waiting"}

    serving(config, test)
    assert systemd.told()[-1] == "STATUS=serving 0 devices"
    assert not (tmp_path / "run").exists()


def test_a_device_of_the_config_that_cannot_start_is_listed_with_its_reason(
    tmp_path: Path, systemd: Systemd
) -> None:
    config = ServeConfig(run_dir=tmp_path / "run", devices=(device("lost", "/nowhere.py"),))

    async def test(client: AdminClient) -> None:
        while (await states(client))["lost"] != "failed":
            await asyncio.sleep(0.01)
        (status,) = await asyncio.to_thread(client.devices)
        assert "/nowhere.py" in status.reason
        assert "STATUS=serving 0 devices; failed lost" in systemd.told()
        assert await asyncio.to_thread(client.delete, None) == ["lost"]

    serving(config, test)


def left(run_dir: Path, name: str, **about: Any) -> Record:
    """A record that an earlier daemon, whose processes have ended, left."""
    run_dir.mkdir(mode=0o700)
    for each in ("queues", "devices"):
        (run_dir / each).mkdir(mode=0o700)
    record = Record(config=device(name), **about)
    Records(run_dir / "devices").save(record)
    return record


def test_a_device_that_waited_is_there_again_and_a_broken_record_harms_nobody(
    tmp_path: Path, systemd: Systemd
) -> None:
    left(tmp_path / "run", "alone")
    (tmp_path / "run" / "devices" / "torn.json").write_text('{"config": {"name"')
    (tmp_path / "run" / "queues" / "notes").touch()

    async def test(client: AdminClient) -> None:
        assert await states(client) == {"alone": "waiting"}

    serving(ServeConfig(run_dir=tmp_path / "run"), test)
    assert not (tmp_path / "run" / "devices").exists()


def test_a_takeover_that_hangs_holds_up_neither_ready_nor_the_end(
    tmp_path: Path, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "TAKEOVER_PATIENCE_S", 0.01)

    async def hang(*_: object) -> bool:
        await asyncio.Event().wait()
        return False

    monkeypatch.setattr(TakeOver, "device", hang)
    left(tmp_path / "run", "alone")

    async def test(client: AdminClient) -> None:
        assert "READY=1\nSTATUS=serving 0 devices; waiting for alone" in systemd.told()
        with pytest.raises(DaemonError, match="device alone exists already"):
            await asyncio.to_thread(client.add, device("alone"))

    serving(ServeConfig(run_dir=tmp_path / "run"), test)


def test_a_start_that_fails_leaves_what_an_earlier_daemon_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = left(tmp_path / "run", "alone")

    async def fail(*_: object) -> None:
        raise OSError("no more processes")

    holders: list[Holder] = []

    def new_holder(run_dir: Path) -> Holder:
        holders.append(Holder(run_dir))
        return holders[0]

    monkeypatch.setattr(supervisor, "Holder", new_holder)
    monkeypatch.setattr(TakeOver, "clear", fail)
    with pytest.raises(OSError, match="no more processes"):
        asyncio.run(supervisor._serve(ServeConfig(run_dir=tmp_path / "run"), None))
    assert Records(tmp_path / "run" / "devices").load() == [record]
    assert (tmp_path / "run" / "held.sock").is_socket(), "the holder goes on"
    # What the end of the process does.
    assert holders[0]._socket is not None
    holders[0]._socket.close()

    async def end() -> None:
        holder = Holder(tmp_path / "run")
        holder.take_over()
        assert holder.pid
        await holder.stop()

    asyncio.run(end())
