"""Disposable processes for control commands."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ublkpool.daemon.children import Child
from ublkpool.daemon.control_process import LOOKS_MAX, CallHung, ControlFailed, ControlRunner

_SUPERVISOR = """
import asyncio, signal, sys
from ublkpool.daemon.children import Child
from ublkpool.daemon.control_process import LOOKS_MAX, CallHung, ControlFailed, ControlRunner

def hang():
    fifo = open(sys.argv[1], "w")
    print("hangs", file=fifo, flush=True)
    signal.pause()

asyncio.run(ControlRunner().run("hang", hang, type(None)))
"""


def test_a_control_command_dies_with_the_supervisor_that_started_it(tmp_path: Path) -> None:
    """One that lived on would end the recovery of the next supervisor: `COMMANDS_LIVE_ON` in the simulation."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    supervisor = subprocess.Popen([sys.executable, "-c", _SUPERVISOR, str(path)])
    try:
        with path.open() as fifo:
            assert fifo.readline() == "hangs\n"
            supervisor.send_signal(signal.SIGKILL)
            assert fifo.readline() == "", "its end of the pipe is closed, since it is dead"
    finally:
        supervisor.kill()
        supervisor.wait()


def _children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def test_a_command_that_is_given_up_is_over_when_the_caller_goes_on() -> None:
    async def run() -> None:
        before, begun = _children(), asyncio.Event()
        command = ControlRunner().run_beside("sleep", lambda: time.sleep(600), type(None), 600.0, begun)
        waiting = asyncio.ensure_future(command)
        await begun.wait()
        assert _children() != before
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert _children() == before

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_look_has_its_result_or_the_reason_of_its_failure() -> None:
    async def run() -> None:
        runner = ControlRunner()
        assert await runner.look("vol0", "pid", os.getpid, int) != os.getpid()
        with pytest.raises(ControlFailed, match="No such file") as caught:
            await runner.look("vol0", "open", lambda: os.open("/nonexistent/file", os.O_RDONLY), int)
        assert caught.value.errno == 2

    asyncio.run(run())


def test_looks_that_hang_are_bounded_for_each_owner_and_named_and_nobody_waits_for_them() -> None:
    """A process in D state ignores KILL; here it is one that never hears of it."""

    async def run(monkeypatch: pytest.MonkeyPatch) -> None:
        sent: list[int] = []
        monkeypatch.setattr(Child, "send", lambda child, _: sent.append(child.pid))
        runner = ControlRunner()
        hung = [
            asyncio.ensure_future(runner.look("stuck", "stuck: opening", signal.pause, type(None), 0.2))
            for _ in range(LOOKS_MAX)
        ]
        for each in await asyncio.gather(*hung, return_exceptions=True):
            assert isinstance(each, CallHung) and "stuck: opening has hung" in str(each)
        assert len(sent) == LOOKS_MAX
        try:
            with pytest.raises(ControlFailed, match=f"not tried: {LOOKS_MAX} processes wait") as caught:
                await runner.look("stuck", "stuck: opening", os.getpid, int)
            assert all(str(pid) in str(caught.value) for pid in sent)
            assert await runner.look("other", "other: opening", os.getpid, int)
        finally:
            for pid in sent:
                os.kill(pid, signal.SIGKILL)
        while any(each.exit_status is None for each in runner._looks["stuck"]):
            await asyncio.sleep(0.01)
        assert await runner.look("stuck", "stuck: opening", os.getpid, int), "the dead ones do not count"

    with pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(asyncio.wait_for(run(monkeypatch), 60))
