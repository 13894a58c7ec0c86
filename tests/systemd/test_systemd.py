"""The shipped units on a booted Debian 13: restarts, deaths, the journal, poweroff with dirty data, the next boot."""

import re
from pathlib import Path

import pytest

from support.systemd.boots import Seen
from support.systemd.facts import POWEROFF
from support.systemd.guest import OFF

# 30 s on real hardware; in the guest the shutdown's Python commands start 15 to 25 times slower.
POWEROFF_S = 60.0
# A busy machine is slower still: what the guest needs for one command, in addition and so many times.
COMMANDS = 10
# Of 8 MiB written: each CPU keeps up to 125 pages before /proc/meminfo counts them.
DIRTY_MIN_KIB = 6144
PROJECT = Path(__file__).parents[2]
CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_SYS_CHROOT": 18,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
}
"""Their numbers in include/uapi/linux/capability.h."""
TIMES = re.compile(r"\d\d:\d\d:\d\d|time=")


def priorities(seen: Seen, text: str) -> set[int]:
    """The priorities of all journal lines with this text."""
    return {priority for _, priority, message in seen.fact("journal") if text in message}


def messages(seen: Seen, text: str) -> list[str]:
    """The messages of all journal lines with this text."""
    return [message for _, _, message in seen.fact("journal") if text in message]


def dirtied_kib(seen: Seen) -> dict[str, int]:
    """The dirty data that each of the two writes before the poweroff left."""
    fstab, both = seen.fact("dirty KiB /srv/vol0"), seen.fact("dirty KiB /mnt/hand")
    return {"/srv/vol0": fstab, "/mnt/hand": both - fstab}


def test_every_step_of_the_boots_ran_through(first: Seen, second: Seen) -> None:
    for seen in (first, second):
        assert [f"{name}: {value}" for name, value in seen.facts.items() if name.startswith("broke ")] == []
        assert seen.boot.complaints == []


def test_units_users_and_the_fstab_mount_come_up_by_themselves(first: Seen, second: Seen) -> None:
    for seen in (first, second):
        active = {name: unit["ActiveState"] for name, unit in seen.fact("units").items()}
        assert set(active.values()) == {"active"}, active
        assert seen.fact("mounted")
        states = {name: state for name, state in seen.fact("states").items() if name != "stuck"}
        assert states == {"vol0": "live", "vol1": "live", "vol2": "live"}


def test_a_device_that_never_starts_is_named_and_keeps_nothing_else_waiting(first: Seen) -> None:
    unit = first.fact("units")["ublkpool.service"]
    assert (unit["ActiveState"], unit["NRestarts"]) == ("active", "0")
    assert "stuck" in unit["StatusText"]
    assert "vol0" not in unit["StatusText"]
    assert first.fact("states")["stuck"] != "live"
    assert first.fact("mounted")


def test_nothing_that_the_shutdown_stops_takes_a_server_of_disks_with_it(first: Seen) -> None:
    assert set(first.fact("required")) <= {"-.mount", "system.slice"}


def test_systemd_finds_nothing_wrong_with_the_units(first: Seen) -> None:
    found = first.fact("verify")
    assert found["said"] == ""
    assert found["status"] == 0
    assert len(found["units"]) == 4
    assert first.fact("verified rules")["status"] == 0, first.fact("verified rules")


def linked(nodes: dict[str, str]) -> dict[str, str]:
    """The links that these names of devices or partitions have, each to its node."""
    return {
        f"{prefix}{name}": node
        for name, node in nodes.items()
        for prefix in ("ublkpool/", "disk/by-id/ublkpool-")
    }


LASTING = {"vol0": "ublkb0", "vol1": "ublkb1", "vol2": "ublkb2"}


def test_disks_have_links_with_their_names_at_each_boot(first: Seen, second: Seen) -> None:
    for seen in (first, second):
        assert seen.fact("links at start") == linked(LASTING)


@pytest.mark.one_kernel("7.3")
def test_links_stay_while_daemon_workers_and_backends_die_and_are_replaced(first: Seen) -> None:
    assert first.fact("links after deaths") == linked(LASTING)
    properties = first.fact("properties")
    assert (properties["ID_SERIAL"], properties["ID_MODEL"]) == ("vol0", "ublkpool")
    # The file system is mounted by that link, and systemd unmounts what loses its device.
    assert first.fact("fio ran through")


