"""Descriptors or space in the run directory run out while devices are added: a failed add leaves nothing behind."""

import subprocess
from pathlib import Path

import pytest

from support.vm.daemon import Daemon, eventually_nothing, nodes
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.status import DeviceStatus

pytestmark = pytest.mark.one_kernel("6.12")
ADDS_MAX = 20


def _add_until_refused(daemon: Daemon) -> tuple[list[DeviceStatus], str]:
    """The devices that became live, and the error of the next one."""
    added: list[DeviceStatus] = []
    for number in range(ADDS_MAX):
        try:
            added.append(daemon.add(f"vol{number}", "memory", {"size": "1M"}, depth=4))
        except DaemonError as error:
            return added, str(error)
    pytest.fail("nothing has run out")


def _check_that_nothing_is_left_but(daemon: Daemon, added: list[DeviceStatus]) -> None:
    there = {name for name in nodes() - daemon.nodes_before if name.startswith("ublkc")}
    assert there == {f"ublkc{each.id}" for each in added}
    assert [each.name for each in daemon.client.devices()] == [each.name for each in added]
    kept = {path.name for path in daemon.run_dir.glob("*.keep")}
    assert kept == {f"memory-{each.name}.keep" for each in added}
    for each in added:
        assert daemon.status(each.name).state == "live"


@pytest.mark.parametrize("descriptors", [40])
def test_an_add_that_finds_no_descriptor_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, descriptors: int
) -> None:
    monkeypatch.setenv("UBLKPOOL_TEST_DESCRIPTORS", str(descriptors))
    with Daemon(name="few", module="support.vm.scarce_daemon").life() as daemon:
        added, reason = _add_until_refused(daemon)
        assert "Too many open files" in reason or "descriptor" in reason, reason
        _check_that_nothing_is_left_but(daemon, added)
        if added:
            daemon.client.delete([added[0].name])
            daemon.add("again", "memory", {"size": "1M"}, depth=4)


def test_an_add_into_a_full_run_directory_leaves_nothing_and_what_is_there_can_be_deleted(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "small"
    run_dir.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k,mode=0700", "none", str(run_dir)], check=True)
    try:
        # An operator's directory, which no other user can enter.
        daemon = Daemon(config='[daemon]\nuser = "root"\n', name="full")
        daemon.run_dir = run_dir
        daemon.client = type(daemon.client)(run_dir)
        try:
            daemon.start()
            added, reason = _add_until_refused(daemon)
            assert added and "No space left" in reason and str(run_dir) in reason, reason
            _check_that_nothing_is_left_but(daemon, added)
            daemon.client.delete([added[0].name])
            daemon.add("again", "memory", {"size": "1M"}, depth=4)
            assert daemon.stop() == 0
            eventually_nothing(lambda: [each for each in nodes() - daemon.nodes_before], "no device is left")
            assert list(run_dir.iterdir()) == []
        finally:
            print(daemon.said())
            daemon.close()
    finally:
        subprocess.run(["umount", str(run_dir)], check=True)
