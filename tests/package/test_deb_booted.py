"""The Debian package on a booted clean Debian 13, through its life; `make package LONG=1`.

Two boots: the script is `support/systemd/package_life.py`.  Needs root.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.guest.cache import GuestCache
from support.package import EARLIER, package_file
from support.systemd.boots import Seen, run_boot
from support.systemd.package_life import BACKEND, OURS, SERVICE
from support.systemd.packaged import LIFE, prepare_packaged
from support.systemd.root import SystemdRoot

KERNEL = "7.3"
# Python compiles all of the package twice, in minutes.
BOOT_TIMEOUT_S = 4800
FINE = {"status": 0, "said": ""}
FAILURES = (
    *("device-not-started", "device-failed", "backend-cut-off"),
    *("requests-fail", "worker-died", "recovery-begun"),
)
"""Events that a restart and an upgrade must not have."""
OF_THE_MACHINE = re.compile(
    r"run/mount/utab(\.event|\.lock)?$|var/tmp/systemd-private-"
    # udev's entries of keyboard and mouse, which the kernel numbers as it finds them; 13 is the major number of input.
    r"|run/udev/(data|tags/[^/]+)/(\+input:input|c13:)[0-9]+$"
)
"""Files that any mount and any boot leave, with other names each time."""
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clean Debian with the packages to install, thrown away at the end."""
    scratch = tmp_path_factory.mktemp("booted")
    path = scratch / "root"
    made = SystemdRoot(GuestCache())
    made.fetch()
    try:
        made.copy_debian(path)
        prepare_packaged(path, scratch)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def first(root: Path) -> Seen:
    """Installed, enabled, mounted, restarted and upgraded; off with dirty data."""
    return run_boot(root, KERNEL, LIFE, "first", timeout_s=BOOT_TIMEOUT_S)


@pytest.fixture(scope="module")
def second(root: Path, first: Seen) -> Seen:
    """The next boot: refused to remove, unmounted, removed and purged."""
    return run_boot(root, KERNEL, LIFE, "second", timeout_s=BOOT_TIMEOUT_S)


def current() -> str:
    """The version of the package under test."""
    return package_file().name.split("_")[1]


def expect_service(units: dict[str, dict[str, str]], *, active: bool) -> None:
    """Check that these units are up, and never failed; the daemon and the backend that is a unit among them."""
    for name in (SERVICE, BACKEND):
        expected = ("active", "success", "0") if active else ("inactive", "success", "0")
        unit = units[name]
        assert (unit["ActiveState"], unit["Result"], unit["NRestarts"]) == expected, unit


def test_every_step_ran_through_and_the_machine_goes_off(first: Seen, second: Seen) -> None:
    for seen in (first, second):
        assert [f"{name}: {value}" for name, value in seen.facts.items() if name.startswith("broke ")] == []
        assert seen.boot.complaints == []
        assert seen.boot.is_off


def test_the_shutdowns_units_do_their_work(first: Seen) -> None:
    for unit in OURS[2:]:
        assert f"{unit}: Deactivated successfully" in first.log
        assert f"{unit}: Failed" not in first.log


def test_an_installation_starts_and_enables_nothing(first: Seen) -> None:
    assert first.fact("install")["status"] == 0, first.fact("install")
    assert first.fact("installed") == f"{EARLIER} installed"
    units = first.fact("units after install")
    expect_service(units, active=False)
    assert {units[name]["UnitFileState"] for name in OURS} == {"disabled"}
    # Neither in users' sessions.
    assert first.fact("users' unit") == {"status": 1, "said": "disabled\n"}
    before, after = first.fact("before"), first.fact("running after install")
    assert after == {name: before[name] for name in after}


def test_enabled_it_serves_disks_that_are_made_and_mounted_by_name(first: Seen) -> None:
    enable = first.fact("enable")
    assert enable["status"] == 0, enable
    # Both that the shutdown needs are enabled with the service.
    for name in OURS:
        assert f"/{name}" in enable["said"], enable
    assert first.fact("mkfs") == FINE
    assert first.fact("mount") == FINE