@pytest.mark.one_kernel("7.3")
def test_the_next_device_with_a_number_has_its_own_links_only_even_if_udev_stood_still(first: Seen) -> None:
    assert first.fact("links of one") == linked(LASTING | {"one": "ublkb40"})
    assert first.fact("links without udev") == linked(LASTING)
    assert first.fact("links of two") == linked(LASTING | {"two": "ublkb40"})
    assert first.fact("links after all") == linked(LASTING)


@pytest.mark.one_kernel("7.3")
def test_a_partition_is_linked_and_by_uuid_knows_a_new_file_system_after_a_trigger(first: Seen) -> None:
    partition = {"one": "ublkb40", "one-part1": "ublkb40p1"}
    assert first.fact("links of a partition") == linked(LASTING | partition)
    assert first.fact("mkfs")["status"] == 0, first.fact("mkfs")
    assert first.fact("trigger")["status"] == 0, first.fact("trigger")
    assert first.fact("by-uuid") == "ublkb40p1"


def test_a_restart_of_the_daemon_and_then_of_a_backend_costs_a_writer_no_error(first: Seen) -> None:
    assert first.fact("daemon restart") == {"status": 0, "said": ""}
    assert first.fact("daemon replaced")
    assert first.fact("backend stayed")
    assert first.fact("backend restart") == {"status": 0, "said": ""}
    # Otherwise the restarts were not under load.
    assert first.fact("fio ran through")
    fio = first.fact("fio")
    # 128: fio was interrupted, after both restarts.
    assert (fio["status"], fio["complaints"], fio["errors"]) == (128, "", {"check": 0})
    assert fio["verified"] > 0


def test_after_a_restart_the_queues_are_the_group_s_still(first: Seen) -> None:
    groups = first.fact("queue groups")
    assert groups
    assert set(groups.values()) == {"ublkpool"}


@pytest.mark.one_kernel("7.3")
def test_the_hardening_drop_in_holds_for_every_process_of_the_unit(first: Seen) -> None:
    left = bounding_set(PROJECT / "config/ublkpool-hardening.conf")
    for name, status in first.fact("confined").items():
        assert int(status["CapBnd"], 16) & ~left == 0, name
        # Mode 2: system calls are filtered.
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1"), name
    # At most 4.0.
    assert first.fact("exposure")["status"] == 0, first.fact("exposure")


@pytest.mark.one_kernel("7.3")
def test_a_worker_is_an_ordinary_user_without_rights(first: Seen) -> None:
    status, numbers = first.fact("confined")["worker"], first.fact("numbers")
    assert set(status["Uid"].split()) == {str(numbers["ublkpool-worker"])}
    assert status["Groups"] == ""
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name


@pytest.mark.one_kernel("7.3")
def test_a_backend_with_a_user_serves_without_rights_also_after_its_death(first: Seen) -> None:
    status, numbers = first.fact("confined")["backend"], first.fact("numbers")
    assert set(status["Uid"].split()) == {str(numbers["vol2"])}
    assert str(numbers["ublkpool"]) in status["Groups"].split()
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    # What root alone may set was set before.
    assert int(status["VmLck"].removesuffix(" kB")) > 0
    assert [each for each in messages(first, "vol2: ") if "PR_SET_IO_FLUSHER" in each] == []


@pytest.mark.one_kernel("7.3")
def test_a_reload_and_a_scrape_over_http_work_under_the_drop_in(first: Seen) -> None:
    assert first.fact("reload") == {"status": 0, "said": ""}
    expect_metrics(first.fact("scraped"))


@pytest.mark.one_kernel("7.3")
def test_a_daemon_without_a_network_goes_on_with_devices_and_starts_others(first: Seen) -> None:
    assert first.fact("restart without network") == {"status": 0, "said": ""}
    networks = first.fact("networks")
    assert networks["backend"] == networks["daemon"] != networks["host"]
    expect_metrics(first.fact("scraped without network"))


def expect_metrics(scraped: list[str]) -> None:
    """Check that these are a working daemon's metrics."""
    assert "ublkpool_up 1.0" in scraped
    # The exporter, an ordinary user, reads other users' processes.
    assert [line for line in scraped if 'role="worker"' in line and "resident" in line]


