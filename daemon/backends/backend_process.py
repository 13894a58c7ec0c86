"""A backend that the daemon runs itself: its process and its stderr.

Owns the child, an ordinary `ublkpool backend`: it attaches like any other.  It is a copy of the daemon's template
(`template_process.py`), or a new program where there is none or another interpreter runs it.
"""

import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ublkpool.daemon.backends.backend_log import BackendLog
from ublkpool.daemon.backends.backend_user import check_can_run
from ublkpool.daemon.backends.becoming import (
    Task,
    be_a_program,
    cannot,
    program,
    take_default_signals,
    take_place,
)
from ublkpool.daemon.backends.template_process import BackendTemplate, Forked
from ublkpool.daemon.errors import DaemonError, one_line, without_name
from ublkpool.daemon.processes.children import Child, describe_exit
from ublkpool.daemon.processes.reserve import with_room_for_one
from ublkpool.daemon.processes.supervised import SupervisedProcess
from ublkpool.daemon.settings.config import BackendConfig
from ublkpool.workers.process import fork_child

RESTART_MIN_S = 0.1
RESTART_MAX_S = 5.0
_log = logging.getLogger("ublkpool.backend")


class BackendProcess(SupervisedProcess):
    """One device's backend process."""

    def __init__(
        self,
        device: str,
        config: BackendConfig,
        run_dir: Path,
        hold: Callable[[int], None],
        live_mounts: int | None = None,
        group: int | None = None,
        template: BackendTemplate | None = None,
    ) -> None:
        """Nothing runs yet: `start` or `adopt`.  `hold` is called with the descriptor from which its stderr is read.

        `live_mounts`: the mount namespace that it runs in (`daemon/processes/mounts.py`); None for the daemon's.
        `group`: that of the daemon's config, by which a backend of another user gets in.  `template`: what forks a
        backend for the interpreter of the daemon's own (`prepare`).
        """
        super().__init__(f"{device}: backend {config.kind}", _log, RESTART_MIN_S, RESTART_MAX_S)
        self._device = device
        self.config = config
        self._run_dir = run_dir
        self._hold = hold
        self._live_mounts = live_mounts
        self._group = group
        self._template = template
        self._forked: Forked | None = None
        """What `prepare` found."""
        self._last_end = ""
        self._no_start = ""
        """Why the last try to start it failed."""

    def start(self) -> None:
        """See `SupervisedProcess`."""
        try:
            super().start()
        except (OSError, DaemonError) as error:
            self._no_start = without_name(self._device, one_line(error))
            raise
        self._no_start = ""

    def adopt(self, pid: int, stderr: int) -> None:
        """Go on with an earlier daemon's process, whose stderr is read from a duplicate of `stderr`.

        Raises `ProcessLookupError` if the process has ended, `OSError`.
        """
        self._adopt(pid)
        self._listen(os.dup(stderr))

    def _start(self) -> None:
        check_can_run(self._device, self.config, self._group)
        reader, writer = os.pipe()
        try:
            child = self._begin(writer)
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        try:
            self._listen(reader)
        except OSError:
            child.send(signal.SIGKILL)
            os.close(reader)
            raise
        self.child = child

    async def prepare(self) -> None:
        """Have the next start find a process that waits for its task, if the template has one."""
        if self._template is not None and self.config.python is None:
            self.drop_prepared()
            self._forked = await self._template.fork()

    def drop_prepared(self) -> None:
        """There will be no next start."""
        forked, self._forked = self._forked, None
        if forked is not None:
            forked.close()

    def _begin(self, stderr: int) -> Child:
        """The process, which becomes the backend: one that was prepared, or else one by exec."""
        options = [f"{key}={value}" for key, given in self.config.options.items() for value in _values(given)]
        arguments = [
            *("backend", self.config.kind, "--log-format", "json"),
            *(word for each in self.config.layers for word in ("--layer", each)),
            *("--device", self._device, "--run-dir", str(self._run_dir), "--", *options),
        ]
        task = Task(arguments, self.config, self._group)
        forked, self._forked = self._forked, None
        if forked is not None and self.config.python is None:
            # It may have died meanwhile, or the task may be too long for a packet.
            with suppress(OSError):
                forked.begin(task, stderr)
                return forked.child
        elif forked is not None:
            forked.close()
        return self._exec(task, stderr)

    def _exec(self, task: Task, stderr: int) -> Child:
        keep = [stderr] if self._live_mounts is None else [stderr, self._live_mounts]
        # subprocess would wait for the child's exec, and the child may hang in a directory on a dead mount.
        fork = with_room_for_one(
            lambda: fork_child(lambda: self._become(task, stderr), keep, "ublkpool-start")
        )
        return Child(fork())

    def _become(self, task: Task, stderr: int) -> int:
        """Runs in the forked child: become the backend by exec; 1 if that fails."""
        command = [*program(self.config.python), *task.arguments]
        try:
            take_default_signals()
            be_a_program(stderr)
            os.execve(command[0], command, take_place(task, self._live_mounts))
        except (LookupError, OSError, ValueError) as error:
            return cannot(error)

    def _listen(self, reader: int) -> None:
        self._hold(reader)
        self._words = BackendLog(self._device, reader)

    def obituary(self) -> str:
        """How it ended, and the error that it logged last, if nothing followed that."""
        self._words.drain()
        how = describe_exit(self.child.exit_status or 0)
        why = f": {self._words.last_error}" if self._words.last_error else ""
        return f"backend {self.config.kind} ended: {how}{why}"

    @property
    def trouble(self) -> str:
        """Why it does not serve: what keeps it from starting, the last warning of the running process, or else how the
        one before it ended; empty if no reason is known.
        """
        if self._no_start:
            return f"backend {self.config.kind} cannot be started: {self._no_start}"
        if not self.is_started:
            return ""
        warning = self._words.last_warning
        return f"backend {self.config.kind}: {warning}" if warning and not self._is_over else self._last_end

    @property
    def _is_over(self) -> bool:
        return self.child.exit_status is not None

    def serves(self) -> None:
        """It has attached: how its predecessor ended is no trouble any more."""
        self._last_end = ""
        self._pauses.serves()

    async def _clear_away(self, pause_s: float) -> None:
        self._last_end = self.obituary()
        # Status 0: it was told to end.
        level = logging.WARNING if self.child.exit_status and not self.is_replaced else logging.INFO
        _log.log(level, "%s: %s; starting it again in %.1f s", self._device, self._last_end, pause_s)


def _values(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given
