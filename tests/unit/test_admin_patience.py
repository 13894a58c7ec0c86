"""A client's messages and time limits for a daemon that does not answer or whose socket is gone."""

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.fakes.daemon import running_daemon
from ublkpool.daemon.admin import client as admin_client
from ublkpool.daemon.admin import patience as admin_patience
from ublkpool.daemon.admin.client import Client
from ublkpool.daemon.errors import DaemonSilent, DaemonUnreachable

LOOK_S = 0.05
SILENT = (
    "import socket, sys, time; listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1]);"
    "listener.listen(8); print(flush=True); time.sleep(600)"
)


@pytest.fixture
def silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A process that accepts connections and sends nothing."""
    monkeypatch.setattr(admin_patience, "STOPPED_NOTICE_S", LOOK_S)
    # Time passes by one look at each reading: a machine that is late must not skip the notice before the time limit.
    readings = itertools.count()
    monkeypatch.setattr(admin_patience, "time", SimpleNamespace(monotonic=lambda: LOOK_S * next(readings)))
    monkeypatch.setattr(admin_patience, "SILENT_NOTICE_S", 2 * LOOK_S)
    monkeypatch.setattr(admin_client, "QUERY_TIMEOUT_S", 0.3)
    command = [sys.executable, "-c", SILENT, str(tmp_path / "admin.sock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def stop(pid: int) -> None:
    """Stop a child; returns when it is stopped, which is later than kill(2)."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def test_the_client_reports_a_stopped_daemon_soon_and_then_gives_up(silent: int, tmp_path: Path) -> None:
    stop(silent)
    said: list[str] = []
    client = Client(tmp_path, on_wait=said.append)
    for ask in (client.devices, client.stats):
        with pytest.raises(DaemonUnreachable) as caught:
            ask()
        assert f"the daemon, process {silent}, did not answer within 0.3 s" in str(caught.value)
        assert f"is stopped (SIGSTOP): let it go on with kill -CONT {silent}" in str(caught.value)
    notice = (
        f"the daemon, process {silent}, is stopped (SIGSTOP): let it go on with kill -CONT {silent}; waiting"
    )
    assert said == [notice] * 2


def test_the_client_reports_a_running_daemon_that_does_not_answer(silent: int, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(DaemonUnreachable, match=r"did not answer within 0\.3 s; it may be hung"):
        Client(tmp_path, on_wait=said.append).devices()
    assert said == [f"the daemon, process {silent}, has not answered yet; waiting up to 0.3 s"]


def test_a_change_waits_for_a_stopped_daemon_and_says_so(silent: int, tmp_path: Path) -> None:
    stop(silent)

    class HeardError(Exception):
        """Ends the client's wait once it has printed the expected text."""

    def hear(text: str) -> None:
        raise HeardError(text)

    with pytest.raises(HeardError, match=f"kill -CONT {silent}; waiting"):
        Client(tmp_path, on_wait=hear).delete(["vol0"])


def test_a_daemon_whose_run_directory_was_emptied_is_found_by_its_listening_socket(tmp_path: Path) -> None:
    with running_daemon(tmp_path):
        (tmp_path / "admin.sock").unlink()
        with pytest.raises(DaemonUnreachable) as caught:
            Client(tmp_path).devices()
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/admin.sock: gone, but a daemon (process {os.getpid()}) listens there")
    assert f"kill {os.getpid()}, then start the daemon again" in said


def test_without_a_daemon_the_error_does_not_claim_one(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other.sock"))
        other.listen()
        with pytest.raises(DaemonUnreachable, match="the daemon is not running"):
            Client(tmp_path).devices()


def test_a_prompt_answer_is_missed_after_the_callers_time_and_a_change_after_none(
    silent: int, tmp_path: Path
) -> None:
    client = Client(tmp_path)
    with pytest.raises(DaemonSilent, match=r"did not answer within 0\.2 s; it may be hung"):
        client.stats(timeout_s=0.2)
    with pytest.raises(DaemonSilent, match=r"did not answer within 0\.2 s$"):
        client.delete("vol0", timeout_s=0.2)
    with pytest.raises(DaemonSilent, match=r"did not answer within 0\.4 s$"):
        client.drain("vol0", timeout_s=0.1)
