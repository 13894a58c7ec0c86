"""A run on a disk whose server dies ends with one line, and does not wait for ever."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import watched
from bench.accounts import Books, Cpu, has_ended
from bench.cells import CELLS, FioError
from bench.stage import Disk, StageError
from bench.watched import check_served, end, run_fio, write_end

from support.vm.daemon import eventually


@pytest.fixture
def server() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.fixture
def disk(server: "subprocess.Popen[bytes]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A disk of which only the server's processes exist; a run on it never ends."""
    log = tmp_path / "log"
    log.write_text("all is well\nout of memory\n")
    monkeypatch.setattr(watched, "queue_cpus", lambda node: [[0]])
    monkeypatch.setattr(watched, "requests_done", lambda node: 0)
    monkeypatch.setattr(watched, "END_PATIENCE_S", 60.0)
    monkeypatch.setattr(watched, "fio_command", lambda *_: ["sleep", "600"])
    return Disk("/dev/nothing", {"kernel": [0], "backend": [server.pid]}, log=log)


def test_a_running_or_stopped_server_is_no_failure(server: "subprocess.Popen[bytes]", disk: Disk) -> None:
    check_served(disk)
    server.send_signal(signal.SIGSTOP)
    check_served(disk)


def test_a_death_before_the_first_request_is_reported_with_the_last_words(
    server: "subprocess.Popen[bytes]", disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill_and_count(_node: str) -> int:
        server.kill()
        return 0

    monkeypatch.setattr(watched, "requests_done", kill_and_count)
    with pytest.raises(StageError, match=r"its backend \(process \d+\) has died: all is well out of memory"):
        run_fio(disk, CELLS[0], 0.2)


def test_a_death_while_fio_runs_is_reported(
    server: "subprocess.Popen[bytes]", disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = iter(range(100))
    monkeypatch.setattr(watched, "requests_done", lambda node: next(done))

    def books(node: str, parts: object, threads: object) -> Books:
        server.kill()
        return Books(Cpu(0.0, 0.0), {}, 0)

    monkeypatch.setattr(watched, "take_books", books)
    with pytest.raises(StageError, match="its backend"):
        run_fio(disk, CELLS[0], 0.2)


def test_a_death_while_fios_output_is_read_is_reported(
    server: "subprocess.Popen[bytes]", disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, look = iter(range(100)), os.pidfd_open
    monkeypatch.setattr(watched, "requests_done", lambda node: next(done))
    monkeypatch.setattr(watched, "take_books", lambda node, parts, threads: Books(Cpu(0.0, 0.0), {}, 0))

    def look_and_kill(pid: int) -> int:
        descriptor = look(pid)
        server.kill()
        return descriptor

    monkeypatch.setattr(os, "pidfd_open", look_and_kill)
    with pytest.raises(StageError, match="its backend"):
        run_fio(disk, CELLS[0], 0.2)


def test_a_runs_output_is_read_to_its_end(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    # More than a pipe holds; the end must be read.
    failed = '{"jobs": [{"error": 5, "read": {}, "write": {}}]}'
    script = f"print('x' * 200_000 + {failed!r}); exit(3)"
    monkeypatch.setattr(watched, "fio_command", lambda *_: [sys.executable, "-c", script])
    done = iter(range(100))
    monkeypatch.setattr(watched, "requests_done", lambda node: next(done))
    monkeypatch.setattr(watched, "take_books", lambda node, parts, threads: Books(Cpu(0.0, 0.0), {}, 0))
    with pytest.raises(FioError, match=r"ended with 3, errors \[5\]: x+$"):
        run_fio(disk, CELLS[0], 0.2)


def test_nothing_is_started_on_a_disk_whose_server_is_dead(
    server: "subprocess.Popen[bytes]", disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.kill()
    monkeypatch.setattr(watched, "fio_command", lambda *_: pytest.fail("it was"))
    eventually(lambda: has_ended(server.pid), "it is dead")
    with pytest.raises(StageError, match="its backend"):
        run_fio(disk, CELLS[0], 0.2)


def test_a_last_block_that_cannot_be_written_is_one_line(disk: Disk, tmp_path: Path) -> None:
    nowhere = Disk(str(tmp_path / "no" / "disk"), disk.parts)
    with pytest.raises(StageError, match=r"the last block of .*/no/disk cannot be written: .*No such file"):
        write_end(nowhere)


class Stuck(subprocess.Popen[str]):
    """A process that no signal ends, like one that waits for an unanswered request."""

    def __init__(self) -> None:
        """Starts no process."""
        self.killed = 0
        self.stdout = None

    def kill(self) -> None:
        self.killed += 1

    def wait(self, timeout: float | None = None) -> int:
        assert timeout is not None, "the wait has a limit"
        raise subprocess.TimeoutExpired("fio", timeout)


def test_a_process_that_no_signal_ends_is_not_waited_for() -> None:
    stuck = Stuck()
    end(stuck)
    assert stuck.killed == 1
