"""The daemon from its start to its end, without a driver: its messages, its leftovers, its delays."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.served import Client, serving
from ublkpool.daemon import lifetime, notify, supervisor
from ublkpool.daemon.admin.wire import (
    AddRequest,
    DeleteRequest,
    ListRequest,
)
from ublkpool.daemon.device.records import Record, Records
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.events.keeper import earlier_events
from ublkpool.daemon.events.kinds import DaemonStopped
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig, ServeConfig
from ublkpool.daemon.status import State
from ublkpool.daemon.takeover import TakeOver
from ublkpool.workers.template import TITLE as TEMPLATE

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="root only")
SIZE_BYTES = 1 << 20


class Systemd:
    """The service manager's end of NOTIFY_SOCKET."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def told(self) -> list[str]:
        """The messages since the last call."""
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


def device(name: str, kind: str | None = None) -> DeviceConfig:
    backend = BackendConfig(kind=kind, cwd="/") if kind else None
    return DeviceConfig(name=name, size_bytes=SIZE_BYTES, backend=backend)


def test_the_daemon_is_ready_though_devices_wait_and_leaves_nothing(tmp_path: Path, systemd: Systemd) -> None:
    hangs = tmp_path / "hangs.py"
    hangs.write_text("import time\n\n\ndef open() -> None:\n    time.sleep(3600)\n")
    config = ServeConfig(
        run_dir=tmp_path / "run",
        state_dir=tmp_path / "state",
        devices=(device("stuck", str(hangs)), device("alone")),
    )

    async def test(client: Client) -> None:
        assert "READY=1\nSTATUS=serving 0 devices; waiting for stuck, alone" in systemd.told()
        assert await client.states() == {"stuck": "waiting", "alone": "waiting"}
        await client.ask(DeleteRequest(names=["alone", "alone"]))
        assert await client.states() == {"stuck": "waiting"}

    serving(config, test)
    # An add whose backend does not run yet is undone before the daemon says that it stops.
    assert [each for each in systemd.told() if each != "STOPPING=1"][-1] == "STATUS=serving 0 devices"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("is_heard", [False, True])
def test_a_status_text_is_composed_only_for_a_service_manager_that_listens(
    tmp_path: Path, systemd: Systemd, monkeypatch: pytest.MonkeyPatch, is_heard: bool
) -> None:
    if not is_heard:
        monkeypatch.delenv("NOTIFY_SOCKET")
    composed: list[str] = []
    describe = notify.describe

    def note(devices: Iterable[tuple[str, State]]) -> str:
        composed.append(describe(devices))
        return composed[-1]

    monkeypatch.setattr(notify, "describe", note)

    async def test(client: Client) -> None:
        composed.clear()
        await client.ask(AddRequest(device=device("alone")))
        await client.ask(DeleteRequest(names=["alone"]))

    serving(ServeConfig(run_dir=tmp_path / "run", state_dir=tmp_path / "state"), test)
    assert ("serving 0 devices; waiting for alone" in composed) == is_heard
    assert bool(composed) == is_heard
    assert bool(systemd.told()) == is_heard


def test_a_device_of_the_config_that_cannot_start_is_listed_with_its_reason(
    tmp_path: Path, systemd: Systemd
) -> None:
    config = ServeConfig(
        run_dir=tmp_path / "run", state_dir=tmp_path / "state", devices=(device("lost", "/nowhere.py"),)
    )

    async def test(client: Client) -> None:
        while (await client.states())["lost"] != "failed":
            await asyncio.sleep(0.01)
        (status,) = await client.ask(ListRequest())
        assert "/nowhere.py" in status["reason"]
        assert "STATUS=serving 0 devices; failed lost" in systemd.told()
        assert await client.ask(DeleteRequest(names=None)) == ["lost"]

    serving(config, test)


def in_the_way(run_dir: Path) -> dict[str, Any]:
    (run_dir / "attach.sock").unlink()
    (run_dir / "attach.sock").touch()
    return {}


