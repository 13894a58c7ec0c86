"""Backends that the daemon runs itself: start, listen to what they say, start again when they die.

Owns the child and its stderr.  The child is an ordinary `ublkpool backend`: it attaches like any other.
"""

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ublkpool.daemon.children import Child, describe_exit
from ublkpool.daemon.config import BackendConfig

RESTART_MIN_S = 0.1
RESTART_MAX_S = 5.0
_STEADY_S = 10.0
_log = logging.getLogger("ublkpool.backend")


class BackendProcess:
    """One device's backend child."""

    def __init__(
        self, device: str, config: BackendConfig, run_dir: Path, hold: Callable[[int], None]
    ) -> None:
        """Nothing runs yet: `start` or `adopt`.  `hold` is told the descriptor behind which its stderr is read."""
        self._device = device
        self._config = config
        self._run_dir = run_dir
        self._hold = hold
        self._loop = asyncio.get_running_loop()
        self.last_words = ""

    def start(self) -> None:
        """Start it.  Raises `OSError`."""
        self.child = self._start()

    def adopt(self, pid: int, stderr: int) -> None:
        """Go on with an earlier daemon's; `stderr` is ours now.  Raises `ProcessLookupError` if it has ended."""
        self.child = Child(pid, self._title)
        self._listen(stderr)

    @property
    def _title(self) -> str:
        return f"backend {self._config.kind} of {self._device}"

    def _start(self) -> Child:
        reader, writer = os.pipe()
        options = [f"{key}={value}" for key, value in self._config.options.items()]
        command = [
            *(sys.executable, "-m", "ublkpool.daemon", "backend", self._config.kind),
            *("--device", self._device, "--run-dir", str(self._run_dir), "--", *options),
        ]
        try:
            process = subprocess.Popen(
                command,
                cwd=self._config.cwd,
                stdin=subprocess.DEVNULL,
                stderr=writer,
                # A terminal's Ctrl-C is the daemon's to handle: it ends its backends last.
                process_group=0,
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        # `Child` reaps; Popen must not think that it should.
        process.returncode = 0
        self._listen(reader)
        return Child(process.pid, self._title)

    def _listen(self, reader: int) -> None:
        os.set_blocking(reader, False)
        self._stderr: int | None = reader
        self._hold(reader)
        self._loop.add_reader(reader, self._hear, reader)

    def obituary(self) -> str:
        """How it ended, in its own last words if it had any."""
        if self._stderr is not None:
            self._hear(self._stderr)
        how = describe_exit(self.child.exit_status or 0)
        words = self.last_words.removeprefix("ublkpool: ")
        return f"backend {self._config.kind}: {words or how}"

    async def keep_running(self) -> None:
        """Start it again whenever it ends, less and less often while it does not last; until cancelled."""
        delay_s = RESTART_MIN_S
        while True:
            started_s = self._loop.time()
            await self.child.wait()
            if self._loop.time() - started_s > _STEADY_S:
                delay_s = RESTART_MIN_S
            _log.warning("%s: %s; starting it again in %.1f s", self._device, self.obituary(), delay_s)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RESTART_MAX_S)
            self.child = self._start()

    def _hear(self, reader: int) -> None:
        try:
            text = os.read(reader, 65536)
        except BlockingIOError:
            return
        if not text:
            self._loop.remove_reader(reader)
            os.close(reader)
            if self._stderr == reader:
                self._stderr = None
            return
        for line in text.decode(errors="replace").splitlines():
            self.last_words = line.strip() or self.last_words
            _log.info("%s: %s", self._device, line)
