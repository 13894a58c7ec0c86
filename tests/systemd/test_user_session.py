"""The daemon of an ordinary user on a booted Debian 13: rules read by udev, the user's own systemd, the next boot.

Only with UBLKPOOL_LONG, and in one guest: it takes minutes on a busy machine and depends on no kernel.
"""

import pytest

from support.systemd.boots import Seen

FINE = {"status": 0, "said": ""}
pytestmark = [pytest.mark.long, pytest.mark.one_kernel("7.3")]


def expect_active(unit: dict[str, str]) -> None:
    """Check that the user's unit runs and has never failed."""
    assert (unit["ActiveState"], unit["Result"], unit["NRestarts"]) == ("active", "success", "0"), unit


def test_the_rules_give_the_group_the_control_node_and_leave_roots_devices_to_root(first: Seen) -> None:
    assert first.fact("users' rules")["status"] == 0, first.fact("users' rules")
    assert first.fact("control node") == "root ublk 660"
    nodes = first.fact("root's nodes")
    assert nodes["after"] == nodes["before"]
    assert {each.split()[0] for each in nodes["after"].values()} == {"root"}


def test_the_users_systemd_starts_the_daemon_which_a_reload_gives_devices(first: Seen) -> None:
    assert first.fact("linger") == FINE
    assert first.fact("user's enable")["status"] == 0, first.fact("user's enable")
    expect_active(first.fact("user's unit"))
    assert first.fact("user's first config") == ""
    assert first.fact("user's reload") == FINE


def test_udev_gives_the_nodes_of_a_users_device_to_that_user_alone(first: Seen) -> None:
    nodes = first.fact("user's nodes")
    assert len(nodes) == 2
    assert set(nodes.values()) == {"alice alice 600"}
    stranger = first.fact("stranger")
    assert stranger["status"] == 1 and "Permission denied" in stranger["said"], stranger


def test_a_restart_of_the_users_unit_costs_a_writer_no_error(first: Seen) -> None:
    assert first.fact("user's restart") == FINE
    assert first.fact("user's fio ran through")
    fio = first.fact("user's fio")
    # 128: fio was interrupted, after the restart.
    assert (fio["status"], fio["complaints"], fio["errors"]) == (128, "", {"check": 0})
    assert fio["verified"] > 0
    before, after = (dict(first.fact("user's processes")[when]) for when in ("before", "after"))
    assert after.pop("daemon") != before.pop("daemon")
    assert after == before


def test_with_lingering_the_next_boot_serves_the_disk_with_its_data(first: Seen, second: Seen) -> None:
    assert first.fact("user's copy") == FINE
    expect_active(second.fact("user's unit after boot"))
    nodes = second.fact("user's nodes after boot")
    assert set(nodes.values()) == {"alice alice 600"}
    assert second.fact("user's data") == FINE
