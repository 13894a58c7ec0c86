"""That what serves I/O has no rights, from /proc."""

import pwd
from contextlib import suppress
from functools import partial
from pathlib import Path

from support.vm.daemon import WORKER_USER, Daemon, eventually

_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def expect_no_rights(daemon: Daemon, name: str, user: str = WORKER_USER) -> None:
    """Each thread of the device's workers and of the broker is this user, without groups and capabilities.

    Root keeps its groups.
    """
    eventually(lambda: daemon.broker_pid, "a broker runs")
    account = pwd.getpwnam(user)
    for pid in (*(each.pid for each in daemon.status(name).workers), daemon.broker_pid):
        # A broker that was just started is root until it listens; the workers were ready before.
        eventually(partial(_is, pid, account.pw_uid), f"process {pid} has its user")
        threads = [each.name for each in Path(f"/proc/{pid}/task").iterdir()]
        assert len(threads) >= 3, "ZeroMQ's threads are looked at as well"
        for thread in threads:
            # One of io_uring's may end meanwhile.
            with suppress(FileNotFoundError, ProcessLookupError):
                _expect_none(_shown(pid, thread), account)


def _is(pid: int, user: int) -> bool:
    return _shown(pid)["Uid"] == {str(user)}


def _expect_none(shown: dict[str, set[str]], account: pwd.struct_passwd) -> None:
    assert (shown["Uid"], shown["Gid"]) == ({str(account.pw_uid)}, {str(account.pw_gid)})
    assert account.pw_uid == 0 or shown["Groups"] == set()
    assert {name: shown[name] for name in _SETS} == {name: {"0" * 16} for name in _SETS}
    assert shown["NoNewPrivs"] == {"1"}


def _shown(pid: int, thread: str = "") -> dict[str, set[str]]:
    """The different words of each line of a process's or thread's status."""
    lines = Path(f"/proc/{pid}/task/{thread or pid}/status").read_text().splitlines()
    return {key: set(words.split()) for key, _, words in (line.partition(":") for line in lines)}
