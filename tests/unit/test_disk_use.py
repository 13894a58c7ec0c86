"""The users of a disk are found in /sys and /proc, and each is named."""

import os
from pathlib import Path

import pytest

from ublkpool.daemon.kernel import disk_use
from ublkpool.daemon.kernel.disk_use import Users, find_mappers, find_users


class Machine:
    """A made-up /sys/block and /proc, with the disk ublkb0 (259:0) and its partition ublkb0p1 (259:1)."""

    def __init__(self, root: Path) -> None:
        self.sys, self.proc = root / "block", root / "proc"
        for directory, number in (("ublkb0", "259:0"), ("ublkb0/ublkb0p1", "259:1")):
            self.write(self.sys / directory / "dev", f"{number}\n")
            (self.sys / directory / "holders").mkdir()
        self.write(self.proc / "swaps", "Filename Type Size Used Priority\n")
        self.process(1, "init", "mnt:[1]")

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def process(self, pid: int, name: str, namespace: str = "mnt:[1]", mounts: str = "") -> Path:
        directory = self.proc / str(pid)
        self.write(directory / "comm", f"{name}\n")
        self.write(directory / "mountinfo", mounts)
        self.write(directory / "maps", "")
        (directory / "fd").mkdir()
        (directory / "ns").mkdir()
        (directory / "ns" / "mnt").symlink_to(namespace)
        return directory


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(disk_use, "_SYS_BLOCK", made.sys)
    monkeypatch.setattr(disk_use, "_PROC", made.proc)
    return made


def test_a_disk_without_users_has_none(machine: Machine) -> None:
    machine.process(5, "cat").joinpath("fd", "0").symlink_to("/dev/null")
    assert find_users("ublkb0") == Users()
    assert find_mappers("ublkb0") == Users()
    assert Users().words == ""


def test_a_disk_that_is_not_there_has_no_users(machine: Machine) -> None:
    assert find_users("ublkb7") == Users()


def test_devices_made_of_the_disk_or_of_a_partition_are_named(machine: Machine) -> None:
    machine.write(machine.sys / "dm-3" / "dm" / "name", "vg-root\n")
    (machine.sys / "ublkb0" / "holders" / "dm-3").mkdir()
    (machine.sys / "ublkb0" / "ublkb0p1" / "holders" / "md127").mkdir()
    assert find_users("ublkb0").lasting == (
        "ublkb0 is a part of dm-3 (vg-root)",
        "ublkb0p1 is a part of md127",
    )


def test_swap_and_loop_devices_are_named(machine: Machine) -> None:
    machine.write(
        machine.proc / "swaps", "Filename Type\n/dev/ublkb0p1 partition 1 0 -2\n/swap file 1 0 -3\n"
    )
    machine.write(machine.sys / "loop4" / "loop" / "backing_file", "/dev/ublkb0\n")
    machine.write(machine.sys / "loop5" / "loop" / "backing_file", "/srv/other.img\n")
    assert find_users("ublkb0").lasting == ("swap is on /dev/ublkb0p1", "loop4 is a loop device on it")


def test_a_mount_is_found_in_every_namespace_and_named_with_a_process_that_sees_it(machine: Machine) -> None:
    seen = "30 1 259:1 / /srv/a\\040b rw - ext4 /dev/ublkb0p1 rw\n"
    other = "31 1 0:55 / /data rw - btrfs /dev/ublkb0 rw\n"
    (machine.proc / "1" / "mountinfo").write_text(seen)
    machine.process(40, "sh", "mnt:[1]", seen)
    machine.process(41, "sleep", "mnt:[2]", other)
    assert find_users("ublkb0").lasting == (
        "mounted at /srv/a b",
        "mounted at /data for process 41 (sleep)",
    )


def test_processes_that_have_the_disk_or_a_partition_open_are_named_but_not_our_own_looks(
    machine: Machine,
) -> None:
    machine.process(50, "sh").joinpath("fd", "9").symlink_to("/dev/ublkb0")
    machine.process(51, "qemu").joinpath("fd", "3").symlink_to("/dev/ublkb0p1")
    machine.process(52, "ublkpool-look").joinpath("fd", "3").symlink_to("/dev/ublkb0")
    machine.process(53, "sh").joinpath("fd", "3").symlink_to("socket:[77]")
    found = find_users("ublkb0")
    assert found.openers == ("process 50 (sh) has it open", "process 51 (qemu) has it open")
    assert found.lasting == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a node")
def test_a_node_of_another_name_is_the_same_disk(machine: Machine, tmp_path: Path) -> None:
    node = tmp_path / "xvda"
    try:
        os.mknod(node, 0o600 | 0o060000, os.makedev(259, 0))
    except PermissionError:
        pytest.skip("may not make a node")
    machine.process(60, "dd").joinpath("fd", "3").symlink_to(node)
    assert find_users("ublkb0").openers == ("process 60 (dd) has it open",)


def test_names_may_be_any_bytes(machine: Machine) -> None:
    user = machine.process(62, "x", mounts="")
    (user / "comm").write_bytes(b"\xff\n")
    (user / "mountinfo").write_bytes(b"25 1 259:0 / /srv/\xff rw - ext4 /dev/ublkb0 rw\n")
    (user / "fd" / "3").symlink_to("/dev/ublkb0")
    (user / "ns" / "mnt").unlink()
    (user / "ns" / "mnt").symlink_to("mnt:[2]")
    assert find_users("ublkb0").words == (
        "mounted at /srv/\ufffd for process 62 (\ufffd), process 62 (\ufffd) has it open"
    )


def test_a_memfd_or_a_socket_is_not_asked_for_its_number(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thousand devices' workers most descriptors are these."""
    asked: list[str] = []

    def number_of(path: str) -> str:
        asked.append(path)
        return ""

    monkeypatch.setattr(disk_use, "_number_of", number_of)
    fds = machine.process(61, "ublkpool-0.0") / "fd"
    for number, target in enumerate(("/memfd:ublkpool-data (deleted)", "socket:[7]", "/srv/xvda")):
        (fds / str(number)).symlink_to(target)
    assert find_users("ublkb0").openers == ()
    assert asked == [str(fds / "2")]


def test_a_mapping_is_found_without_a_descriptor(machine: Machine) -> None:
    lines = "7f00-7f01 rw-s 00000000 00:06 99                 /dev/ublkb0\n7f02-7f03 r--p 00000000 00:00 0\n"
    machine.process(70, "db").joinpath("maps").write_text(lines)
    machine.process(71, "db").joinpath("maps").write_text(lines.replace("ublkb0", "ublkb01"))
    assert find_mappers("ublkb0").openers == ("process 70 (db) maps it",)


def test_many_users_are_counted_and_not_all_named(machine: Machine) -> None:
    for pid in range(100, 100 + 2 * disk_use.USERS_MAX):
        machine.process(pid, "sh").joinpath("fd", "9").symlink_to("/dev/ublkb0")
    openers = find_users("ublkb0").openers
    assert len(openers) == disk_use.USERS_MAX + 1
    assert openers[-1] == f"and {disk_use.USERS_MAX} more"
