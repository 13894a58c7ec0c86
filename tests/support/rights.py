"""That a process which serves I/O has no rights, from /proc."""

from support.threads import of_each_thread

CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def expect_threads_without_rights(pid: int, user: int, group: int) -> None:
    """Each thread of a process is this user, in no other group, and has no capability nor a way to one.

    Root keeps its groups.
    """
    threads = [_by_key(text) for text in of_each_thread(pid, "status").values()]
    assert len(threads) >= 3, "ZeroMQ's threads are looked at as well"
    for shown in threads:
        assert (shown["Uid"], shown["Gid"]) == ([str(user)] * 4, [str(group)] * 4)
        assert user == 0 or shown["Groups"] == []
        assert {name: int(shown[name][0], 16) for name in CAPABILITY_SETS} == dict.fromkeys(
            CAPABILITY_SETS, 0
        )
        assert shown["NoNewPrivs"] == ["1"]


def _by_key(status: str) -> dict[str, list[str]]:
    """The words of each line, see proc_pid_status(5)."""
    return {key: words.split() for key, _, words in (line.partition(":") for line in status.splitlines())}
