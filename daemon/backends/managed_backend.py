"""The backend that the daemon runs itself for a device: from its first start to the device's end.

Owns that it runs for as long as the device needs one, and is not started again after that.  The process is
`backend_process.py`'s; it attaches like any other.  Runs on the supervisor's asyncio loop.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from ublkpool.daemon.backends.backend_process import BackendProcess
from ublkpool.daemon.backends.template_process import BackendTemplate
from ublkpool.daemon.errors import STATUS_USAGE, DaemonError
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.beside import beside
from ublkpool.daemon.processes.held_names import stderr_name
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.left_behind import Process, is_alive
from ublkpool.daemon.settings.config import BackendConfig

END_PATIENCE_S = 10.0
DEATH_PATIENCE_S = 10.0
"""After SIGKILL, for a process that waits in the kernel."""
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
        group: int | None = None,
        template: BackendTemplate | None = None,
    ) -> None:
        """Nothing runs yet: `run`, `start` or `go_on`.

        `live_mounts` is a descriptor of the mount namespace that backends run in, see `processes/mounts.py`; `group`
        that of the daemon's config, by which a backend of another user gets in; `template` what forks it.
        """
        self._device = device
        self._background = background
        self._process = BackendProcess(
            device,
            config,
            run_dir,
            lambda fd: holder.hold(stderr_name(device), fd),
            live_mounts,
            group,
            template,
        )
        self._template = template
        self._supervision: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """None if no process was started."""
        return self._process.child.pid if self._process.is_started else None

    @property
    def trouble(self) -> str:
        """Why it does not serve; empty if no reason is known."""
        return self._process.trouble

    def use(self, config: BackendConfig) -> None:
        """Give it these options from its next start on."""
        self._process.config = config

    def serves(self) -> None:
        """It has attached: how its predecessor ended is no trouble any more."""
        self._process.serves()

    def start(self) -> None:
        """Start it as soon as there is room for a process, and again whenever it ends."""
        if self._template is not None:
            self._supervise(self._start_and_keep())
            return
        try:
            self._process.start()
        except (DaemonError, OSError):
            self._supervise(self._start_and_keep())
        else:
            self._supervise(self._process.keep_running())

    async def run(self, live: Callable[[], Coroutine[Any, Any, None]], reason: Callable[[], str]) -> None:
        """Start it and return when the device is live; from then on it is started again whenever it ends.

        Raises `DaemonError` if it ends before, with the device's `reason` unless that is empty; `OSError`.
        """
        await self._process.prepare()
        self._process.start()
        async with beside(self._process.child.wait()) as ended, beside(live()) as becomes_live:
            await asyncio.wait((ended, becomes_live), return_when=asyncio.FIRST_COMPLETED)
            if not becomes_live.done():
                raise self._failed(reason())
            becomes_live.result()
        self._supervise(self._process.keep_running())

    def go_on(self, left: Process | None, stderr: int | None) -> None:
        """Go on with an earlier daemon's process, whose stderr can be read from `stderr`.

        If that process has ended, another is started.
        """
        try:
            if left is None or stderr is None or not is_alive(left):
                raise ProcessLookupError
            self._process.adopt(left.pid, stderr)
        except ProcessLookupError:
            self.start()
        else:
            self._supervise(self._process.keep_running())
            if self._template is not None:
                # Its successor must not wait for the start of an interpreter.
                self._template.begin()

    def adopt_to_end(self, left: Process | None, stderr: int | None) -> None:
        """Adopt an earlier daemon's process, if it lives, only for `end`; none is started."""
        if left is not None and stderr is not None and is_alive(left):
            with suppress(ProcessLookupError):
                self._process.adopt(left.pid, stderr)

    def let_end(self) -> None:
        """From now on it is not started again."""
        if self._supervision is not None:
            self._supervision.cancel()
        self._process.drop_prepared()

    async def replace(self) -> None:
        """Have a process of today's code take the place of this one, which ends as with `end`."""
        self._process.is_replaced = True
        await self.end()

    async def end(self) -> None:
        """End the process: SIGTERM, then SIGKILL; a process that does not even die of that is left."""
        if self._process.is_started:
            child = self._process.child
            try:
                await asyncio.wait_for(child.end(END_PATIENCE_S), END_PATIENCE_S + DEATH_PATIENCE_S)
            except TimeoutError:
                # It waits for its own storage, which no signal ends.
                _log.error(
                    "%s: its backend, process %d, was killed and waits in the kernel", self._device, child.pid
                )

    def _supervise(self, work: Coroutine[Any, Any, None]) -> None:
        self._supervision = self._background.spawn(work)

    async def _start_and_keep(self) -> None:
        await self._process.prepare()
        await self._process.start_surely()
        await self._process.keep_running()

    def _failed(self, reason: str) -> DaemonError:
        # If the device could not start, its backend ended because of that, not the other way round.
        error = DaemonError(f"{self._device}: {reason or self._process.obituary()}")
        if self._process.child.exit_status == STATUS_USAGE:
            error.status = STATUS_USAGE
        return error
