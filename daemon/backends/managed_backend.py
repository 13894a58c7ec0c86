"""The backend that the daemon runs itself for a device: from its first start to the device's end.

Owns that it runs for as long as the device needs one, and is not started again after that.  The child is
`backend_process.py`'s; it attaches like any other.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from ublkpool.daemon.backends.backend_process import BackendProcess
from ublkpool.daemon.errors import STATUS_USAGE, DaemonError
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.held_names import stderr_name
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.left_behind import Process, is_alive
from ublkpool.daemon.settings.config import BackendConfig

END_PATIENCE_S = 10.0
DEATH_PATIENCE_S = 10.0
"""After KILL, for a process that waits in the kernel."""
_log = logging.getLogger("ublkpool.device")


class ManagedBackend:
    """One device's backend process and its successors."""

    def __init__(
        self,
        device: str,
        config: BackendConfig,
        run_dir: Path,
        holder: Holder,
        live_mounts: int | None,
        background: Background,
    ) -> None:
        """Nothing runs yet: `run`, `start` or `go_on`.

        `live_mounts` is a descriptor of the mount namespace that backends run in, see `processes/mounts.py`.
        """
        self._device = device
        self._background = background
        self._process = BackendProcess(
            device,
            config,
            run_dir,
            lambda fd: holder.hold(stderr_name(device), fd),
            live_mounts,
        )
        self._is_started = False
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """None if none was started."""
        return self._process.child.pid if self._is_started else None

    @property
    def trouble(self) -> str:
        """Why it does not serve; empty if nothing is known."""
        return self._process.trouble if self._is_started else ""

    def serves(self) -> None:
        """It has attached: what kept its predecessors from that is over."""
        if self._is_started:
            self._process.serves()

    def start(self) -> None:
        """Start it, as soon as that can be, and again whenever it ends."""
        try:
            self._begin()
        except OSError:
            self._keeper = self._background.spawn(self._start_and_keep())
        else:
            self._keep()

    async def run(self, live: Callable[[], Awaitable[None]], reason: Callable[[], str]) -> None:
        """Start it, and again whenever it ends once the device was live; return when it is.

        Raises `DaemonError` if it ends before, with the device's `reason` if there is one; `OSError`.
        """
        self._begin()
        ended = asyncio.ensure_future(self._process.child.wait())
        becomes_live = asyncio.ensure_future(live())
        try:
            await asyncio.wait((ended, becomes_live), return_when=asyncio.FIRST_COMPLETED)
            if not becomes_live.done():
                raise self._failed(reason())
            becomes_live.result()
        finally:
            ended.cancel()
            becomes_live.cancel()
        self._keep()

    def go_on(self, left: Process | None, stderr: int | None) -> None:
        """Go on with an earlier daemon's, whose stderr is read from a copy of `stderr`; start one if it has ended."""
        try:
            if left is None or stderr is None or not is_alive(left):
                raise ProcessLookupError
            self._process.adopt(left.pid, os.dup(stderr))
        except ProcessLookupError:
            self.start()
            return
        self._is_started = True
        self._keep()

    def let_end(self) -> None:
        """From now on it is not started again."""
        if self._keeper is not None:
            self._keeper.cancel()

    async def end(self) -> None:
        """Have the process end; it is killed if it does not in time, and left if it does not even die."""
        if self._is_started:
            child = self._process.child
            try:
                await asyncio.wait_for(child.end(END_PATIENCE_S), END_PATIENCE_S + DEATH_PATIENCE_S)
            except TimeoutError:
                # It waits for its own storage, which no signal ends.
                _log.error(
                    "%s: its backend, process %d, was killed and waits in the kernel", self._device, child.pid
                )

    def _begin(self) -> None:
        self._process.start()
        self._is_started = True

    async def _start_and_keep(self) -> None:
        await self._process.start_surely()
        self._is_started = True
        await self._process.keep_running()

    def _keep(self) -> None:
        self._keeper = self._background.spawn(self._process.keep_running())

    def _failed(self, reason: str) -> DaemonError:
        # If the device could not start, its backend ended because of that, not the other way round.
        error = DaemonError(f"{self._device}: {reason or self._process.obituary()}")
        if self._process.child.exit_status == STATUS_USAGE:
            error.status = STATUS_USAGE
        return error
