"""The rights of the processes that serve I/O: workers and pool broker, by the records, as /proc shows them."""

import re
from collections.abc import Callable

from ublkpool.daemon.doctor.finding import Finding, some
from ublkpool.daemon.doctor.leftovers import Recorded
from ublkpool.daemon.doctor.system import System
from ublkpool.daemon.processes.left_behind import Process
from ublkpool.daemon.settings.worker_account import WAY_OUT

CHECK = "rights"
_USER = re.compile(r"^Uid:\s+(\d+)", re.MULTILINE)
_CAPABILITIES = re.compile(r"^CapEff:\s*([0-9a-f]+)", re.MULTILINE)


def rights_findings(system: System, recorded: Recorded, is_alive: Callable[[Process], bool]) -> list[Finding]:
    """Whether a process that serves I/O is root, or has capabilities."""
    serving = {
        each.pid: each.role
        for record in recorded.records
        for each in record.processes
        if each.role in ("worker", "broker") and is_alive(each)
    }
    capable, as_root = [], []
    for pid, role in sorted(serving.items()):
        status = system.text(f"proc/{pid}/status")
        user, held = _USER.search(status), _CAPABILITIES.search(status)
        if held is not None and int(held[1], 16):
            capable.append(f"{role} {pid}")
        elif user is not None and user[1] == "0":
            as_root.append(f"{role} {pid}")
    found = []
    if capable:
        says = f"processes that serve I/O have capabilities: {some(capable)}"
        way_out = (
            "restart the daemon, which replaces those of an earlier version; its log says why one keeps them"
        )
        found.append(Finding(CHECK, "warn", says, way_out))
    if as_root:
        says = f"processes that serve I/O are root, without its capabilities: {some(as_root)}"
        found.append(Finding(CHECK, "warn", says, WAY_OUT))
    return found or [Finding(CHECK, "ok", "no process that serves I/O is root, or has a capability")]
