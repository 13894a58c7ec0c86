"""Disposable processes for control commands."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ublkpool.daemon.control_process import ControlRunner

_SUPERVISOR = """
import asyncio, signal, sys
from ublkpool.daemon.control_process import ControlRunner

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
