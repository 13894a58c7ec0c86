"""In systemd's journal a line has a priority and no time; elsewhere nothing changes."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from ublkpool.daemon import journal, logs
from ublkpool.workers.process import fork_child


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TextIO]:
    """A file that JOURNAL_STREAM names, as systemd names the socket that leads to the journal."""
    with (tmp_path / "journal").open("w+") as file:
        name_journal(monkeypatch, file)
        yield file


def name_journal(monkeypatch: pytest.MonkeyPatch, file: TextIO, inode: int | None = None) -> None:
    status = os.fstat(file.fileno())
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino if inode is None else inode}")


def said(stream: TextIO) -> list[str]:
    stream.flush()
    stream.seek(0)
    return stream.read().splitlines()


@pytest.mark.parametrize(
    ("level", "priority"), [("debug", 7), ("info", 6), ("warning", 4), ("error", 3), ("critical", 2)]
)
def test_each_level_has_its_syslog_priority_and_no_time(stream: TextIO, level: str, priority: int) -> None:
    logs.configure("debug", "auto", stream)
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger("ublkpool.test").log(number, "vol0: live", extra={"fields": {"path": "/dev/ublkb0"}})
    assert said(stream) == [f"<{priority}>test: vol0: live path=/dev/ublkb0"]


def test_every_line_of_a_traceback_has_the_priority(stream: TextIO) -> None:
    logs.configure("info", "auto", stream)
    logging.getLogger("ublkpool.test").error("it broke", exc_info=ValueError("two\nlines"))
    lines = said(stream)
    assert len(lines) >= 3
    assert all(line.startswith("<3>") for line in lines)


def test_a_message_of_several_lines_has_the_priority_on_each(stream: TextIO) -> None:
    logs.configure("info", "auto", stream)
    logging.getLogger("ublkpool.test").warning("one\ntwo")
    assert said(stream) == ["<4>test: one", "<4>two"]


def test_the_machine_formats_lose_their_time_there_too(stream: TextIO) -> None:
    logs.configure("info", "json", stream)
    logging.getLogger("ublkpool.test").warning("one\ntwo")
    (line,) = said(stream)
    assert line.startswith("<4>")
    assert json.loads(line.removeprefix("<4>")) == {"logger": "test", "message": "one\ntwo"}


@pytest.mark.parametrize("value", ["", "nonsense", "1:2:3", "8:99999999999"])
def test_another_stream_than_the_journal_s_keeps_time_and_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    # A managed backend inherits the variable, and its stderr is a pipe.
    monkeypatch.setenv("JOURNAL_STREAM", value)
    with (tmp_path / "log").open("w+") as file:
        logs.configure("info", "auto", file)
        logging.getLogger("ublkpool.test").warning("x")
        (line,) = said(file)
    assert line.startswith("time=")
    assert "level=warning" in line


def test_asyncios_report_of_a_failed_task_goes_to_the_same_log(stream: TextIO) -> None:
    logs.configure("info", "auto", stream)

    async def forget() -> None:
        asyncio.get_running_loop().call_exception_handler({"message": "never retrieved"})

    asyncio.run(forget())
    assert said(stream) == ["<3>asyncio: never retrieved"]


def test_a_childs_failure_is_logged_with_its_priority(stream: TextIO) -> None:
    logs.configure("info", "auto", stream)

    def broken() -> int:
        raise ValueError("broken")

    pid = fork_child(broken, [stream.fileno()], "ublkpool-test")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) != 0
    lines = said(stream)
    assert lines[0] == "<2>worker: process ublkpool-test ended by an error of its own"
    assert lines[-1] == "<2>ValueError: broken"
    assert all(line.startswith("<2>") for line in lines)


@pytest.mark.parametrize("debug", [False, True])
def test_a_command_s_complaint_is_an_error_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    if debug:
        monkeypatch.setenv("UBLKPOOL_DEBUG", "1")
    with (tmp_path / "journal").open("w+") as file:
        name_journal(monkeypatch, file)
        command = [sys.executable, "-m", "ublkpool.daemon", "list", "--run-dir", str(tmp_path / "none")]
        assert subprocess.run(command, stderr=file).returncode == 1
        lines = said(file)
    assert lines[-1].startswith("<3>ublkpool: ")
    assert all(line.startswith("<3>") for line in lines)
    assert (len(lines) > 1) is debug


def test_priorities_between_two_levels_are_the_lower_one_s() -> None:
    assert [journal.priority_of(level) for level in (5, 15, 25, 35, 45, 60)] == [7, 7, 6, 4, 3, 2]
