"""The shipped units: servers of disks outlive the shutdown's stops, messages get enough time, few rights are left."""

import os
import re
import shutil
import subprocess
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
EXPOSURE_MAX = 4.0
DROP_INS = ("ublkpool-hardening.conf", "ublkpool-no-network.conf")
CAPABILITIES_MAX = 10


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


def exposure(root: Path, *drop_ins: str) -> float:
    """What `systemd-analyze security` says of the daemon's unit with these drop-ins, 0 to 10."""
    units = root / "etc/systemd/system"
    below = units / "ublkpool.service.d"
    below.mkdir(parents=True)
    shutil.copy(CONFIG / "ublkpool.service", units)
    for each in drop_ins:
        shutil.copy(CONFIG / each, below)
    command = [
        "systemd-analyze",
        "security",
        "--offline=yes",
        f"--root={root}",
        "--no-pager",
        "ublkpool.service",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(said.rpartition("exposure level for ublkpool.service: ")[2].split()[0])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_drop_ins_leave_the_daemon_little_exposed(tmp_path: Path) -> None:
    bare = exposure(tmp_path / "bare")
    hardened = exposure(tmp_path / "hardened", *DROP_INS[:1])
    assert hardened <= EXPOSURE_MAX < bare
    assert exposure(tmp_path / "both", *DROP_INS) < hardened


def test_the_drop_in_knows_every_reason_for_a_capability_it_leaves() -> None:
    text = (CONFIG / DROP_INS[0]).read_text()
    lines = text.splitlines()
    values = [line.partition("=")[2] for line in lines if line.startswith("CapabilityBoundingSet=")]
    left = [each.removeprefix("CAP_") for each in " ".join(values).split()]
    comments = " ".join(line for line in lines if line.startswith("#"))
    assert len(left) == len(set(left)) <= CAPABILITIES_MAX
    assert [each for each in left if each not in comments.replace(",", " ").replace(":", " ").split()] == []


def test_a_users_unit_is_one_that_the_users_systemd_takes(tmp_path: Path) -> None:
    unit = tmp_path / "ublkpool.service"
    text = (CONFIG / "ublkpool.service.user").read_text()
    # The command need not be installed here.
    unit.write_text(text.replace("=ublkpool ", "=/bin/true "))
    command = ["systemd-analyze", "verify", "--user", "--man=no", str(unit)]
    environment = {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_stop_of_a_users_unit_leaves_what_serves_the_disks() -> None:
    found = settings("ublkpool.service.user")
    assert found["ExecStart"].endswith("--on-stop leave")
    assert (found["KillMode"], found["WantedBy"]) == ("process", "default.target")


def test_a_users_unit_has_the_config_that_its_reload_reads_again() -> None:
    found = settings("ublkpool.service.user")
    assert found["ExecReload"] == "ublkpool reload"
    (config,) = re.findall(r"-c (\S+)", found["ExecStart"])
    # It is there at the first start.
    assert found["ConfigurationDirectory"] == "ublkpool"
    assert found["ExecStartPre"] == f"-touch {config}" == "-touch %E/ublkpool/ublkpool.toml"
