"""While the machine goes down: the devices that fail waiting requests, and the unmounting at the end."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.fakes.daemon import running_daemon
from ublkpool.daemon.cli import shutdown
from ublkpool.daemon.errors import DaemonUnreachable
from ublkpool.daemon.events.tell import DeviceEvents, Events
from ublkpool.daemon.going_down import PATIENCE_S, GoingDown
from ublkpool.daemon.settings.config import DeviceConfig


@dataclass
class FakeDevice:
    name: str
    lacks_backend: bool
    given_up: list[float] = field(default_factory=list)
    clock: "Clock | None" = None
    is_limited: bool = True

    @property
    def events(self) -> DeviceEvents:
        return Events().of(self.name)

    def lift_limits(self) -> None:
        self.is_limited = False

    def give_up(self) -> None:
        assert self.clock is not None
        self.given_up.append(self.clock.now_s)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_device_without_a_backend_is_given_up_after_the_wait(clock: Clock) -> None:
    absent, served = FakeDevice("a", True, clock=clock), FakeDevice("b", False, clock=clock)
    watch = GoingDown(lambda: [absent, served], clock)
    watch.look()
    clock.now_s += PATIENCE_S - 0.1
    watch.look()
    assert absent.given_up == []
    clock.now_s += 0.1
    watch.look()
    assert absent.given_up == [100.0 + PATIENCE_S]
    assert served.given_up == []


def test_no_device_keeps_its_limits_and_one_that_gets_them_again_loses_them_at_the_next_look(
    clock: Clock,
) -> None:
    """Or else the last dirty data of a slow device would outlast the patience of an umount."""
    devices = [FakeDevice("a", True, clock=clock), FakeDevice("b", False, clock=clock)]
    watch = GoingDown(lambda: devices, clock)
    for _ in range(2):
        watch.look()
        assert not any(each.is_limited for each in devices)
        devices[1].is_limited = True


def test_a_backend_that_is_started_again_in_time_goes_on(clock: Clock) -> None:
    device = FakeDevice("a", True, clock=clock)
    watch = GoingDown(lambda: [device], clock)
    watch.look()
    device.lacks_backend = False
    clock.now_s += PATIENCE_S
    watch.look()
    device.lacks_backend = True
    watch.look()
    clock.now_s += PATIENCE_S - 0.1
    watch.look()
    assert device.given_up == []
    clock.now_s += 0.1
    watch.look()
    assert len(device.given_up) == 1


def test_workers_that_were_forked_since_are_told_as_well(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    device = FakeDevice("a", True, clock=clock)
    watch = GoingDown(lambda: [device], clock)
    watch.look()
    clock.now_s += PATIENCE_S
    watch.look()
    watch.look()
    assert len(device.given_up) == 2
    assert len(caplog.records) <= 1


def test_a_device_that_is_added_later_gets_the_whole_wait(clock: Clock) -> None:
    devices = [FakeDevice("a", True, clock=clock)]
    watch = GoingDown(lambda: devices, clock)
    watch.look()
    clock.now_s += PATIENCE_S
    devices.append(FakeDevice("b", True, clock=clock))
    watch.look()
    assert [bool(each.given_up) for each in devices] == [True, False]


MOUNTINFO = """
21 1 8:1 / / rw - ext4 /dev/sda1 rw
22 21 259:0 / /mnt/whole rw - ext4 /dev/ublkb0 rw
23 22 259:1 / /mnt/whole/below rw - ext4 /dev/ublkb0p1 rw
24 21 253:0 / /mnt/two\\040words rw shared:3 - xfs /dev/mapper/vg-a rw
25 21 0:44 / /mnt/btrfs rw - btrfs /dev/ublkb5 rw
26 21 259:9 / /mnt/foreign rw - ext4 /dev/ublkb7 rw
""".strip()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run; umount of a path in `busy` fails."""
    block = tmp_path / "block"
    block.mkdir()
    for number, name in {"259:0": "ublkb0", "259:1": "ublkb0/ublkb0p1", "259:9": "ublkb7"}.items():
        (tmp_path / "devices" / name).mkdir(parents=True)
        (block / number).symlink_to(tmp_path / "devices" / name)
    (tmp_path / "devices/dm-0/slaves").mkdir(parents=True)
    (tmp_path / "devices/dm-0/slaves/ublkb0p1").symlink_to(tmp_path / "devices/ublkb0/ublkb0p1")
    (block / "253:0").symlink_to(tmp_path / "devices/dm-0")
    monkeypatch.setattr(shutdown, "SYS_BLOCK", block)
    ran: list[list[str]] = []

    def succeeds(command: list[str]) -> bool:
        ran.append(command)
        return command[0] != "umount" or command[-1] != "/mnt/whole"

    monkeypatch.setattr(shutdown, "_succeeds", succeeds)
    return ran


def test_what_is_left_on_our_disks_is_unmounted_the_last_first_and_busy_ones_are_written_back(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    odd = b"/mnt/\xff\xc2\xa0\r"
    (tmp_path / "mountinfo").write_bytes(
        MOUNTINFO.encode() + b"\n99 21 259:0 / " + odd + b" rw - ext4 /dev/ublkb0 rw\n"
    )
    shutdown.release([0, 5], tmp_path / "mountinfo")
    assert commands == [
        ["umount", "--", os.fsdecode(odd)],
        ["umount", "--", "/mnt/btrfs"],
        ["umount", "--", "/mnt/two words"],
        ["umount", "--", "/mnt/whole/below"],
        ["umount", "--", "/mnt/whole"],
        ["sync", "--file-system", "--", "/mnt/whole"],
    ]


def test_a_command_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shutdown, "UNMOUNT_PATIENCE_S", 0.05)
        assert not shutdown._succeeds(["sleep", "100"])
    monkeypatch.setattr(shutdown, "UNMOUNT_PATIENCE_S", 60.0)
    assert shutdown._succeeds(["true"])
    assert not shutdown._succeeds(["false"])


def test_the_daemon_is_told_first_that_it_begins_and_then_that_it_ends(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon:
        daemon.service.configs["vol7"] = DeviceConfig(name="vol7")
        daemon.service.states["vol7"] = "live"
        shutdown.begin(tmp_path)
        shutdown.finish(tmp_path)
        assert daemon.service.shutdowns == [False, True]


def test_without_a_daemon_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable):
        shutdown.begin(tmp_path)
