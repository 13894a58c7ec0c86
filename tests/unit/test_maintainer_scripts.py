"""The Debian package's scripts: which files they delete, and when they refuse.

Each script runs with its absolute paths below a folder, and with commands that record their calls.
"""

import fcntl
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_PATHS = re.compile(r"(?<![\w./}*])/(?=(?:etc|run|sys|usr|var)/|dev/ublkb)")
_RECORDED = "systemctl deb-systemd-invoke udevadm getent groupdel userdel py3compile py3clean"
"""Commands that are replaced: each writes its arguments into `calls`, and fails if `fails/COMMAND ARGUMENT` exists."""
_RECORDER = """#!/bin/sh
echo "${0##*/} $*" >> ROOT/calls
for each in "$@"; do
    if [ -e "ROOT/fails/${0##*/} $each" ]; then exit 1; fi
done
"""
STATE = "var/lib/ublkpool"
KILL = "systemctl kill --kill-whom=all --signal=KILL ublkpool.service ublkpool-backend@*.service"


class Machine:
    """A root without anything but a systemd that runs; all commands succeed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in (*(f"bin/{each}" for each in _RECORDED.split()), "usr/bin/ublkpool"):
            self.write(name, _RECORDER.replace("ROOT", str(root))).chmod(0o755)
        (root / "run/systemd/system").mkdir(parents=True)
        (root / "fails").mkdir()

    def write(self, name: str, text: str = "") -> Path:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def fails(self, command: str) -> None:
        """Let a command fail: its name and one of its arguments."""
        self.write(f"fails/{command}")

    def run(self, script: str, *arguments: str, **environ: str) -> tuple[int, str]:
        """Run a maintainer script; returns its status and what it says."""
        text = (ROOT / f"debian/ublkpool.{script}").read_text()
        ours = self.write(script, _PATHS.sub(f"{self.root}/", text))
        path = f"{self.root}/bin:/usr/bin:/bin"
        ran = subprocess.run(
            ["/bin/sh", str(ours), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={"PATH": path, **environ},
        )
        return ran.returncode, ran.stdout

    def calls(self) -> list[str]:
        found = self.root / "calls"
        return found.read_text().splitlines() if found.exists() else []

    def files(self, below: str) -> list[str]:
        """The files and links below this folder."""
        found = (self.root / below).rglob("*")
        return sorted(str(each.relative_to(self.root / below)) for each in found if not each.is_dir())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_removal_deletes_the_devices_then_ends_every_process_of_the_units(machine: Machine) -> None:
    assert machine.run("prerm", "remove") == (0, "")
    assert machine.calls() == [
        "ublkpool list",
        "ublkpool del --all --keep-stores",
        "systemctl stop ublkpool.service ublkpool-backend@*.service",
        KILL,
        "py3clean -p ublkpool",
    ]


def test_an_upgrade_asks_and_ends_nothing(machine: Machine) -> None:
    assert machine.run("prerm", "upgrade", "0.2") == (0, "")
    assert machine.calls() == ["py3clean -p ublkpool"]


def test_a_removal_is_refused_while_a_device_is_in_use(machine: Machine) -> None:
    machine.fails("ublkpool del")
    status, said = machine.run("prerm", "remove")
    assert status == 1
    assert said.startswith(
        "ublkpool is not removed: unmount what is in use, then try again; devices that were not"
    )
    assert machine.calls() == ["ublkpool list", "ublkpool del --all --keep-stores"]


@pytest.mark.parametrize(
    ("sign", "reason"),
    [
        ("run/ublkpool/devices/vol0.json", "no daemon answers, and its devices are still there"),
        ("", "ublkpool.service is active, and no daemon answers in"),
        ("dev/ublkb0", "there are disks"),
    ],
)
def test_a_removal_without_an_answer_is_refused_while_devices_may_be_served(
    machine: Machine, sign: str, reason: str
) -> None:
    machine.fails("ublkpool list")
    if sign:
        machine.write(sign)
        machine.fails("systemctl is-active")
    status, said = machine.run("prerm", "remove")
    assert status == 1
    assert said.startswith("ublkpool is not removed: ") and reason in said and said.count("\n") == 1
    assert ("UBLKPOOL_RUN_DIR=" in said) == (not sign.startswith("run/"))
    assert [
        each for each in machine.calls() if each.startswith(("systemctl stop", "systemctl kill", "py3"))
    ] == []


def test_a_removal_with_no_daemon_and_no_device_asks_nothing_more(machine: Machine) -> None:
    machine.fails("ublkpool list")
    machine.fails("systemctl is-active")
    assert machine.run("prerm", "remove") == (0, "")
    assert KILL in machine.calls()


def test_a_removal_names_the_records_of_the_run_directory_that_the_environment_names(
    machine: Machine,
) -> None:
    machine.fails("ublkpool list")
    machine.fails("systemctl is-active")
    machine.write("run/other/devices/vol0.json")
    assert machine.run("prerm", "remove")[0] == 0
    assert machine.run("prerm", "remove", UBLKPOOL_RUN_DIR=f"{machine.root}/run/other")[0] == 1


def test_a_disk_of_another_of_our_daemons_keeps_the_package(machine: Machine) -> None:
    machine.write("sys/block/ublkb0/diskseq", "17\n")
    machine.write("dev/ublkb0")
    machine.write("run/ublkpool-names/17")
    status, said = machine.run("prerm", "remove")
    assert status == 1
    assert "a daemon in another directory than" in said and "UBLKPOOL_RUN_DIR=" in said


def test_no_process_is_killed_while_a_disk_is_left_that_is_not_known_as_ours(machine: Machine) -> None:
    machine.write("sys/block/ublkb0/diskseq", "17\n")
    machine.write("dev/ublkb0")
    status, said = machine.run("prerm", "remove")
    assert status == 0
    assert "of another program or daemon, so no process is killed" in said
    assert KILL not in machine.calls()


OURS = (
    *("vol0.json", "lock", "events.jsonl", "events.old.jsonl", ".room-3", ".vol0.json.7-0.new"),
    *("at/run/other/vol1.json", "at/run/other/lock", "at/run/other/.room-0"),
)
"""Files that daemons write into the state directory."""
THEIRS = (
    *("vol0.img", "vol0/index.json", "vol0/lock", "vol0/.room-0", "vol0/events.jsonl", ".index.json"),
    *("at/run/other/store/index.json", "at/index.json", "at/run/store/index.json"),
)
"""Files of an operator in that directory."""


def fill_state(machine: Machine, *names: str) -> None:
    for name in names:
        machine.write(f"{STATE}/{name}")


def test_a_purge_deletes_what_daemons_wrote_and_no_file_of_an_operator(machine: Machine) -> None:
    fill_state(machine, *OURS, *THEIRS)
    (machine.root / STATE / "vol1").mkdir()
    machine.write("etc/ublkpool/backends/vol0.conf")
    wants = machine.root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True)
    (wants / "ublkpool.service").symlink_to("/usr/lib/systemd/system/ublkpool.service")
    status, said = machine.run("postrm", "purge")
    assert status == 0
    assert f"{STATE} stays: it has files that no daemon wrote" in said
    assert machine.files(STATE) == sorted(THEIRS)
    assert (machine.root / STATE / "vol1").is_dir()
    assert not wants.exists() and not (machine.root / "etc/ublkpool").exists()
    assert "groupdel ublkpool" in machine.calls()
    assert "userdel ublkpool-worker" in machine.calls()


def test_a_purge_leaves_no_state_directory_that_only_daemons_have_used(machine: Machine) -> None:
    fill_state(machine, *OURS)
    assert machine.run("postrm", "purge") == (0, "")
    assert not (machine.root / STATE).exists()


def test_a_purge_follows_a_link_to_the_state_directory(machine: Machine) -> None:
    for place, names in (("srv/one", OURS), ("srv/two", (*OURS, "vol0/index.json"))):
        for name in names:
            machine.write(f"{place}/{name}")
    link = machine.root / STATE
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(machine.root / "srv/two")
    assert f"{STATE} stays" in machine.run("postrm", "purge")[1]
    assert machine.files("srv/two") == ["vol0/index.json"]
    link.unlink()
    link.symlink_to(machine.root / "srv/one")
    assert machine.run("postrm", "purge") == (0, "")
    assert not link.is_symlink() and not (machine.root / "srv/one").exists()


def test_a_directory_that_no_daemon_has_used_or_one_uses_now_stays(machine: Machine) -> None:
    fill_state(machine, "vol0.json", "at/run/other/lock", "at/run/other/vol1.json")
    held = os.open(machine.root / STATE / "at/run/other/lock", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        status, said = machine.run("postrm", "purge")
    finally:
        os.close(held)
    assert status == 0
    assert "a daemon uses" in said
    assert machine.files(STATE) == ["at/run/other/lock", "at/run/other/vol1.json", "vol0.json"]


@pytest.mark.parametrize(
    "sign",
    ["run/ublkpool/admin.sock", "run/ublkpool/devices/vol0.json", "etc/systemd/system/ublkpool.service"],
)
def test_a_purge_beside_a_daemon_that_was_installed_by_hand_deletes_nothing(
    machine: Machine, sign: str
) -> None:
    machine.write(sign)
    fill_state(machine, *OURS)
    machine.write("etc/ublkpool/ublkpool.toml")
    before = [machine.files(each) for each in ("run", "etc", "var")]
    status, said = machine.run("postrm", "purge")
    assert status == 0
    assert f"{sign} is not the package's" in said and said.count("\n") == 1
    assert [machine.files(each) for each in ("run", "etc", "var")] == before
    assert machine.calls() == ["systemctl --system daemon-reload"]


def test_a_unit_that_is_masked_is_no_installation_by_hand(machine: Machine) -> None:
    unit = machine.root / "etc/systemd/system/ublkpool.service"
    unit.parent.mkdir(parents=True)
    unit.symlink_to("/dev/null")
    fill_state(machine, *OURS)
    assert machine.run("postrm", "purge") == (0, "")
    assert not (machine.root / STATE).exists()


def test_an_installation_names_what_was_installed_by_hand(machine: Machine) -> None:
    assert machine.run("postinst", "configure") == (0, "")
    machine.write("usr/local/bin/ublkpool")
    machine.write("etc/systemd/system/ublkpool-backend@.service")
    status, said = machine.run("postinst", "configure", "0.1")
    assert status == 0
    assert "ublkpool-backend@.service is used in place of the package's file" in said
    assert "usr/local/bin/ublkpool answers to the command ublkpool in place of the package's" in said


def test_the_package_depends_on_the_pythons_that_it_has_packages_for() -> None:
    control = (ROOT / "debian/control").read_text()
    packaged = (ROOT / "packaging/pythons.txt").read_text().split()
    (depends,) = re.findall(r"^Depends: (.*)$", control, re.MULTILINE)
    clauses = [each for each in depends.split(", ") if each.startswith("python3 ")]

    def allows(clause: str, minor: int) -> bool:
        limits = re.findall(r"python3 \((>=|<<) 3\.(\d+)~\)", clause)
        assert len(limits) == clause.count("python3")
        return any(minor >= int(limit) if sign == ">=" else minor < int(limit) for sign, limit in limits)

    allowed = [f"3.{minor}" for minor in range(40) if all(allows(each, minor) for each in clauses)]
    assert clauses and allowed == packaged