def test_a_restart_and_an_upgrade_cost_a_writer_no_error(first: Seen) -> None:
    assert first.fact("restart") == FINE
    assert first.fact("upgrade")["status"] == 0, first.fact("upgrade")
    # Otherwise they were not under load.
    assert first.fact("fio ran through")
    fio = first.fact("fio")
    # 128: fio was interrupted, after both.
    assert (fio["status"], fio["complaints"], fio["errors"]) == (128, "", {"check": 0})
    assert fio["verified"] > 0


def test_a_restart_replaces_the_daemon_alone(first: Seen) -> None:
    before, after = dict(first.fact("before restart")), dict(first.fact("after restart"))
    assert after.pop("daemon") != before.pop("daemon")
    assert after == before


def test_an_upgrade_is_a_takeover_that_replaces_all_code_but_of_backends_that_are_units(first: Seen) -> None:
    before, after = first.fact("after restart"), first.fact("after upgrade")
    assert first.fact("installed by the upgrade") == f"{current()} installed"
    assert after["daemon"] != before["daemon"]
    assert not after["code"].items() & before["code"].items()
    assert len(set(after["code"].values())) == 1
    workers = {name: set(pids) & set(before["workers"][name]) for name, pids in after["workers"].items()}
    assert workers == {"vol0": set(), "vol1": set()}
    assert after["backends"]["vol0"] != before["backends"]["vol0"]
    assert after["backends"]["vol1"] == before["backends"]["vol1"]


def test_its_events_are_two_takeovers_with_one_exchange_of_each_device_s_workers(first: Seen) -> None:
    events = first.fact("events")
    replaced = [each["device"] for each in events if each["code"] == "workers-replaced"]
    assert sorted(replaced) == ["vol0", "vol1"]
    assert [each for each in events if each["code"] in FAILURES] == []


def test_after_a_reboot_everything_comes_up_by_itself_with_all_of_the_data(second: Seen) -> None:
    units = second.fact("units after boot")
    expect_service(units, active=True)
    assert {units[name]["UnitFileState"] for name in OURS} == {"enabled"}
    assert units["srv-vol0.mount"]["ActiveState"] == "active"
    assert second.fact("kept")


def test_it_is_not_removed_while_a_disk_is_in_use_which_serves_on(second: Seen) -> None:
    removal = second.fact("remove in use")
    assert removal["status"] != 0
    assert "/srv/vol0" in removal["said"], removal
    assert "ublkpool is not removed: unmount what is in use" in removal["said"], removal
    assert second.fact("installed after refusal") == f"{current()} installed"
    assert second.fact("units after refusal")[SERVICE]["ActiveState"] == "active"
    assert second.fact("sync") == FINE
    assert second.fact("served after refusal")


def test_removed_it_serves_and_runs_nothing_and_keeps_the_config(second: Seen, first: Seen) -> None:
    assert second.fact("umount") == FINE
    assert second.fact("remove")["status"] == 0, second.fact("remove")
    assert second.fact("installed after remove") == f"{current()} config-files"
    before, after = first.fact("before"), dict(second.fact("running after remove"))
    # Units that are enabled are known until a purge.
    assert {each.split()[2] for each in after.pop("units")} <= {"inactive"}
    assert after == {name: before[name] for name in after}
    assert second.fact("config after remove")


def kept(files: dict[str, Any]) -> dict[str, Any]:
    """All files but OF_THE_MACHINE."""
    return {path: about for path, about in files.items() if not OF_THE_MACHINE.match(path)}


@pytest.mark.parametrize("what", ["files", "units", "disks", "queues", "processes"])
def test_purged_it_leaves_nothing(first: Seen, second: Seen, what: str) -> None:
    assert second.fact("purge")["status"] == 0, second.fact("purge")
    # The operator's stores are not the package's.
    assert second.fact("stores") == ["vol0.img", "vol1.img"]
    before, after = first.fact("before")[what], second.fact("after")[what]
    if what == "files":
        assert len(before) > 10000
        assert kept(after) == kept(before)
    else:
        assert after == before
