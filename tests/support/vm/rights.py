"""That the processes which serve a device's I/O have no rights."""

import pwd
from functools import partial
from pathlib import Path

from support.rights import expect_threads_without_rights
from support.vm.daemon import WORKER_USER, Daemon, eventually


def expect_no_rights(daemon: Daemon, name: str, user: str = WORKER_USER) -> None:
    """Each thread of the device's workers and of the broker is this user, without groups and capabilities."""
    eventually(lambda: daemon.broker_pid, "a broker runs")
    account = pwd.getpwnam(user)
    for pid in (*(each.pid for each in daemon.status(name).workers), daemon.broker_pid):
        # A broker that was just started is root until it listens; the workers were ready before.
        eventually(partial(_is, pid, account.pw_uid), f"process {pid} has its user")
        expect_threads_without_rights(pid, account.pw_uid, account.pw_gid)


def _is(pid: int, user: int) -> bool:
    return f"\nUid:\t{user}\t{user}\t" in Path(f"/proc/{pid}/status").read_text()
