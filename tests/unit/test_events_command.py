"""`ublkpool events`: over the admin socket or from the file, and on over restarts, with neither loss nor repeat."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.fakes.daemon import FakeDaemon, running_daemon
from ublkpool.daemon.admin import followers
from ublkpool.daemon.admin.client import Client
from ublkpool.daemon.admin.wire import EventsRequest, Told, admin_socket, encode_line
from ublkpool.daemon.cli.commands import INTERRUPTED, cli
from ublkpool.daemon.errors import RemoteError
from ublkpool.daemon.events.event import decode, encode, make_event
from ublkpool.daemon.events.event_file import NAME, Append
from ublkpool.daemon.events.kinds import BackendDied
from ublkpool.daemon.events.tell import LOOKED_AT_MAX, Events

COMMAND = (sys.executable, "-m", "ublkpool.daemon", "events")
DIED = BackendDied(kind="file", pid=7, was_cut_off=False)
DEADLINE_S = 120


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running_daemon(tmp_path) as made:
        yield made


def record(daemon: FakeDaemon, *texts: str, device: str = "vol0") -> None:
    async def tell() -> None:
        for each in texts:
            daemon.service.events.record(DIED, each, device=device)

    daemon.call(tell())


def ask(run_dir: Path, **wanted: Any) -> list[str]:
    return [each.text for each in Client(run_dir).events(**wanted)]


def shown(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["events", *args])
    out, err = capsys.readouterr()
    assert (ended.value.code or 0) == status, err
    return (out if status == 0 else err).splitlines()


@contextmanager
def follower(run_dir: Path, *args: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [
            # Tests that run in the background of a script inherit that SIGINT is ignored.
            *("env", "--default-signal=INT"),
            *COMMAND,
            "--follow",
            "--json",
            "--run-dir",
            str(run_dir),
            "--state-dir",
            str(run_dir / "state"),
            *args,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def next_text(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    return str(json.loads(line)["text"])


def test_the_events_of_the_asked_devices_come_oldest_first(daemon: FakeDaemon) -> None:
    for number in range(200):
        record(daemon, f"event {number}", device=f"vol{number}")
    assert ask(daemon.run_dir) == [f"event {number}" for number in range(200)]
    assert ask(daemon.run_dir, names=["vol7", "vol90", "none"]) == ["event 7", "event 90"]
    assert ask(daemon.run_dir, since="9999") == []


def test_a_device_whose_events_come_after_many_others_is_found(daemon: FakeDaemon) -> None:
    for number in range(LOOKED_AT_MAX + 1):
        record(daemon, "event", device=f"vol{number}")
    record(daemon, "the one", device="last")
    assert ask(daemon.run_dir, names=["last"]) == ["the one"]


def test_what_comes_after_a_number_is_asked_for_with_it(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    record(daemon, "one", "two", "three")
    at = ["--run-dir", str(daemon.run_dir), "--json"]
    first = [json.loads(line) for line in shown(capsys, *at)]
    assert [each["text"] for each in first] == ["one", "two", "three"]
    second = [json.loads(line) for line in shown(capsys, *at, "--after", str(first[1]["seq"]))]
    assert second == first[2:]


def test_people_see_a_line_for_each_event(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    record(daemon, "backend file is gone")
    [line] = shown(capsys, "--run-dir", str(daemon.run_dir), "--since", "1h")
    assert line.endswith("warning vol0         backend-died       backend file is gone")


@pytest.mark.parametrize("since", ["yesterday", "5", "-1h", "10w", "99999999999d", "999999999d"])
def test_a_time_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], since: str) -> None:
    [line] = shown(capsys, "--since", since, status=2)
    assert "expected 30s, 10m, 2h, 7d" in line


def test_without_a_daemon_the_file_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = Events()
    for name in ("vol0", "vol1"):
        events.record(DIED, f"{name} lost its backend", device=name)
    state = tmp_path / "state"
    state.mkdir()
    Append(state, [each.line for each in events.unwritten()], 1 << 20)()
    before = (state / NAME).stat()
    at = ["--run-dir", str(tmp_path), "--state-dir", str(state)]
    [line] = shown(capsys, *at, "vol1")
    assert line.endswith("vol1 lost its backend")
    assert (state / NAME).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("has_directory", [False, True])
def test_without_daemon_and_file_one_line_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has_directory: bool
) -> None:
    state = tmp_path / "state"
    if has_directory:
        state.mkdir()
    [line] = shown(capsys, "--run-dir", str(tmp_path), "--state-dir", str(state), status=1)
    assert "the daemon is not running" in line and f"no events in {state}" in line and "--state-dir" in line


def test_a_follower_goes_on_with_the_next_daemon_without_loss_or_repeat(tmp_path: Path) -> None:
    events, texts = Events(), []
    with follower(tmp_path) as process:
        for life in range(3):
            with running_daemon(tmp_path, events) as daemon:
                record(daemon, f"{life} a", f"{life} b")
                texts += [next_text(process) for _ in range(2 + (life > 0))]
                daemon.call(daemon.server.close())
                # No client can be told before the daemon's end.
                record(daemon, f"{life} c")
            lines = events.after(0, most=100).lines
            events = Events(earlier=[event for line in lines if (event := decode(line.rstrip()))])
    assert texts == ["0 a", "0 b", "0 c", "1 a", "1 b", "1 c", "2 a", "2 b"]


def test_a_follower_outlives_a_daemon_that_is_killed_and_left_no_file(tmp_path: Path) -> None:
    def told_by_a_daemon_that_dies(seq: int) -> None:
        line = encode(make_event(seq, 0.0, "vol0", DIED, f"event {seq}", None)).rstrip()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.settimeout(DEADLINE_S)
            listener.bind(str(path))
            listener.listen()
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(encode_line(Told(msgspec.Raw(line))))
                assert next_text(process) == f"event {seq}"
        path.unlink()

    path = admin_socket(tmp_path)
    with follower(tmp_path) as process:
        for seq in (1, 2, 3):
            told_by_a_daemon_that_dies(seq)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == INTERRUPTED and "Traceback" not in error
        # Once for each daemon that died; of the last one the follower may not know yet.
        assert error.count("waiting for it") in (2, 3) and "no events in" not in error


def test_a_follower_without_daemon_and_file_waits_for_the_daemon(tmp_path: Path) -> None:
    with follower(tmp_path) as process:
        assert process.stderr is not None
        assert "no events in" in process.stderr.readline()
        assert process.stderr.readline().endswith("; waiting for it\n")
        with running_daemon(tmp_path) as daemon:
            record(daemon, "one")
            assert next_text(process) == "one"


def test_ctrl_c_ends_a_follower(daemon: FakeDaemon) -> None:
    record(daemon, "one")
    with follower(daemon.run_dir) as process:
        assert next_text(process) == "one"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == INTERRUPTED and "Traceback" not in error


@pytest.mark.parametrize("is_idle", [True, False], ids=["idle", "busy"])
def test_a_follower_ends_with_its_reader(daemon: FakeDaemon, is_idle: bool) -> None:
    record(daemon, "one")
    with follower(daemon.run_dir) as process:
        assert next_text(process) == "one" and process.stdout is not None
        process.stdout.close()
        if not is_idle:
            record(daemon, "two")
        assert process.wait(DEADLINE_S) == 0
        assert process.stderr is not None and process.stderr.read() == ""


def connected(daemon: FakeDaemon, **wanted: Any) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(str(admin_socket(daemon.run_dir)))
    client.sendall(encode_line(EventsRequest(**wanted)))
    return client


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_follower_that_reads_nothing_is_cut_off_and_bounded(
    daemon: FakeDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    patience_s = daemon.server._followers._patience_s
    daemon.server._followers._patience_s = 0.05
    with connected(daemon, follow=True) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for number in range(4000):
            record(daemon, "x" * 400, device=f"vol{number % 1000}")
        daemon.call(_until(lambda: daemon.server._followers.count == 0))
        daemon.call(_until(lambda: not daemon.server._connections))
    assert len([each for each in caplog.records if "has read no event" in each.getMessage()]) == 1
    # This reader may stand still for longer on a busy machine.
    daemon.server._followers._patience_s = patience_s
    assert len(ask(daemon.run_dir, after=0)) > 100, "the others are served"


def test_a_follower_whose_events_are_gone_is_told_so(daemon: FakeDaemon) -> None:
    async def go() -> None:
        daemon.service.events._history._bytes_max = 2000

    daemon.call(go())
    for number in range(100):
        record(daemon, f"event {number}", device=f"vol{number}")
    said: list[str] = []
    found = list(Client(daemon.run_dir, said.append).events(after=5))
    [line] = said
    assert line.startswith("events between 5 and ") and found[-1].text == "event 99"


def test_too_many_followers_are_refused(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers, "FOLLOWERS_MAX", 1)
    with connected(daemon, follow=True):
        daemon.call(_until(lambda: daemon.server._followers.count == 1))
        with pytest.raises(RemoteError, match="1 clients are told events already"):
            ask(daemon.run_dir)
    daemon.call(_until(lambda: daemon.server._followers.count == 0))
    assert ask(daemon.run_dir) == []


def test_a_follower_does_not_delay_the_daemons_end(daemon: FakeDaemon) -> None:
    ended = threading.Event()

    class HeardError(Exception):
        """Ends the client's wait for the next daemon."""

    def hear(text: str) -> None:
        heard.append(text)
        raise HeardError

    heard: list[str] = []

    def follow() -> None:
        with pytest.raises(HeardError):
            list(Client(daemon.run_dir, on_wait=hear).events(follow=True))
        ended.set()

    thread = threading.Thread(target=follow)
    thread.start()
    daemon.call(_until(lambda: daemon.server._followers.count == 1))
    daemon.call(daemon.server.close(drain_s=DEADLINE_S))
    thread.join(DEADLINE_S)
    assert ended.is_set() and "no such socket" in heard[0], "it was answered, not hung up on"


def test_a_client_that_reads_nothing_does_not_delay_the_daemons_end(
    daemon: FakeDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(daemon, follow=True) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for number in range(1500):
            record(daemon, "x" * 400, device=f"vol{number % 1000}")
        daemon.call(_until(lambda: any(each.transport.get_write_buffer_size() for each in writers(daemon))))
        daemon.call(asyncio.wait_for(daemon.server.close(drain_s=10 * DEADLINE_S), DEADLINE_S))
        assert daemon.server.statistics()["connections"] == 0
    assert "failed unexpectedly" not in caplog.text


def writers(daemon: FakeDaemon) -> set[asyncio.StreamWriter]:
    return daemon.server._followers._writers