def no_place_for_state(run_dir: Path) -> dict[str, Any]:
    run_dir.with_name("a file").touch()
    return {"state_dir": run_dir.with_name("a file")}


def a_foreign_state_directory(run_dir: Path) -> dict[str, Any]:
    run_dir.with_name("papers").mkdir(mode=0o700)
    run_dir.with_name("papers").joinpath("thesis.tex").touch()
    return {"state_dir": run_dir.with_name("papers")}


def a_queue_directory_that_is_none(run_dir: Path) -> dict[str, Any]:
    (run_dir / "queues").rmdir()
    (run_dir / "queues").touch()
    return {}


def no_such_group(run_dir: Path) -> dict[str, Any]:
    return {"group": "no-such-group"}


@pytest.mark.parametrize(
    ("hinder", "words"),
    [
        (in_the_way, "attach.sock: in the way"),
        (no_place_for_state, "a file: it is not a directory"),
        (a_foreign_state_directory, "it contains thesis.tex"),
        (a_queue_directory_that_is_none, "queues: Not a directory"),
        (no_such_group, "no such group: no-such-group"),
    ],
)
def test_a_daemon_that_would_be_refused_does_not_make_the_earlier_one_leave(
    tmp_path: Path, systemd: Systemd, hinder: Callable[[Path], dict[str, Any]], words: str
) -> None:
    run_dir = tmp_path / "run"

    async def test(client: Client) -> None:
        successor = ServeConfig(run_dir=run_dir, state_dir=tmp_path / "state")._replace(**hinder(run_dir))
        with pytest.raises(DaemonError, match=words):
            await lifetime._serve(successor._replace(replace=True), lifetime.Machine(None, -1))
        assert await client.answers()

    serving(ServeConfig(run_dir=run_dir, state_dir=tmp_path / "state"), test)


@needs_root
def test_a_group_that_cannot_enter_the_run_directory_does_not_make_the_earlier_daemon_leave(
    tmp_path: Path, systemd: Systemd
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)

    async def test(client: Client) -> None:
        successor = ServeConfig(run_dir=run_dir, state_dir=tmp_path / "state", group="nogroup", replace=True)
        with pytest.raises(DaemonError, match=r"group .* cannot enter it"):
            await lifetime._serve(successor, lifetime.Machine(None, -1))
        assert await client.answers()

    serving(ServeConfig(run_dir=run_dir, state_dir=tmp_path / "state"), test)


def test_a_file_in_the_way_of_a_socket_is_refused_before_a_takeover_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left(tmp_path / "run", "alone")
    (tmp_path / "run" / "admin.sock").touch()
    begun: list[Record] = []

    async def note(self: TakeOver) -> None:
        begun.extend(self.records)

    monkeypatch.setattr(TakeOver, "clear", note)
    with pytest.raises(DaemonError, match=r"admin\.sock: in the way"):
        asyncio.run(
            lifetime._serve(
                ServeConfig(run_dir=tmp_path / "run", state_dir=tmp_path / "state"),
                lifetime.Machine(None, -1),
            )
        )
    assert not begun


def left(run_dir: Path, name: str, **about: Any) -> Record:
    """A record that an earlier daemon, whose processes have ended, left."""
    run_dir.mkdir(mode=0o700)
    for each in ("queues", "devices"):
        (run_dir / each).mkdir(mode=0o700)
    record = Record(config=device(name), **about)
    Records(run_dir / "devices").save(record)
    return record


def test_a_waiting_device_is_listed_again_and_a_broken_record_harms_no_other(
    tmp_path: Path, systemd: Systemd
) -> None:
    left(tmp_path / "run", "alone")
    (tmp_path / "run" / "devices" / "torn.json").write_text('{"config": {"name"')
    (tmp_path / "run" / "queues" / "notes").touch()

    async def test(client: Client) -> None:
        assert await client.states() == {"alone": "waiting"}

    serving(ServeConfig(run_dir=tmp_path / "run", state_dir=tmp_path / "state"), test)
    assert not (tmp_path / "run" / "devices").exists()


