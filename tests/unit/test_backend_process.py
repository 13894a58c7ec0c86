"""A backend's stderr in the daemon's log, its obituary, and the pauses before it is started again."""

import asyncio
import functools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from support.fakes.standstill import STANDS_MAX_S, watched_loop
from ublkpool.daemon.backends import backend_log, becoming
from ublkpool.daemon.backends.backend_log import LINE_BYTES_MAX, BackendLog
from ublkpool.daemon.backends.backend_process import BackendProcess
from ublkpool.daemon.processes.backoff import STEADY_S, STEADY_SERVING_S, Backoff
from ublkpool.daemon.settings.config import BackendConfig

DEADLINE_S = 60


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in a loop of its own."""

    @functools.wraps(test)
    def plain(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), DEADLINE_S))

    return plain


def record(level: str, message: str, **more: str) -> bytes:
    about = {"time": "2026-01-01T00:00:00.000+00:00", "level": level, "logger": "backend"}
    return json.dumps({**about, "message": message, **more}).encode() + b"\n"


class Voice:
    """A backend's end of the pipe, and the lines that the daemon logs from it."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        reader, self._writer = os.pipe()
        self.log = BackendLog("vol0", reader)
        self._caplog = caplog

    def say(self, words: bytes) -> list[tuple[str, str]]:
        """Levels and messages that these words are logged with."""
        self._caplog.clear()
        os.write(self._writer, words)
        self.log.drain()
        return [(each.levelname, each.getMessage()) for each in self._caplog.records]

    def end(self) -> None:
        os.close(self._writer)
        self.log.drain()


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("ublkpool"), "propagate", True)
    caplog.set_level(logging.DEBUG, backend_log._log.name)
    return caplog


@in_a_loop
async def test_a_record_keeps_its_level_and_gets_the_name_of_its_device_once(
    heard: pytest.LogCaptureFixture,
) -> None:
    voice = Voice(heard)
    assert voice.say(record("info", "serving, 2 queues")) == [("INFO", "vol0: serving, 2 queues")]
    assert voice.say(record("warning", "vol0: slow")) == [("WARNING", "vol0: slow")]
    voice.say(record("error", "broken", traceback="Traceback: x"))
    assert heard.records[0].fields == {"traceback": "Traceback: x"}  # type: ignore[attr-defined]
    voice.end()


@in_a_loop
async def test_a_line_that_is_no_record_is_logged_as_it_is(heard: pytest.LogCaptureFixture) -> None:
    voice = Voice(heard)
    assert voice.say(b"hello\n\n[1]\n") == [("INFO", "vol0: hello"), ("INFO", "vol0: [1]")]
    assert voice.say(b"\xff\n") == [("INFO", "vol0: \ufffd")]
    voice.end()


