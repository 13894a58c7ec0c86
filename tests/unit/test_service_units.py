"""The shipped units: servers of disks outlive the shutdown's stops, and the shutdown's messages get enough time."""

from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[2] / "config"
UMOUNT_PATIENCE_S = 90
"""systemd's DefaultTimeoutStopSec, for which it waits for an umount."""
LEADS_A_STOP_ON = {
    *("Requires", "Requisite", "BindsTo", "PartOf", "RequiresMountsFor", "StopPropagatedFrom"),
    *("StateDirectory", "CacheDirectory", "LogsDirectory"),
}
"""Settings with which a stop of another unit (such as a mount of /var) stops this one."""


def settings(unit: str) -> dict[str, str]:
    lines = [line.strip() for line in (CONFIG / unit).read_text().splitlines()]
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


@pytest.mark.parametrize("unit", ["ublkpool.service", "ublkpool-backend@.service"])
def test_no_stop_of_another_unit_stops_a_server_of_disks(unit: str) -> None:
    found = settings(unit)
    assert found["DefaultDependencies"] == "no"
    assert LEADS_A_STOP_ON & found.keys() == set()


def test_the_shutdown_message_has_as_long_as_an_umount() -> None:
    assert int(settings("ublkpool-shutdown.service")["TimeoutStartSec"]) >= UMOUNT_PATIENCE_S
