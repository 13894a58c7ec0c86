"""The admin socket: requests, errors, clients that misbehave or disconnect, daemons that do not run."""

import asyncio
import errno
import json
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.fakes.daemon import FakeDaemon, running_daemon
from ublkpool.daemon.admin.client import Client
from ublkpool.daemon.admin.wire import REQUEST_BYTES_MAX, DeleteRequest
from ublkpool.daemon.errors import DaemonError, DaemonUnreachable, RemoteError
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig

DEADLINE_S = 60


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running_daemon(tmp_path) as running:
        yield running


@pytest.fixture
def client(daemon: FakeDaemon) -> Client:
    return Client(daemon.run_dir)


def connect(daemon: FakeDaemon) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(DEADLINE_S)
    connection.connect(str(daemon.run_dir / "admin.sock"))
    return connection


def say(connection: socket.socket, line: bytes) -> dict[str, Any]:
    """Send a line; returns the first line of the answer."""
    connection.sendall(line)
    with connection.makefile("rb") as lines:
        answer: dict[str, Any] = json.loads(lines.readline())
    return answer


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)


def until_a_disconnect_is_noticed(daemon: FakeDaemon) -> None:
    """Let another client wait and disconnect: by then the server has also polled the connections before it."""
    before = daemon.service.waits_cancelled
    operations = daemon.server.statistics()["operations"]
    daemon.service.states["never live"] = "waiting"
    with connect(daemon) as connection:
        connection.sendall(b'{"v":1,"op":"wait","name":"never live"}\n')
        until(lambda: daemon.server.statistics()["operations"] == operations + 1)
    until(lambda: daemon.service.waits_cancelled > before)
    assert daemon.service.waits_cancelled == before + 1
    # The server forgets a cancelled operation a moment after the service has counted it.
    until(lambda: daemon.server.statistics()["operations"] <= operations)
    assert daemon.server.statistics()["operations"] == operations


MEMORY = BackendConfig(kind="memory")


def test_a_device_is_added_listed_and_deleted_through_the_socket(daemon: FakeDaemon) -> None:
    heard: list[str] = []
    client = Client(daemon.run_dir, heard.append)
    config = DeviceConfig(name="a", size_bytes=1 << 30, queues=2, backend=MEMORY)
    added = client.add(config)
    assert daemon.service.configs == {"a": config}
    assert heard == ["creating a"]
    assert added.path == "/dev/ublkb0"
    assert [worker.pid for worker in added.workers] == [100, 101]
    assert client.devices() == [added]
    assert client.stats()[0].queues[0].copies.kernel_bytes == 20480
    assert client.delete(["a"], force=True) == ["a"]
    assert daemon.service.forced == {True}
    assert client.devices() == []


def test_all_devices_are_deleted_with_names_null(client: Client) -> None:
    for name in ("a", "b"):
        client.add(DeviceConfig(name=name))
    assert client.delete(None) == ["a", "b"]


def test_a_deletion_keeps_the_stores_if_asked_and_an_earlier_daemon_reads_one_that_does_not(
    daemon: FakeDaemon,
) -> None:
    client = Client(daemon.run_dir)
    for keeps in (True, False):
        client.add(DeviceConfig(name="a"))
        client.delete(["a"], keeps_stores=keeps)
    assert daemon.service.forgot == [False, True]
    sent = msgspec.json.decode(msgspec.json.encode(DeleteRequest(names=["a"])))
    assert sent == {"op": "del", "v": 1, "names": ["a"], "force": False}


def test_errors_keep_their_status_and_text(client: Client) -> None:
    client.add(DeviceConfig(name="a"))
    with pytest.raises(RemoteError, match=r"^a: there is such a device already$") as failed:
        client.add(DeviceConfig(name="a"))
    bad = BackendConfig(kind="memory", options={"bad": "1"})
    with pytest.raises(RemoteError, match=r"^memory: unknown option bad$") as refused:
        client.add(DeviceConfig(name="b", backend=bad))
    assert (failed.value.status, refused.value.status) == (1, 2)


