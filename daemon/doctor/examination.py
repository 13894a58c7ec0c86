"""The order of the checks.  Each runs in a process of its own with a deadline.

A hung driver, file system or daemon holds up its own check only.  Nothing is changed anywhere: the checks read, send
GET_FEATURES, GET_DEV_INFO and the daemon's `list`, and start nothing but these processes.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import msgspec

from ublkpool.daemon.doctor.daemon import DaemonAnswer, daemon_findings
from ublkpool.daemon.doctor.directories import (
    run_directory_findings,
    shm_findings,
    state_directory_findings,
)
from ublkpool.daemon.doctor.features import Offered, feature_findings
from ublkpool.daemon.doctor.finding import Finding, Report, printable, report_of
from ublkpool.daemon.doctor.kernel import driver_findings, io_uring_findings, kernel_findings
from ublkpool.daemon.doctor.known_kernels import known_kernel_findings
from ublkpool.daemon.doctor.leftovers import (
    leftover_findings,
    lost_findings,
    read_records,
    version_findings,
)
from ublkpool.daemon.doctor.limits import Limited, limit_findings
from ublkpool.daemon.doctor.probes import Probes
from ublkpool.daemon.doctor.release import parse_release
from ublkpool.daemon.doctor.rights import rights_findings
from ublkpool.daemon.doctor.system import DEVICES, System, instance_of
from ublkpool.daemon.doctor.udev import udev_findings
from ublkpool.daemon.errors import one_line
from ublkpool.daemon.kernel.control_process import ControlFailed, ControlRunner

DEADLINE_S = 10.0
"""Of one check; longer than the daemon is asked."""
_T = TypeVar("_T")
_Check = Callable[[], list[Finding]]


async def examine(system: System, probes: Probes, deadline_s: float = DEADLINE_S) -> Report:
    """Run every check; a check that fails or hangs is a finding.  `deadline_s` is of each check."""
    runner = ControlRunner()
    offered = await _asked(runner, "GET_FEATURES", probes.features, Offered, deadline_s)
    if isinstance(offered, str):
        offered = Offered(None, offered)
    answer = await _asked(
        runner, "the daemon", lambda: probes.daemon(system.run_dir), DaemonAnswer, deadline_s
    )
    if isinstance(answer, str):
        answer = DaemonAnswer("silent", says=answer)
    found: list[Finding] = []
    for name, check in checks(system, probes, offered, answer):
        findings = await _asked(
            runner, f"the check {name}", partial(_caught, name, check), list[Finding], deadline_s
        )
        found += [_hung(name, findings)] if isinstance(findings, str) else findings
    return report_of(found)


def checks(
    system: System, probes: Probes, offered: Offered, answer: DaemonAnswer
) -> Iterator[tuple[str, _Check]]:
    """Each check by its name, in the order of the report; `offered` and `answer` are what was asked before."""
    kernel = parse_release(system.release, system.text("proc/version_signature"))
    limited = Limited(answer.pid, "the daemon") if answer.pid else Limited(os.getpid(), "this shell")
    read = partial(read_records, system.run_dir)
    look = partial(probes.owned, instance_of(system.run_dir))
    has_devices = bool(system.names(DEVICES))
    may_ask = not has_devices or (offered.bits is not None and system.is_root)
    yield "kernel", lambda: kernel_findings(system, kernel)
    yield "driver", lambda: driver_findings(system)
    yield "features", lambda: feature_findings(offered)
    yield "known-kernels", lambda: known_kernel_findings(kernel, offered.bits)
    yield "io_uring", lambda: io_uring_findings(system)
    yield "limits", lambda: limit_findings(system, kernel, limited)
    yield "udev", lambda: udev_findings(system)
    yield "run-directory", lambda: run_directory_findings(system)
    yield "state-directory", lambda: state_directory_findings(system)
    yield "shm", lambda: _shm(system, answer)
    yield "daemon", lambda: daemon_findings(system.run_dir, answer)
    yield "leftovers", lambda: leftover_findings(system.run_dir, answer, read(), probes.is_alive)
    yield "rights", lambda: rights_findings(system, read(), probes.is_alive)
    yield "lost-devices", lambda: lost_findings(look, read, may_ask)
    yield "versions", lambda: version_findings(read(), probes.build())


def _shm(system: System, answer: DaemonAnswer) -> list[Finding]:
    recorded = read_records(system.run_dir)
    numbers = {each.device_number for each in recorded.records if each.device_number is not None}
    return shm_findings(system, None if recorded.denied else numbers, not answer.is_gone)


def _caught(name: str, check: _Check) -> list[Finding]:
    try:
        found = check()
    except Exception as error:
        found = [Finding(name, "fail", f"this check broke off: {one_line(error)}", "report this line")]
    return [
        msgspec.structs.replace(each, says=printable(each.says), way_out=printable(each.way_out))
        for each in found
    ]


async def _asked(
    runner: ControlRunner, what: str, work: Callable[[], _T], result: type[_T], deadline_s: float
) -> _T | str:
    """The result of `work`, or why there is none."""
    try:
        return await runner.run_beside(what, work, result, deadline_s)
    except ControlFailed as error:
        return str(error)


def _hung(name: str, reason: str) -> Finding:
    return Finding(name, "fail", reason, "look at what it waits for; every other check was made")
