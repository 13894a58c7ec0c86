"""A daemon that kills a worker of its own, or itself, at a named step of a recovery.

A file in the run directory, which the test writes (`arm`), names the next victim; it is used once.
"""

import os
import signal
from collections.abc import Awaitable, Callable
from functools import wraps
from pathlib import Path
from typing import Any

from support.vm.patience import be_patient
from ublkpool.daemon.cli.commands import main
from ublkpool.daemon.device import recovery
from ublkpool.daemon.device.team import Team
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.processes.worker_process import WorkerProcess
from ublkpool.workers import messages

PLAN = "UBLKPOOL_TEST_KILL"
STEPS = ("started", "forked", "fenced", "first ready", "all ready", "ended")
"""After START_USER_RECOVERY, fork, fence, a queue's last fetch, all queues' last fetch, END_USER_RECOVERY."""


def arm(plan: Path, step: str, victim: str) -> None:
    """Kill `victim` (worker, workers or daemon) at this step of the next recovery."""
    plan.write_text(f"{step}:{victim}")


def _due(step: str) -> str:
    plan = Path(os.environ[PLAN])
    if not plan.exists() or plan.read_text().partition(":")[0] != step:
        return ""
    victim = plan.read_text().partition(":")[2]
    plan.unlink()
    return victim


def _strike(step: str, workers: list[WorkerProcess]) -> None:
    victim = _due(step)
    if victim == "daemon":
        os.kill(os.getpid(), signal.SIGKILL)
    for each in workers[: {"worker": 1, "workers": len(workers)}.get(victim, 0)]:
        os.kill(each.child.pid, signal.SIGKILL)
        # The worker is dead before the next step; it is a zombie until the loop reaps it.
        os.waitid(os.P_PID, each.child.pid, os.WEXITED | os.WNOWAIT)


def _after(owner: object, name: str, step: str, workers: Callable[..., list[WorkerProcess]]) -> None:
    whole: Callable[..., Awaitable[Any]] = getattr(owner, name)

    @wraps(whole)
    async def struck(*arguments: Any) -> Any:
        result = await whole(*arguments)
        _strike(step, workers(*arguments))
        return result

    setattr(owner, name, struck)


_TEAMS: list[Team] = []
_fork = Team.fork
_on_message = WorkerProcess._on_message


async def _remembered_fork(team: Team) -> None:
    _TEAMS[:] = [team]
    await _fork(team)
    _strike("forked", team.workers)


def _heard(worker: WorkerProcess, message: messages.FromWorker) -> None:
    _on_message(worker, message)
    if isinstance(message, messages.Fetched):
        _strike("first ready", [worker])


if __name__ == "__main__":
    be_patient()
    setattr(Team, "fork", _remembered_fork)  # noqa: B010
    setattr(WorkerProcess, "_on_message", _heard)  # noqa: B010
    _after(BlockDevice, "start_recovery", "started", lambda *_: [])
    _after(recovery, "_fence", "fenced", lambda team, _: team.workers)
    _after(Team, "ready", "all ready", lambda team: team.workers)
    _after(BlockDevice, "end_recovery", "ended", lambda *_: _TEAMS[0].workers)
    main()