def test_a_bug_is_one_line_and_is_logged(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RemoteError, match=r"^internal error: ZeroDivisionError: by zero"):
        client.add(DeviceConfig(name="bug"))
    assert "ZeroDivisionError" in caplog.text
    assert client.devices() == []


def test_stop_reaches_the_service(daemon: FakeDaemon, client: Client) -> None:
    client.stop()
    assert daemon.service.stopped


def test_only_the_owner_may_connect(daemon: FakeDaemon) -> None:
    mode = (daemon.run_dir / "admin.sock").stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"garbage", "bad request: "),
        (b"\xff\xfe", "bad request: "),
        (b'{"op":' + b"[" * 2000, "bad request: "),
        (b"{}", "bad request: Object missing required field `v`"),
        (b'{"v":2,"op":"list"}', "bad request: version 2, this daemon speaks 1"),
        (b'{"v":1,"op":"format"}', "bad request: Invalid value 'format' - at `$.op`"),
        (b'{"v":1,"op":"list","x":1}', "bad request: Object contains unknown field `x`"),
        (b'{"v":1,"op":"add","device":{"name":"a","queues":0}}', "bad request: Expected `int` >= 1"),
        (b'{"v":1,"op":"add","device":{"name":"../a"}}', "bad request: Expected `str` matching"),
    ],
)
def test_an_invalid_request_is_answered_and_the_connection_goes_on(
    daemon: FakeDaemon, line: bytes, error: str
) -> None:
    with connect(daemon) as connection:
        answer = say(connection, line + b"\n")
        assert answer["error"].startswith(error)
        assert (answer["ok"], answer["status"]) == (False, 2)
        assert say(connection, b'{"v":1,"op":"list"}\n') == {"ok": True, "result": []}


def test_an_endless_line_is_refused_and_the_connection_closed(daemon: FakeDaemon) -> None:
    with connect(daemon) as connection:
        answer = say(connection, b"x" * (REQUEST_BYTES_MAX + 1))
        assert answer["error"] == f"bad request: longer than {REQUEST_BYTES_MAX} bytes"
    until(lambda: daemon.server.statistics()["connections"] == 0)
    assert daemon.server.statistics()["failures"] == 1


def test_an_add_takes_its_store_over_only_on_command(daemon: FakeDaemon) -> None:
    client = Client(daemon.run_dir)
    client.add(DeviceConfig(name="a", backend=MEMORY))
    client.add(DeviceConfig(name="b", backend=MEMORY), take_over=True)
    assert daemon.service.take_overs == [False, True]


def test_an_add_is_cancelled_when_its_client_disconnects(daemon: FakeDaemon, client: Client) -> None:
    daemon.service.hold_adds = asyncio.Event()
    with connect(daemon) as connection:
        connection.sendall(b'{"v":1,"op":"add","device":{"name":"a"}}\n')
        until(lambda: daemon.server.statistics()["operations"] == 1)
    until(lambda: daemon.service.adds_cancelled == 1)
    until(lambda: daemon.server.statistics()["operations"] == 0)
    assert client.devices() == []


def test_a_deletion_runs_to_its_end_when_its_client_disconnects(daemon: FakeDaemon) -> None:
    daemon.service.hold_deletes = asyncio.Event()
    Client(daemon.run_dir).add(DeviceConfig(name="a"))
    with connect(daemon) as connection:
        connection.sendall(b'{"v":1,"op":"del","names":["a"]}\n')
        until(lambda: daemon.server.statistics()["operations"] == 1)
    until_a_disconnect_is_noticed(daemon)
    daemon.loop.call_soon_threadsafe(daemon.service.hold_deletes.set)
    until(lambda: not daemon.service.configs)


def test_a_wait_is_cancelled_when_its_client_disconnects(daemon: FakeDaemon, client: Client) -> None:
    client.add(DeviceConfig(name="a"))
    with connect(daemon) as connection:
        connection.sendall(b'{"v":1,"op":"wait","name":"a"}\n')
        until(lambda: daemon.server.statistics()["operations"] == 1)
    until(lambda: daemon.service.waits_cancelled == 1)
    until(lambda: daemon.server.statistics()["operations"] == 0)