def bounding_set(drop_in: Path) -> int:
    """The capabilities that a drop-in leaves, as the kernel shows them."""
    lines = drop_in.read_text().splitlines()
    names = " ".join(line.partition("=")[2] for line in lines if line.startswith("CapabilityBoundingSet="))
    return sum(1 << CAPABILITIES[each] for each in names.split())


def test_many_quick_restarts_meet_no_start_limit(first: Seen) -> None:
    unit = first.fact("after quick restarts")
    assert (unit["ActiveState"], unit["Result"]) == ("active", "success")
    assert "repeated too quickly" not in first.log


def test_the_kernel_s_killing_of_one_process_for_want_of_memory_leaves_the_daemon_alone(first: Seen) -> None:
    found = first.fact("out of memory")
    assert found["hog"] == -9
    assert int(found["kills"]) >= 1
    assert found["after"]["MainPID"] == found["before"]["MainPID"]
    assert (found["after"]["ActiveState"], found["after"]["NRestarts"]) == (
        "active",
        found["before"]["NRestarts"],
    )


@pytest.mark.one_kernel("6.12")
def test_lvm_luks_md_and_swap_go_on_while_backends_daemon_and_workers_are_killed(first: Seen) -> None:
    assert first.fact("stacks ran through")
    fio = first.fact("stacks fio")
    assert (fio["status"], fio["complaints"]) == (128, "")
    assert fio["errors"] == {"lvm": 0, "crypt": 0, "md": 0}
    assert fio["verified"] > 0
    churn = first.fact("swap churn")
    assert churn["status"] == 0 and churn["rounds"] >= 8
    # In each round at least what has no room in the group's memory comes back.
    assert churn["swapped in"] > 1024 * churn["rounds"]
    assert re.search(r"State : (clean|active) *\n", first.fact("mirror")), first.fact("mirror")
    assert first.fact("volume check") == {"status": 0, "said": ""}
    assert first.fact("stacks left") == "No devices found\n"


def test_lines_in_the_journal_have_their_priority(first: Seen) -> None:
    assert priorities(first, "vol0: goes on, epoch") == {6}
    assert priorities(first, "vol2: recovered, epoch") == {6}
    assert priorities(first, "vol2: queue 0: its worker ended: ") == {3}
    assert priorities(first, "vol2: backend file ended: ") == {4}
    # Lines of a backend that the daemon runs keep their level.
    assert priorities(first, "vol2.img: direct I/O") | priorities(first, "vol2.img: buffered I/O") == {6}


def test_no_line_in_the_journal_has_a_time_of_its_own(first: Seen) -> None:
    ours = [message for command, _, message in first.fact("journal") if command != "systemd"]
    assert len(ours) > 20
    assert [message for message in ours if TIMES.search(message)] == []


def expect_short_poweroff(seen: Seen) -> None:
    """Check that nothing was waited for, by how long the guest takes for a command."""
    assert seen.boot.is_off
    took_s = seen.boot.second_of(OFF) - seen.boot.second_of(POWEROFF)
    assert took_s < POWEROFF_S + COMMANDS * float(seen.fact("seconds of a command"))


@pytest.mark.parametrize("where", ["/srv/vol0", "/mnt/hand"])
def test_a_poweroff_with_dirty_data_is_short(first: Seen, where: str) -> None:
    assert first.fact("hand mount") == {"status": 0, "said": ""}
    assert dirtied_kib(first)[where] >= DIRTY_MIN_KIB
    expect_short_poweroff(first)


def test_the_next_boot_finds_clean_file_systems_with_all_of_the_data(second: Seen) -> None:
    assert second.fact("fstab data")
    assert second.fact("umount") == {"status": 0, "said": ""}
    for name in ("fsck vol0", "fsck vol1"):
        found = second.fact(name)
        assert found["status"] == 0, found
        assert "recover" not in found["said"]
    assert second.fact("hand data")


def test_a_poweroff_does_not_wait_for_a_backend_that_has_gone(second: Seen) -> None:
    assert second.fact("backend stop") == {"status": 0, "said": ""}
    assert dirtied_kib(second)["/mnt/hand"] >= DIRTY_MIN_KIB
    expect_short_poweroff(second)
    assert "vol1: no backend, and the machine goes down: requests fail" in second.log
