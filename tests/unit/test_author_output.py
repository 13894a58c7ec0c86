"""What a backend's author logs and prints: with its level, at once, in a pipe and in the daemon's log."""

import asyncio
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from ublkpool.daemon.backends import backend_log
from ublkpool.daemon.backends.backend_log import BackendLog
from ublkpool.daemon.backends.backend_process import BackendProcess
from ublkpool.daemon.printed import _Printed
from ublkpool.daemon.settings.config import BackendConfig

DEADLINE_S = 60
PLUGIN = """
import logging, signal, sys, threading, warnings
log = logging.getLogger("mystore.cache")
print("printed")
log.info("informed")
log.warning("warned")
log.debug("too much")
logging.error("on the root logger")
warnings.warn("an odd option")
print("no end yet", end="", flush=True)
print("é to stderr", file=sys.stderr)
signal.pause()
"""
SPOKEN = [
    ("info", "printed"),
    ("info", "informed"),
    ("warning", "warned"),
    ("error", "on the root logger"),
    ("info", "no end yet"),
    ("info", "é to stderr"),
]


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return path


def command(plugin: Path, *more: str) -> list[str]:
    run_dir = str(plugin.parent / "run")
    return [
        *(sys.executable, "-m", "ublkpool.daemon", "backend", str(plugin), "--device", "vol0"),
        *("--run-dir", run_dir, *more),
    ]


def lines_until(pipe: IO[bytes], last: str) -> Iterator[str]:
    """The lines of a living process up to the one that contains `last`."""
    for line in pipe:
        yield line.decode()
        if last in line.decode():
            return


def test_json_lines_have_the_level_of_the_author_s_own_loggers_and_of_prints(plugin: Path) -> None:
    with subprocess.Popen(
        command(plugin, "--log-format", "json"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        lines = list(lines_until(process.stdout, "to stderr"))
        process.kill()
    records = [json.loads(each) for each in lines if each.startswith("{")]
    heard = [(each["level"], each["message"]) for each in records]
    assert [each for each in heard if "odd option" not in each[1]] == SPOKEN[:-1]
    assert any(level == "warning" and "an odd option" in message for level, message in heard)
    assert records[1]["logger"] == "mystore.cache"


def test_what_is_printed_into_a_pipe_of_its_own_stays_as_it_is_and_comes_at_once(plugin: Path) -> None:
    plugin.write_text("import signal\nprint('first')\nprint('second')\nsignal.pause()\n")
    with subprocess.Popen(command(plugin), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert list(lines_until(process.stdout, "second")) == ["first\n", "second\n"]
        process.kill()


@pytest.mark.parametrize(("level", "shown"), [("debug", True), ("error", False)])
def test_the_level_of_the_log_holds_for_the_author_s_loggers(plugin: Path, level: str, shown: bool) -> None:
    plugin.write_text("import logging\nlogging.getLogger('mine').debug('detail')\nraise OSError('end')")
    ended = subprocess.run(command(plugin, "--log-level", level), capture_output=True, text=True)
    assert ("detail" in ended.stderr) is shown
    assert f"ublkpool: {plugin}:3: OSError: end" in ended.stderr


def test_the_daemon_s_log_has_them_with_their_level_while_the_backend_runs(
    plugin: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ublkpool"), "propagate", True)
    caplog.set_level(logging.DEBUG, backend_log._log.name)

    async def hear() -> None:
        process = BackendProcess("vol0", BackendConfig(kind=str(plugin)), plugin.parent, lambda fd: None)
        process.start()
        while "to stderr" not in caplog.text:
            await asyncio.sleep(0.01)
        process.child.send(signal.SIGKILL)
        await process.child.wait()
        process.obituary()

    asyncio.run(asyncio.wait_for(hear(), DEADLINE_S))
    heard = [(each.levelname.lower(), each.getMessage()) for each in caplog.records]
    spoken = [(level, f"vol0: {message}") for level, message in SPOKEN]
    assert [each for each in heard if each in spoken] == spoken


@pytest.mark.parametrize(("words", "logged"), [(b"half", ["vol0: half"]), (b'{"level":"info","mess', [])])
def test_a_line_without_its_end_is_logged_unless_it_is_half_a_record(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, words: bytes, logged: list[str]
) -> None:
    monkeypatch.setattr(logging.getLogger("ublkpool"), "propagate", True)
    monkeypatch.setattr(backend_log, "PARTIAL_S", 0.01)
    caplog.set_level(logging.DEBUG, backend_log._log.name)

    async def hear() -> None:
        reader, writer = os.pipe()
        log = BackendLog("vol0", reader)
        timers: list[float] = []
        loop = asyncio.get_running_loop()
        later = loop.call_later

        def noted(delay_s: float, *more: Any) -> asyncio.TimerHandle:
            timers.append(delay_s)
            return later(delay_s, *more)

        monkeypatch.setattr(loop, "call_later", noted)
        os.write(writer, words)
        log.drain()
        while logged and not caplog.records:
            await asyncio.sleep(0.001)
        assert (backend_log.PARTIAL_S in timers) is bool(logged)
        assert [each.getMessage() for each in caplog.records] == logged
        os.close(writer)
        log.drain()

    asyncio.run(asyncio.wait_for(hear(), DEADLINE_S))
    assert len(caplog.records) == 1, "once only"


def test_a_printed_storm_is_lines_of_a_bounded_length(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    printed = _Printed()
    print("x" * 100_000, file=printed)
    print("a\nb\n\nc", file=printed)
    printed.buffer.write(b"\xff\n")
    printed.buffer.flush()
    print("rest", end="", file=printed)
    printed.flush()
    printed.flush()
    messages = [each.getMessage() for each in caplog.records]
    assert (
        sum(map(len, messages[:-5])) == 100_000
        and max(map(len, messages)) <= 16384
        and messages[-5:] == ["a", "b", "c", "\ufffd", "rest"]
    )
    with pytest.raises(io.UnsupportedOperation):
        printed.seek(0)
