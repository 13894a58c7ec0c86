"""The names that udev reads: each leads to the disk of its device, and to no other, whatever happens in between."""

import asyncio
import fcntl
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from ublkpool.daemon.kernel import block_device, device_commands, disk_names
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.kernel.device_commands import Created
from ublkpool.daemon.kernel.disk_names import DiskNames
from ublkpool.ublk import control
from ublkpool.ublk.abi import DeviceInfo, Feature
from ublkpool.ublk.errors import UblkError

RULES = Path(__file__).parents[2] / "config" / "99-ublkpool.rules"


class Machine(NamedTuple):
    """A tree of files like that of a machine, in which this class does the kernel's and udev's part."""

    root: Path

    @property
    def names(self) -> DiskNames:
        return DiskNames(self.root)

    @property
    def files(self) -> Path:
        return self.root / "run/ublkpool-names"

    def add(self, disk: str, sequence: int, partitions: int = 0) -> None:
        for each in (disk, *(f"{disk}p{n + 1}" for n in range(partitions))):
            at = self.root / "sys/class/block" / each
            at.mkdir(parents=True)
            (at / "uevent").write_text("")
        (self.root / "sys/class/block" / disk / "diskseq").write_text(f"{sequence}\n")

    def remove(self, disk: str) -> None:
        for at in (self.root / "sys/class/block").glob(f"{disk}*"):
            for each in at.iterdir():
                each.unlink()
            at.rmdir()

    def link(self, link: str, node: str) -> Path:
        at = self.root / "dev" / link
        at.parent.mkdir(parents=True, exist_ok=True)
        at.symlink_to(("../" * link.count("/")) + node)
        return at

    def published(self) -> dict[str, str]:
        """The text of each file."""
        return {each.name: each.read_text() for each in self.files.iterdir()} if self.files.exists() else {}

    def announced(self) -> list[str]:
        """The disks and partitions of which udev was told."""
        found = (self.root / "sys/class/block").glob("*/uevent")
        return sorted(each.parent.name for each in found if each.read_text() == "change")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(disk_names, "LINK_PATIENCE_S", 0.0)
    (tmp_path / "run").mkdir()
    return Machine(tmp_path)


def ours() -> None:
    """The device number is still ours."""


def test_a_disk_is_named_by_its_sequence_number_and_udev_looks_at_it_and_its_partitions(
    machine: Machine,
) -> None:
    machine.add("ublkb1", 41, partitions=2)
    machine.add("ublkb10", 42)
    assert machine.names.publish("vol.0-a_b", "ublkb1", ours) == ""
    assert machine.published() == {"41": "UBLKPOOL_NAME=vol.0-a_b\n"}
    assert machine.announced() == ["ublkb1", "ublkb1p1", "ublkb1p2"]
    assert stat.S_IMODE((machine.files / "41").stat().st_mode) == 0o644


@pytest.mark.parametrize("mode", [None, 0o755, 0o777])
def test_no_other_user_can_open_the_directory_and_so_hold_its_lock(
    machine: Machine, mode: int | None
) -> None:
    if mode is not None:
        machine.files.mkdir()
        machine.files.chmod(mode)
    machine.add("ublkb0", 7)
    umask = os.umask(0)
    try:
        assert machine.names.publish("vol0", "ublkb0", ours) == ""
    finally:
        os.umask(umask)
    assert stat.S_IMODE(machine.files.stat().st_mode) == 0o700