def test_a_takeover_that_hangs_delays_neither_ready_nor_the_end(
    tmp_path: Path, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifetime, "TAKEOVER_PATIENCE_S", 0.01)

    async def hang(*_: object) -> bool:
        await asyncio.Event().wait()
        return False

    monkeypatch.setattr(TakeOver, "device", hang)
    left(tmp_path / "run", "alone")

    async def test(client: Client) -> None:
        assert "READY=1\nSTATUS=serving 0 devices; waiting for alone" in systemd.told()
        with pytest.raises(DaemonError, match="device alone exists already"):
            await client.ask(AddRequest(device=device("alone")))

    serving(ServeConfig(run_dir=tmp_path / "run", state_dir=tmp_path / "state"), test)


def children() -> list[str]:
    """The names of this process's children."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [Path(f"/proc/{pid}/comm").read_text().strip() for pid in found]


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

    monkeypatch.setattr(lifetime, "Holder", new_holder)
    monkeypatch.setattr(TakeOver, "clear", fail)
    with pytest.raises(OSError, match="no more processes"):
        asyncio.run(
            lifetime._serve(
                ServeConfig(run_dir=tmp_path / "run", state_dir=tmp_path / "state"),
                lifetime.Machine(None, -1),
            )
        )
    assert Records(tmp_path / "run" / "devices").load() == [record]
    assert (tmp_path / "run" / "held.sock").is_socket(), "the holder goes on"
    assert TEMPLATE not in children(), "the template of workers has ended"
    ended = earlier_events(tmp_path / "state", 1 << 20)[-1]
    assert (ended.code, ended.details["leaves"]) == (DaemonStopped.code, True), "the daemon has not died"
    # As the end of the process would.
    assert holders[0]._channel is not None
    holders[0]._channel.close()

    async def end() -> None:
        holder = Holder(tmp_path / "run")
        holder.take_over()
        assert holder.pid
        await holder.stop()

    asyncio.run(end())


def test_a_configured_device_deleted_during_a_takeover_stays_deleted_and_a_lost_one_is_added_anew(
    tmp_path: Path, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifetime, "TAKEOVER_PATIENCE_S", 0.01)
    go, over = asyncio.Event(), asyncio.Event()
    really, really_close = TakeOver.device, TakeOver.close

    async def late(self: TakeOver, record: Record, show: Any) -> bool:
        await go.wait()
        return await really(self, record, show)

    def close(self: TakeOver) -> None:
        really_close(self)
        over.set()

    monkeypatch.setattr(TakeOver, "device", late)
    monkeypatch.setattr(TakeOver, "close", close)
    left(tmp_path / "run", "lost")
    config = ServeConfig(
        run_dir=tmp_path / "run", state_dir=tmp_path / "state", devices=(device("lost"), device("unwanted"))
    )

    async def test(client: Client) -> None:
        assert await client.states() == {"lost": "waiting", "unwanted": "waiting"}
        await client.ask(DeleteRequest(names=["unwanted"]))
        go.set()
        await over.wait()
        assert await client.states() == {"lost": "waiting"}

    serving(config, test)


def test_the_users_of_many_devices_are_looked_for_a_few_at_a_time_and_all_are_named() -> None:
    class Looked:
        now = most = 0

        def __init__(self, number: int) -> None:
            self.number = number

        async def check_unused(self) -> None:
            Looked.now += 1
            Looked.most = max(Looked.most, Looked.now)
            await asyncio.sleep(0)
            Looked.now -= 1
            if self.number % 10 == 0:
                raise DaemonError(f"disk{self.number} is in use")

    devices: Any = [Looked(number) for number in range(3 * supervisor.LOOKED_AT_ONCE_MAX)]
    with pytest.raises(DaemonError) as refused:
        asyncio.run(supervisor._check_all_unused(devices))
    assert [f"disk{number} is in use" in str(refused.value) for number in (0, 10, 20)] == [True] * 3
    assert Looked.most == supervisor.LOOKED_AT_ONCE_MAX
