"""A copy of the daemon's template keeps every promise of a backend, over rings and ZeroMQ, and so do its successors."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from ublkpool.bufpool.packets import receive_packet, send_packet
from ublkpool.daemon.backends.becoming import FORK, PACKET_BYTES_MAX, READY, Task
from ublkpool.daemon.check import host
from ublkpool.daemon.check.process import BackendProcess
from ublkpool.daemon.settings.config import BackendConfig
from ublkpool.testing import Report

DISK_BYTES = 8 << 20


class Template:
    """A template whose children are this process's."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [
                sys.executable,
                "-m",
                "ublkpool.daemon.backend_template",
                str(theirs.fileno()),
                "." * 999,
            ]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        assert receive_packet(self._sock, PACKET_BYTES_MAX)[0] == READY
        self.forked = 0

    def fork(self, words: list[str], stderr: int) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                send_packet(self._sock, FORK, theirs.fileno())
            pid = int(receive_packet(self._sock, PACKET_BYTES_MAX)[0])
            task = Task(words, BackendConfig(kind=words[1]), None)
            send_packet(ours, msgspec.json.encode(task), stderr)
        self.forked += 1
        return pid

    def end(self) -> None:
        self._sock.close()
        assert self.process.wait() == 0


class Copy(BackendProcess):
    """A backend of the check that is a copy of the template."""

    template: Template

    def __init__(self, line: list[str], log: Path) -> None:
        self._log = log
        with log.open("ab") as stderr:
            self._from = stderr.tell()
            self._pid = self.template.fork(line[3:], stderr.fileno())
        self._status: int | None = None

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def status(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def terminate(self) -> None:
        os.kill(self._pid, signal.SIGTERM)

    def end(self) -> None:
        if self.status is None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> Iterator[Template]:
    made = Template()
    monkeypatch.setattr(Copy, "template", made, raising=False)
    monkeypatch.setattr(host, "BackendProcess", Copy)
    yield made
    made.end()


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_copies_keep_every_promise(
    template: Template, check_backend: Callable[..., Report], kind: str, tmp_path: Path
) -> None:
    store = tmp_path / "disk.img"
    store.write_bytes(bytes(DISK_BYTES))
    options = {"path": str(store)} if kind == "file" else {"size": str(DISK_BYTES)}
    report = check_backend(kind, options, seconds=1, deadline_s=60)
    assert report.counts["kill"] >= 2 and report.counts["fence"] >= 1 and report.counts["stop"] >= 2
    assert template.forked > 4