def test_the_directory_is_closed_to_other_users_from_its_first_moment(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.add("ublkb0", 7)
    modes = []
    opened = os.open

    def note(path: Path, flags: int, *mode: int) -> int:
        modes.append(stat.S_IMODE(path.stat().st_mode))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", note)
    umask = os.umask(0)
    try:
        machine.names.publish("vol0", "ublkb0", ours)
    finally:
        os.umask(umask)
    assert modes == [0o700]


def test_a_disk_that_is_named_and_linked_is_not_announced_again(machine: Machine) -> None:
    machine.add("ublkb0", 7)
    machine.names.publish("vol0", "ublkb0", ours)
    machine.link("ublkpool/vol0", "ublkb0")
    (machine.root / "sys/class/block/ublkb0/uevent").write_text("")
    assert machine.names.publish("vol0", "ublkb0", ours) == ""
    assert machine.announced() == []
    (machine.root / "dev/ublkpool/vol0").unlink()
    machine.names.publish("vol0", "ublkb0", ours)
    assert machine.announced() == ["ublkb0"]


@pytest.mark.parametrize("missing", ["", "file", "link", "mode"])
def test_only_a_disk_without_its_name_or_link_waits_for_the_lock(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    machine.add("ublkb0", 7)
    machine.names.publish("vol0", "ublkb0", ours)
    link = machine.link("ublkpool/vol0", "ublkb0")
    locked = []
    monkeypatch.setattr(fcntl, "flock", lambda *_: locked.append(1))
    if missing == "file":
        (machine.files / "7").unlink()
    elif missing == "link":
        link.unlink()
    elif missing == "mode":
        machine.files.chmod(0o755)
    assert machine.names.publish("vol0", "ublkb0", ours) == ""
    assert bool(locked) == bool(missing)
    assert machine.published() == {"7": "UBLKPOOL_NAME=vol0\n"}
    assert stat.S_IMODE(machine.files.stat().st_mode) == 0o700


def test_the_numbers_of_other_disks_are_read_once_for_a_name(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        machine.add(f"ublkb{number}", 40 + number)
    reads: list[str] = []
    sequence = DiskNames._sequence

    def note(names: DiskNames, disk: str) -> str:
        reads.append(disk)
        return sequence(names, disk)

    monkeypatch.setattr(DiskNames, "_sequence", note)
    assert machine.names.publish("vol0", "ublkb0", ours) == ""
    assert sorted(each for each in reads if each != "ublkb0") == ["ublkb1", "ublkb2", "ublkb3", "ublkb4"]


def test_the_next_disk_with_the_number_has_no_name_of_a_killed_daemon_s(machine: Machine) -> None:
    machine.add("ublkb0", 7)
    machine.names.publish("vol0", "ublkb0", ours)
    # The daemon is killed, another program deletes the device, and a third gets its number.
    machine.remove("ublkb0")
    machine.add("ublkb0", 8)
    assert machine.names.published() == {}
    assert "8" not in machine.published()
    # The next name of any daemon removes what is left.
    machine.add("ublkb1", 9)
    machine.names.publish("vol1", "ublkb1", ours)
    assert machine.published() == {"9": "UBLKPOOL_NAME=vol1\n"}


@pytest.mark.parametrize("when", [1, 2])
def test_a_disk_of_another_server_is_not_named(machine: Machine, when: int) -> None:
    machine.add("ublkb0", 7)
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == when:
            raise UblkError("device 0 is another server's", 19)

    with pytest.raises(UblkError):
        machine.names.publish("vol0", "ublkb0", check)
    assert machine.published() == {} and machine.announced() == []


def test_a_disk_that_goes_meanwhile_leaves_no_file(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.add("ublkb0", 7)
    write = DiskNames._write

    def write_late(names: DiskNames, sequence: str, name: str) -> bool:
        machine.remove("ublkb0")
        return write(names, sequence, name)

    monkeypatch.setattr(DiskNames, "_write", write_late)
    assert machine.names.publish("vol0", "ublkb0", ours) == ""
    assert machine.published() == {}


def test_of_two_daemons_devices_with_one_name_only_the_first_has_it(machine: Machine) -> None:
    machine.add("ublkb0", 7)
    machine.add("ublkb1", 8)
    assert machine.names.publish("vol0", "ublkb0", ours) == ""
    assert "ublkb0, perhaps of another daemon" in machine.names.publish("vol0", "ublkb1", ours)
    assert machine.names.publish("vol0", "ublkb0", ours) == ""
    assert machine.published() == {"7": "UBLKPOOL_NAME=vol0\n"}
    machine.remove("ublkb0")
    assert machine.names.publish("vol0", "ublkb1", ours) == ""
    assert machine.published() == {"8": "UBLKPOOL_NAME=vol0\n"}


@pytest.mark.parametrize(("name", "has_link"), [("vol0-part1", False), ("vol0-part", True), ("part1", True)])
def test_a_name_like_that_of_a_partition_gets_no_link(machine: Machine, name: str, has_link: bool) -> None:
    machine.add("ublkb0", 7)
    assert (machine.names.publish(name, "ublkb0", ours) == "") == has_link
    assert bool(machine.published()) == has_link


def test_a_name_goes_with_its_disk_and_the_directory_with_the_last(machine: Machine) -> None:
    machine.add("ublkb0", 7)
    machine.add("ublkb1", 8)
    machine.names.publish("vol0", "ublkb0", ours)
    machine.names.publish("vol1", "ublkb1", ours)
    assert not machine.names.withdraw("vol0", "ublkb0")
    assert set(machine.published()) == {"7", "8"}
    machine.remove("ublkb0")
    assert machine.names.withdraw("vol0", "ublkb0")
    assert set(machine.published()) == {"8"}
    machine.remove("ublkb1")
    assert machine.names.withdraw("vol1", "ublkb1")
    assert not machine.files.exists()


def test_links_that_udev_left_are_removed_before_another_disk_gets_the_number(machine: Machine) -> None:
    stale = [
        machine.link(link, node)
        for link, node in (
            ("ublkpool/vol0", "ublkb1"),
            ("ublkpool/vol0-part2", "ublkb1p2"),
            ("disk/by-id/ublkpool-vol0", "ublkb1"),
            ("disk/by-id/ublkpool-vol0-part2", "ublkb1p2"),
        )
    ]
    others = [
        machine.link(link, node)
        for link, node in (
            ("ublkpool/vol", "ublkb1"),
            ("ublkpool/vol00", "ublkb1"),
            ("ublkpool/vol0-part1", "ublkb10"),
            ("disk/by-id/vol0", "ublkb1"),
        )
    ]
    machine.add("ublkb1", 7)
    assert not machine.names.withdraw("vol0", "ublkb1")
    assert all(each.is_symlink() for each in stale)
    machine.remove("ublkb1")
    assert machine.names.withdraw("vol0", "ublkb1")
    assert [each.name for each in stale if each.is_symlink()] == []
    assert all(each.is_symlink() for each in others)


def test_a_directory_of_another_user_or_a_link_is_not_written_to(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.add("ublkb0", 7)
    (machine.root / "elsewhere").mkdir()
    machine.files.symlink_to(machine.root / "elsewhere")
    with pytest.raises(OSError):
        machine.names.publish("vol0", "ublkb0", ours)
    machine.files.unlink()
    machine.files.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: machine.files.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="another user"):
        machine.names.publish("vol0", "ublkb0", ours)
    assert machine.published() == {} and not list((machine.root / "elsewhere").iterdir())


def come_and_go(machine: Machine, disk: str, sequence: int) -> None:
    for each in range(20):
        machine.add(disk, sequence + each)
        assert machine.names.publish(f"of-{disk}", disk, ours) == ""
        assert (machine.files / f"{sequence + each}").read_text() == f"UBLKPOOL_NAME=of-{disk}\n"
        machine.remove(disk)
        assert machine.names.withdraw(f"of-{disk}", disk)


def test_daemons_that_name_disks_at_once_lose_none(machine: Machine) -> None:
    # Threads stand for processes: flock(2) tells descriptors apart, not processes.
    with ThreadPoolExecutor(3) as pool:
        daemons = [pool.submit(come_and_go, machine, f"ublkb{n}", n * 1000) for n in (1, 2, 3)]
    for each in daemons:
        each.result()
    assert not machine.files.exists()


def test_a_directory_that_goes_while_its_lock_is_awaited_is_made_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.add("ublkb0", 7)
    lock, waits = fcntl.flock, []

    def lock_late(fd: int, operation: int) -> None:
        waits.append(fd)
        if len(waits) == 1:
            machine.files.rmdir()
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    assert machine.names.publish("vol0", "ublkb0", ours) == ""
    assert machine.published() == {"7": "UBLKPOOL_NAME=vol0\n"}
    assert len(waits) == 2


@pytest.mark.parametrize("user", [0, 1000])
def test_names_are_told_to_a_udev_that_runs_or_has_run_and_by_root(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, user: int
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert not machine.names.are_wanted
    machine.files.mkdir()
    assert machine.names.are_wanted == (user == 0)
    machine.files.rmdir()
    (machine.root / "run/udev").mkdir()
    (machine.root / "run/udev/control").touch()
    assert machine.names.are_wanted == (user == 0)
    monkeypatch.setattr(disk_names, "is_in_user_namespace", lambda: True)
    assert not machine.names.are_wanted


@pytest.fixture
def device(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> BlockDevice:
    """Device 3, whose mark the driver confirms."""
    for module in (block_device, device_commands):
        monkeypatch.setattr(module, "DiskNames", lambda: machine.names)
    monkeypatch.setattr(DiskNames, "are_wanted", True)
    monkeypatch.setattr(control, "expect_mark", lambda *_: None)
    monkeypatch.setattr(device_commands, "delete", lambda *_: True)
    info = DeviceInfo(queues=1, device_number=3, server_flags=5)
    return BlockDevice(ControlRunner(), "vol0", Created(info, [[0]], Feature(0)))


def run(step: Callable[[], object]) -> None:
    async def main() -> None:
        found = step()
        if asyncio.iscoroutine(found):
            await found

    asyncio.run(main())


def test_a_device_is_named_and_its_deletion_takes_the_name_away(
    machine: Machine, device: BlockDevice
) -> None:
    machine.add("ublkb3", 7)
    run(device.publish_name)
    assert machine.published() == {"7": "UBLKPOOL_NAME=vol0\n"}
    machine.remove("ublkb3")
    run(device.delete)
    assert not machine.files.exists()


def test_a_device_whose_disk_goes_only_with_it_loses_its_name_as_well(
    machine: Machine, device: BlockDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.add("ublkb3", 7)
    run(device.publish_name)

    def delete(*_: object) -> bool:
        machine.remove("ublkb3")
        return True

    monkeypatch.setattr(device_commands, "delete", delete)
    run(device.delete)
    assert not machine.files.exists()


def test_a_name_that_cannot_be_published_is_one_line_and_no_failure(
    machine: Machine, device: BlockDevice, caplog: pytest.LogCaptureFixture
) -> None:
    machine.add("ublkb2", 6)
    machine.add("ublkb3", 7)
    machine.names.publish("vol0", "ublkb2", ours)
    run(device.publish_name)
    (line,) = caplog.messages
    assert line.startswith(
        "vol0: it has no link /dev/ublkpool/vol0: ublkb2, perhaps of another daemon, has this name"
    )
    caplog.clear()
    (machine.files / "6").unlink()
    machine.files.rmdir()
    machine.files.touch()
    run(device.publish_name)
    run(device.delete)
    assert caplog.messages[0].startswith("vol0: it has no link /dev/ublkpool/vol0: ")


def rules() -> list[str]:
    text = RULES.read_text().replace("\\\n", " ")
    return [re.sub(r" +", " ", line) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_rules_link_no_disk_but_one_that_has_a_file_of_its_own_sequence_number() -> None:
    linking = [line for line in rules() if "SYMLINK" in line]
    assert len(linking) == 2
    for line in linking:
        assert line.startswith(
            'SUBSYSTEM=="block", KERNEL=="ublkb*", ACTION!="remove", ENV{UBLKPOOL_NAME}=="?*"'
        )
    (imported,) = [line for line in rules() if "IMPORT" in line]
    assert imported.endswith('ENV{DISKSEQ}=="?*", IMPORT{file}="/run/ublkpool-names/$env{DISKSEQ}"')
    # Before the rules that use it; and no process runs for an event.
    assert rules().index(imported) < min(rules().index(line) for line in linking)
    assert not any("PROGRAM" in line or "program" in line or "RUN" in line for line in rules())
