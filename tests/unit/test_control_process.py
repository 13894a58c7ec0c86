"""Disposable processes for control commands."""

import os
import signal
import subprocess
import sys
from pathlib import Path

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
