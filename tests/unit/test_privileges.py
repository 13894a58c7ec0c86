"""Giving up rights, by processes that do it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.rights import CAPABILITY_SETS
from ublkpool.workers.privileges import (
    Account,
    account_of,
    become,
    forbid_new_rights,
    give_up_capabilities,
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
NOBODY = Account("nobody", 65534, 65534, (7, 65533))


def status_after(change: Callable[[], None]) -> dict[str, str]:
    """/proc/self/status of a child that has called `change`."""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        try:
            change()
            os.write(writer, Path("/proc/self/status").read_bytes())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    os.waitpid(pid, 0)
    assert text, "the child failed"
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: " ".join(value.split()) for name, _, value in pairs}


def become_nobody() -> None:
    forbid_new_rights()
    become(NOBODY)


@needs_root
def test_an_ordinary_user_has_no_capability_and_can_get_none() -> None:
    status = status_after(become_nobody)
    assert (status["Uid"], status["Gid"]) == (" ".join(["65534"] * 4), " ".join(["65534"] * 4))
    assert status["Groups"] == "7 65533"
    assert {name: int(status[name], 16) for name in CAPABILITY_SETS} == dict.fromkeys(CAPABILITY_SETS, 0)
    assert status["NoNewPrivs"] == "1"


@needs_root
def test_the_first_user_cannot_be_had_again() -> None:
    def try_again() -> None:
        become_nobody()
        with pytest.raises(PermissionError):
            os.setresuid(0, 0, 0)
        with pytest.raises(PermissionError):
            os.setgroups([0])

    status_after(try_again)


def test_without_another_user_a_process_gives_up_every_capability() -> None:
    def give_up() -> None:
        forbid_new_rights()
        give_up_capabilities()

    status = status_after(give_up)
    held = [name for name in CAPABILITY_SETS if name != "CapBnd"]
    assert {name: int(status[name], 16) for name in held} == dict.fromkeys(held, 0)
    assert status["NoNewPrivs"] == "1"


def test_an_account_is_found_by_name_and_by_number() -> None:
    root = account_of("root")
    assert account_of("0") == root
    assert (root.user, root.group) == (0, 0)
    assert account_of("root", "65534" if _has_group(65534) else "0").user == 0


def _has_group(number: int) -> bool:
    import grp

    return any(each.gr_gid == number for each in grp.getgrall())


@pytest.mark.parametrize(
    ("user", "group", "said"),
    [
        ("no-such-user", None, "no such user: no-such-user; create it with: useradd --system no-such-user"),
        ("99999999999", None, "no such user: 99999999999"),
        ("root", "no-such-group", "no such group: no-such-group; create it with: groupadd --system"),
    ],
)
def test_a_name_that_is_none_is_refused_with_the_way_out(user: str, group: str | None, said: str) -> None:
    with pytest.raises(LookupError, match=said):
        account_of(user, group)