def test_a_client_that_shuts_down_only_its_sending_side_gets_its_answer(
    daemon: FakeDaemon, client: Client
) -> None:
    client.add(DeviceConfig(name="a"))
    with connect(daemon) as connection:
        connection.sendall(b'{"v":1,"op":"wait","name":"a"}\n')
        connection.shutdown(socket.SHUT_WR)
        until(lambda: daemon.server.statistics()["operations"] == 1)
        until_a_disconnect_is_noticed(daemon)
        daemon.service.states["a"] = "live"
        assert json.loads(connection.makefile("rb").readline())["result"]["state"] == "live"


def test_a_wait_returns_when_the_backend_attaches(daemon: FakeDaemon, client: Client) -> None:
    client.add(DeviceConfig(name="a"))
    timer = threading.Timer(0.1, daemon.service.states.__setitem__, ("a", "live"))
    timer.start()
    assert client.wait_live("a", DEADLINE_S).state == "live"
    timer.join()


def test_clients_do_not_wait_for_each_other(daemon: FakeDaemon, client: Client) -> None:
    daemon.service.hold_adds = asyncio.Event()
    with connect(daemon) as connection:
        connection.sendall(b'{"v":1,"op":"add","device":{"name":"a"}}\n')
        until(lambda: daemon.server.statistics()["operations"] == 1)
        assert client.devices() == []
        daemon.loop.call_soon_threadsafe(daemon.service.hold_adds.set)
        until(lambda: daemon.server.statistics()["operations"] == 0)


def test_close_answers_what_is_running_and_leaves_nothing(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon, connect(daemon) as waiter, connect(daemon) as idle:
        Client(tmp_path).add(DeviceConfig(name="a"))
        waiter.sendall(b'{"v":1,"op":"wait","name":"a"}\n')
        until(lambda: daemon.server.statistics()["operations"] == 1)
        daemon.call(daemon.server.close(drain_s=0.1))
        answer = json.loads(waiter.makefile("rb").readline())
        assert answer == {"ok": False, "error": "the daemon is stopping", "status": 1, "code": "stopping"}
        assert idle.recv(1) == b""
        assert list(tmp_path.iterdir()) == []
        assert daemon.server.statistics()["operations"] == 0


def test_a_second_daemon_is_refused_and_the_first_goes_on(daemon: FakeDaemon, client: Client) -> None:
    with pytest.raises(DaemonError, match="another daemon is running here"), running_daemon(daemon.run_dir):
        pass
    assert client.devices() == []


def leave_stale_socket(run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(run_dir / "admin.sock"))


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    leave_stale_socket(tmp_path)
    with running_daemon(tmp_path):
        assert Client(tmp_path).devices() == []


def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match="cannot listen: No such file"), running_daemon(tmp_path / "none"):
        pass


def test_a_client_says_that_no_daemon_runs(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match=r"admin\.sock: no such socket.* ublkpool serve --run-dir"):
        Client(tmp_path).devices()


def test_a_client_says_that_the_socket_is_stale(tmp_path: Path) -> None:
    leave_stale_socket(tmp_path)
    with pytest.raises(DaemonUnreachable, match=r"admin\.sock: a daemon that was killed left this socket"):
        Client(tmp_path).devices()


def test_a_client_says_that_permission_is_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(connection: socket.socket, address: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(DaemonUnreachable, match=r"admin\.sock: permission denied; .* sudo"):
        Client(tmp_path).devices()


def test_a_path_that_is_too_long_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="too long"):
        Client(tmp_path / ("x" * 120)).devices()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "ended before it answered"),
        (b"garbage\n", "makes no sense"),
        (b'{"ok":true,"result":5}\n', "makes no"),
    ],
)
def test_an_invalid_answer_of_the_daemon_is_an_error(tmp_path: Path, answer: bytes, error: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "admin.sock"))
        listener.listen()
        thread = threading.Thread(target=_answer_once, args=(listener, answer))
        thread.start()
        with pytest.raises(DaemonError, match=error):
            Client(tmp_path).devices()
        thread.join()


def _answer_once(listener: socket.socket, answer: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.makefile("rb").readline()
        connection.sendall(answer)
