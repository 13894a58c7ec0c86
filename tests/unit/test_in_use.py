"""A disk is removed only if no user is seen, and a refusal names the users."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel import disk_users as in_use
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import CallHung, ControlFailed
from ublkpool.daemon.kernel.disk_use import Users

READER = Users(openers=("process 7 (cat) has it open",))
MOUNT = Users(lasting=("mounted at /srv",))
MAPPER = Users(openers=("process 8 (db) maps it",))


class Kernel(BlockDevice):
    """A disk whose answers a test sets; `users` are returned one after another, the last again and again."""

    node = Path("/dev/ublkb0")

    def __init__(
        self, users: Sequence[Users] = (Users(),), *, claimed: bool = False, newer: bool = True
    ) -> None:
        self._users = list(users)
        self.claimed, self._newer = claimed, newer
        self.mapped = Users()
        self.hangs = ""
        self.opens = 0

    @property
    def can_try_stop(self) -> bool:
        return self._newer

    async def users(self, deadline_s: float = 0) -> Users:
        if self.hangs == "users":
            raise CallHung("vol0: looking for users of ublkb0 has hung")
        return self._users.pop(0) if len(self._users) > 1 else self._users[0]

    async def is_claimed(self, deadline_s: float = 0) -> bool:
        self.opens += 1
        if self.hangs == "open":
            raise CallHung("vol0: opening /dev/ublkb0 has hung for 20 s in process 99")
        return self.claimed

    async def mappers(self) -> Users:
        return self.mapped


def check(kernel: Kernel, *, may_open: bool = True) -> None:
    asyncio.run(in_use.check_unused("vol0", kernel, may_open=may_open))


def refusal(kernel: Kernel) -> str:
    with pytest.raises(DaemonError) as caught:
        check(kernel)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_use, "PATIENCE_S", -1.0)
    monkeypatch.setattr(in_use, "_POLL_S", 0.0)


def test_a_disk_without_users_may_be_removed() -> None:
    kernel = Kernel()
    check(kernel)
    assert kernel.opens == 1


def test_each_kind_of_user_is_named_with_the_way_out() -> None:
    assert refusal(Kernel([MOUNT])) == (
        "vol0: its disk /dev/ublkb0 is in use: mounted at /srv: end that use, or use --force"
    )
    assert "process 7 (cat) has it open" in refusal(Kernel([READER]))


def test_a_claim_by_an_unseen_user_counts_as_use() -> None:
    assert "a user that neither /proc nor /sys shows" in refusal(Kernel(claimed=True))


def test_a_mapping_counts_where_the_kernel_does_not_count_openers() -> None:
    kernel = Kernel(newer=False)
    kernel.mapped = MAPPER
    assert "process 8 (db) maps it" in refusal(kernel)


def test_a_short_open_by_another_program_is_waited_for_and_a_mount_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(in_use, "PATIENCE_S", 600.0)
    check(Kernel([READER, READER, Users()]))
    assert "mounted" in refusal(Kernel([MOUNT, Users()]))


def test_the_refusal_for_a_disk_that_does_not_answer_names_the_call_that_hangs() -> None:
    for call in ("open", "users"):
        kernel = Kernel()
        kernel.hangs = call
        said = refusal(kernel)
        assert (
            said.startswith("vol0: it cannot be told whether its disk is in use: vol0: ")
            and "has hung" in said
        )
        assert said.endswith("use --force")


def test_the_disk_is_not_opened_if_a_user_is_seen_already() -> None:
    kernel = Kernel([READER])
    kernel.hangs = "open"
    assert "process 7 (cat)" in refusal(kernel) and kernel.opens == 0


def test_before_the_disk_is_live_it_is_not_opened() -> None:
    kernel = Kernel(claimed=True)
    check(kernel, may_open=False)
    assert kernel.opens == 0
    with pytest.raises(DaemonError, match="cat"):
        check(Kernel([READER]), may_open=False)


def stop(kernel: Kernel, answers: list[bool]) -> None:
    async def try_stop() -> bool:
        return answers.pop(0)

    asyncio.run(in_use.stop_unused("vol0", kernel, try_stop))


def test_the_kernel_decides_and_is_asked_again_for_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(DaemonError, match="in use: process 7"):
        stop(Kernel([READER]), [False])
    with pytest.raises(DaemonError, match="a user that neither"):
        stop(Kernel(), [False])
    monkeypatch.setattr(in_use, "PATIENCE_S", 600.0)
    answers = [False, False, True]
    stop(Kernel([READER]), answers)
    assert answers == []


def test_a_warning_names_the_users_or_why_they_cannot_be_seen() -> None:
    def words(kernel: Kernel) -> str:
        return asyncio.run(in_use.describe_use(kernel))

    assert words(Kernel()) == ""
    assert words(Kernel([MOUNT])) == "mounted at /srv"
    assert words(Kernel(claimed=True)) == "a user that neither /proc nor /sys shows"
    stuck = Kernel()
    stuck.hangs = "open"
    assert words(stuck) == "it cannot be told by whom: the look at its disk took longer than 5 s"


def test_a_failed_look_does_not_count_as_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_kernel: Kernel, _deadline_s: float = 0) -> bool:
        raise ControlFailed("vol0: opening /dev/ublkb0: not tried", 0)

    monkeypatch.setattr(Kernel, "is_claimed", fail)
    assert "it cannot be told" in refusal(Kernel())
