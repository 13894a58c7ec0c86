"""Longer deadlines for a daemon under test.

At the real ones the daemon ends or replaces a process that does not answer.  In a guest on a busy machine a healthy
process may be that slow, and no test may depend on it.
"""

from types import ModuleType

from ublkpool.daemon import lifetime
from ublkpool.daemon.backends import attach, template_process
from ublkpool.daemon.device import attached_backend, recovery, team
from ublkpool.daemon.processes import broker_process, holder, worker_process, worker_template
from ublkpool.daemon.settings import run_directory

PATIENCE_S = 600.0
END_PATIENCE_S = 60.0
DEADLINES: dict[ModuleType, tuple[str, ...]] = {
    lifetime: ("TAKEOVER_PATIENCE_S",),
    recovery: ("RECOVERY_DEADLINE_S", "FENCE_DEADLINE_S", "QUIESCE_DEADLINE_S"),
    team: ("READY_DEADLINE_S", "REPORT_DEADLINE_S"),
    worker_process: ("ANSWER_DEADLINE_S",),
    worker_template: ("ANSWER_S",),
    broker_process: ("REPLY_DEADLINE_S",),
    holder: ("_ANSWER_TIMEOUT_S",),
    attach: ("ATTACH_DEADLINE_S",),
    template_process: ("ANSWER_S",),
    run_directory: ("REPLACE_DEADLINE_S",),
}


ENDS: dict[ModuleType, tuple[str, ...]] = {attached_backend: ("DETACH_PATIENCE_S", "DEATH_PATIENCE_S")}


def be_patient() -> None:
    """Let this process, which becomes a daemon, wait longer for its own processes and for backends."""
    for deadlines, patience_s in ((DEADLINES, PATIENCE_S), (ENDS, END_PATIENCE_S)):
        for module, names in deadlines.items():
            for name in names:
                assert hasattr(module, name), f"{module.__name__} has no {name}"
                setattr(module, name, patience_s)