@in_a_loop
async def test_a_line_is_logged_when_it_is_whole_or_the_last_or_too_long(
    heard: pytest.LogCaptureFixture,
) -> None:
    voice = Voice(heard)
    assert voice.say(b"one, ") == []
    assert voice.say(b"two\nthr") == [("INFO", "vol0: one, two")]
    assert voice.say(b"ee") == []
    heard.clear()
    voice.end()
    assert [each.getMessage() for each in heard.records] == ["vol0: three"]
    endless = Voice(heard)
    reports = [endless.say(b"x" * (LINE_BYTES_MAX // 2)) for _ in range(3)]
    assert [len(each) for each in reports] == [0, 0, 1]
    endless.end()


@pytest.mark.parametrize(
    ("words", "last_error"),
    [
        (record("error", "no space"), "no space"),
        (b"ublkpool: file: path= is missing\n", "file: path= is missing"),
        (record("error", "no space") + record("info", "vol0 is live"), ""),
        (record("info", "vol0 is live"), ""),
        (b"a print\n", ""),
    ],
)
@in_a_loop
async def test_an_end_is_explained_by_an_error_only_if_it_was_the_last_line(
    heard: pytest.LogCaptureFixture, words: bytes, last_error: str
) -> None:
    voice = Voice(heard)
    voice.say(words)
    assert voice.log.last_error == last_error
    voice.end()


@in_a_loop
async def test_a_key_that_is_given_several_times_reaches_the_backend_each_time(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("def open(size: int): pass\ndef get_size(): return 1\ndef pread(buf, offset): pass")
    config = BackendConfig(kind=str(plugin), options={"size": ["1", "2"]})
    process = BackendProcess("vol0", config, tmp_path, lambda fd: None)
    process.start()
    await process.child.wait()
    assert process.obituary().endswith("mine: option size: is given twice; options are: size=NUMBER")


@in_a_loop
async def test_layers_reach_the_backend(tmp_path: Path) -> None:
    config = BackendConfig(kind="null", layers=("readonly", "nosuch:a=1"))
    process = BackendProcess("vol0", config, tmp_path, lambda fd: None)
    process.start()
    assert await process.child.wait() == 2
    assert "no layer is called 'nosuch'; there are cache, fault, log, readonly" in process.obituary()


def interpreter(path: Path, *, alone: bool) -> str:
    """A program that runs this Python; `alone`: without the packages of its environment."""
    flags = "-I -S" if alone else ""
    path.write_text(f'#!/bin/sh\nexport RUN_BY={path.name}\nexec {sys.executable} {flags} "$@"\n')
    path.chmod(0o700)
    return str(path)


@in_a_loop
async def test_another_environment_s_interpreter_runs_the_backend(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("import os\nraise RuntimeError(f'run by {os.environ[\"RUN_BY\"]}')")
    python = interpreter(tmp_path / "theirs", alone=False)
    process = BackendProcess(
        "vol0", BackendConfig(kind=str(plugin), python=python), tmp_path, lambda fd: None
    )
    process.start()
    assert await process.child.wait() == 2
    assert process.obituary().endswith("mine.py:2: RuntimeError: run by theirs")


@in_a_loop
async def test_an_environment_without_ublkpool_is_one_line(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "theirs", alone=True)
    process = BackendProcess("vol0", BackendConfig(kind="null", python=python), tmp_path, lambda fd: None)
    process.start()
    assert await process.child.wait() == 2
    assert "No module named 'ublkpool'" in process.obituary()
    assert process.obituary().endswith("install ublkpool in this environment, too")


@in_a_loop
async def test_a_backend_that_cannot_start_says_why_in_its_obituary(tmp_path: Path) -> None:
    process = BackendProcess("vol0", BackendConfig(kind="nosuch"), tmp_path, lambda fd: None)
    process.start()
    assert await process.child.wait() == 2
    said = "backend nosuch ended: exit status 2: no backend is called 'nosuch'"
    assert process.obituary().startswith(said)


@in_a_loop
async def test_how_a_backend_ended_is_its_trouble_until_the_next_one_serves(tmp_path: Path) -> None:
    process = BackendProcess("vol0", BackendConfig(kind="nosuch"), tmp_path, lambda fd: None)
    process.start()
    assert process.trouble == ""
    keeping = asyncio.ensure_future(process.keep_running())
    while "ended" not in process.trouble:
        await asyncio.sleep(0.01)
    assert process.trouble.startswith("backend nosuch ended: exit status 2: no backend is called 'nosuch'")
    process.serves()
    assert process.trouble == ""
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    await process.child.wait()


@in_a_loop
async def test_the_last_warning_of_a_starting_backend_is_its_trouble(tmp_path: Path) -> None:
    process = BackendProcess("vol0", BackendConfig(kind="nosuch"), tmp_path, lambda fd: None)
    process.start()
    process._words._note(record("warning", "/x: locked by process 9; waiting up to 5 s"))
    assert process.trouble == "backend nosuch: /x: locked by process 9; waiting up to 5 s"
    await process.child.wait()
    assert process.trouble == ""


@in_a_loop
async def test_the_obituary_of_a_killed_backend_names_the_signal(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("import signal\nsignal.pause()")
    process = BackendProcess("vol0", BackendConfig(kind=str(plugin)), tmp_path, lambda fd: None)
    process.start()
    process.child.send(signal.SIGKILL)
    await process.child.wait()
    assert process.obituary() == f"backend {plugin} ended: killed by SIGKILL"


@in_a_loop
async def test_a_backend_whose_directory_hangs_does_not_block_the_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a mount whose server is gone: the child hangs before its exec, the supervisor's loop does not."""
    never, open_end = os.pipe()
    monkeypatch.setattr(becoming, "enter_live_view", lambda *_: os.read(never, 1))
    process = BackendProcess("vol0", BackendConfig(kind="nosuch"), tmp_path, lambda fd: None, never)
    process.start()
    assert process.child.exit_status is None
    assert await process.child.kill() == 128 + signal.SIGKILL
    os.close(never)
    os.close(open_end)


@in_a_loop
async def test_a_backend_whose_directory_is_gone_says_so_in_its_obituary(tmp_path: Path) -> None:
    config = BackendConfig(kind="nosuch", cwd=str(tmp_path / "gone"))
    process = BackendProcess("vol0", config, tmp_path, lambda fd: None)
    process.start()
    assert await process.child.wait() == 1
    assert "cannot start it" in process.obituary() and str(tmp_path / "gone") in process.obituary()


def test_pauses_double_until_a_process_has_lived_steadily() -> None:
    now_s = 0.0
    backoff = Backoff(lambda: now_s, 1.0, 5.0)
    delays = []
    for life_s in (0.0, 0.0, STEADY_S / 2, 0.0, STEADY_S, 0.0):
        backoff.started()
        now_s += life_s
        delays.append(backoff.ended())
    assert delays == [1.0, 2.0, 4.0, 5.0, 1.0, 2.0]


def test_a_process_that_has_served_is_followed_at_once_though_it_lived_for_a_short_time() -> None:
    now_s = 0.0
    backoff = Backoff(lambda: now_s, 1.0, 5.0)
    delays = []
    for start_s, serving_s in ((1.0, 0.0), (1.0, 0.0), (1.0, STEADY_SERVING_S), (1.0, 0.0), (2.0, 0.0)):
        backoff.started()
        now_s += start_s
        backoff.serves()
        now_s += serving_s
        delays.append(backoff.ended())
    # A start that took long, and one that fails after a process that served, count as before.
    backoff.started()
    now_s += STEADY_SERVING_S
    delays.append(backoff.ended())
    assert delays == [1.0, 2.0, 1.0, 2.0, 4.0, 5.0]


@in_a_loop
async def test_a_backend_that_has_attached_ends_the_growing_of_its_pauses(tmp_path: Path) -> None:
    process = BackendProcess("vol0", BackendConfig(kind="nosuch"), tmp_path, lambda fd: None)
    process.start()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process._pauses, "serves", lambda: seen.append("serves"))
        process.serves()
    await process.child.wait()
    assert seen == ["serves"]


@in_a_loop
async def test_a_backend_that_prints_without_end_stops_no_other_device(
    heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_log, "PERIOD_S", 0.5)
    reader, writer = os.pipe()
    talker = await asyncio.create_subprocess_exec("yes", stdout=writer)
    os.close(writer)
    try:
        async with watched_loop() as seen:
            BackendLog("vol0", reader)
            while "are left out here" not in heard.text:
                await asyncio.sleep(0.01)
            logged = len(heard.records)
    finally:
        talker.kill()
        await talker.wait()
    assert seen.longest_s < STANDS_MAX_S
    assert logged <= 2 * backend_log.LINES_MAX + 2


@in_a_loop
async def test_the_last_of_too_many_lines_still_says_why_it_ended(heard: pytest.LogCaptureFixture) -> None:
    voice = Voice(heard)
    voice.say(b"noise\n" * (backend_log.LINES_MAX + 1) + record("error", "no space"))
    assert voice.log.last_error == "no space"
    assert len(heard.records) == backend_log.LINES_MAX


@in_a_loop
async def test_a_line_that_is_nested_too_deeply_is_logged_as_text(heard: pytest.LogCaptureFixture) -> None:
    line = b'{"level":"error","message":"x","a":' + b"[" * 60_000
    assert Voice(heard).say(line + b"\n") == [("INFO", f"vol0: {line.decode()}")]
