"""The command line's contract on a real driver.

Commands run in forks of this process, which saves the start of Python; the commands that a user types first also run as
real processes.
"""

import asyncio
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support.vm.daemon import DEADLINE_S, Daemon, eventually
from support.vm.files import make_file_system, mounted
from support.vm.process import Command, Ran, run_command
from ublkpool.client import AsyncClient, DeviceInUse
from ublkpool.daemon.doctor.daemon import ask_daemon
from ublkpool.daemon.doctor.examination import examine
from ublkpool.daemon.doctor.probes import running_probes, running_system
from ublkpool.daemon.doctor.system import instance_of
from ublkpool.daemon.kernel.device_commands import find_owned
from ublkpool.ublk.abi import feature_names
from ublkpool.ublk.control import get_features

MIB = 1 << 20
NOBODY = 65534
# Of tests about what the commands say.
ON_ONE_KERNEL = pytest.mark.one_kernel("6.12")
LIST_FIELDS = [
    "name",
    "id",
    "path",
    "state",
    "size_bytes",
    "queues",
    "depth",
    "need_get_data",
    "placement",
    "recovery",
    "flags",
    "workers",
    "backend",
]
QUEUE_FIELDS = {
    "queue",
    "requests",
    "bytes",
    "errors",
    "in_flight",
    "buffers_held",
    "buffers_waited",
    "copies",
}
OPERATIONS = ["read", "write", "flush", "discard", "write_zeroes"]


def _succeeded(ran: Ran) -> str:
    assert ran.status == 0 and ran.err == "", ran
    return ran.out


def _complaint(ran: Ran, status: int = 1) -> str:
    """The one line on stderr of a command that failed."""
    assert ran.status == status and ran.out == "", ran
    assert ran.err.startswith("ublkpool: ") and ran.err.count("\n") == 1, ran.err
    return ran.err.removeprefix("ublkpool: ").strip()


def _listed(daemon: Daemon) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(_succeeded(run_command(daemon, "list", "--json")))
    return found


def test_a_device_from_add_to_del(daemon: Daemon) -> None:
    words = ("add", "--queues", "2", "--backend", "memory", "vol", "--", "size=8M")
    path = _succeeded(run_command(daemon, *words)).removesuffix("\n")
    # The printed path can be used at once.
    assert Path(path).is_block_device()
    assert _listed_device(daemon) == {"name": "vol", "path": path}
    _check_stats(daemon)
    assert path in _succeeded(run_command(daemon, "list"))
    assert "vol" in _succeeded(run_command(daemon, "stats"))
    daemon.rest("vol")
    assert _succeeded(run_command(daemon, "del", "vol")) == "vol\n"
    assert _listed(daemon) == []
    assert not Path(path).exists()


def _listed_device(daemon: Daemon) -> dict[str, str]:
    (device,) = _listed(daemon)
    assert list(device)[: len(LIST_FIELDS)] == LIST_FIELDS
    assert device["state"] == "live" and device["path"] == f"/dev/ublkb{device['id']}"
    assert (device["size_bytes"], device["queues"], device["depth"]) == (8 * MIB, 2, 128)
    assert (device["need_get_data"], device["placement"], device["recovery"]) == (True, "pool", "reissue")
    assert {"NEED_GET_DATA", "USER_RECOVERY", "USER_RECOVERY_REISSUE"} <= set(device["flags"])
    assert [set(worker) for worker in device["workers"]] == [{"queue", "pid", "cpu"}] * 2
    assert device["backend"].keys() == {"kind", "pid", "attached"}
    assert device["backend"]["kind"] == "memory" and device["backend"]["attached"] is True
    for pid in (device["backend"]["pid"], *(worker["pid"] for worker in device["workers"])):
        os.kill(pid, 0)
    return {"name": device["name"], "path": device["path"]}


def _check_stats(daemon: Daemon) -> None:
    (stats,) = json.loads(_succeeded(run_command(daemon, "stats", "vol", "--json")))
    assert stats["name"] == "vol" and [queue["queue"] for queue in stats["queues"]] == [0, 1]
    for queue in stats["queues"]:
        assert queue.keys() >= QUEUE_FIELDS
        assert list(queue["requests"]) == list(queue["bytes"]) == OPERATIONS
    assert stats["pool"]["buffer_count"] > 0


def test_features_are_what_the_driver_offers(daemon: Daemon) -> None:
    ran = daemon.command_run("features", "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    offered = get_features()
    assert json.loads(ran.stdout) == {"bits": offered, "flags": list(feature_names(offered))}
    assert _succeeded(run_command(daemon, "features")).split() == list(feature_names(offered))


def test_the_doctor_finds_a_served_device_in_order(daemon: Daemon) -> None:
    system = running_system(daemon.run_dir, daemon.state_dir)
    asked = running_probes()._replace(daemon=partial(ask_daemon, patience_s=DEADLINE_S))
    with daemon.device("vol", "null", size_bytes=MIB) as status:
        assert [each.number for each in find_owned(instance_of(daemon.run_dir))] == [status.id]
        report = asyncio.run(examine(system, asked, 2 * DEADLINE_S))
    found = {(each.check, each.level) for each in report.findings}
    for check in ("driver", "features", "io_uring", "run-directory", "daemon", "leftovers"):
        assert (check, "fail") not in found, report
    assert ("daemon", "ok") in found and ("lost-devices", "ok") in found, report


@ON_ONE_KERNEL
def test_a_machine_that_forbids_io_uring_is_told_how_to_allow_it(daemon: Daemon) -> None:
    setting = Path("/proc/sys/kernel/io_uring_disabled")
    before = setting.read_text()
    setting.write_text("2")
    try:
        ran = [
            run_command(daemon, "features"),
            run_command(daemon, "add", "x", "--size", "1M", "--answers", "worker"),
        ]
    finally:
        setting.write_text(before)
    for each in ran:
        assert "kernel.io_uring_disabled = 2" in _complaint(each)


@ON_ONE_KERNEL
def test_without_the_rights_a_command_says_what_is_missing(daemon: Daemon) -> None:
    denied = _complaint(run_command(daemon, "features", user=NOBODY))
    assert "/dev/ublk-control" in denied and "ermission denied" in denied
    assert "usually with sudo" in _complaint(run_command(daemon, "list", user=NOBODY))


@ON_ONE_KERNEL
def test_a_device_without_a_backend_is_live_when_one_attaches(daemon: Daemon) -> None:
    waiting = Command(daemon, "add", "later", "--size", "4M", "--wait", "600")
    eventually(lambda: len(daemon.client.devices()) == 1, "the device waits")
    assert daemon.status("later").state == "waiting" and daemon.status("later").path is None
    backend = Command(daemon, "backend", "memory", "--device", "later", "size=4M")
    ran = waiting.wait()
    assert _succeeded(ran) == f"{daemon.status('later').path}\n"
    assert Path(ran.out.strip()).is_block_device()
    daemon.delete("later")
    assert backend.wait().status == 0


@ON_ONE_KERNEL
def test_add_does_not_wait_for_a_backend_unless_told_to(daemon: Daemon) -> None:
    ran = run_command(daemon, "add", "idle", "--size", "4M")
    assert (ran.status, ran.out) == (0, "") and "waits for a backend" in ran.err
    assert "still waiting after 0.1 s" in _complaint(
        run_command(daemon, "add", "late", "--size", "4M", "--wait", "0.1")
    )
    assert _succeeded(run_command(daemon, "del", "--all")).split() == ["idle", "late"]


@ON_ONE_KERNEL
def test_what_cannot_be_added_is_refused_in_one_line_and_leaves_nothing(daemon: Daemon) -> None:
    daemon.add("taken", size_bytes=MIB)
    assert "device taken exists already" in _complaint(run_command(daemon, "add", "taken", "--size", "1M"))
    assert "--size" in _complaint(run_command(daemon, "add", "x", "--size", "12x"), 2)
    assert "--queues" in _complaint(run_command(daemon, "add", "x", "--queues", "0"), 2)
    assert "--placement" in _complaint(run_command(daemon, "add", "x", "--placement", "moon"), 2)
    assert "expected KEY=VALUE" in _complaint(run_command(daemon, "add", "x", "--backend", "null", "a"), 2)
    assert "no device 'nobody'" in _complaint(run_command(daemon, "del", "nobody"))
    assert "no device 'nobody'" in _complaint(run_command(daemon, "stats", "nobody"))
    assert "--all" in _complaint(run_command(daemon, "del"), 2)
    assert [each.name for each in daemon.client.devices()] == ["taken"]
    daemon.delete("taken")


CRASHING = {
    "raises.py": ("1 / 0\n", "ZeroDivisionError", 2),
    "exits.py": ("import os\nos._exit(3)\n", "exit status 3", 1),
}


@ON_ONE_KERNEL
def test_a_backend_that_cannot_start_makes_add_fail_with_its_reason(daemon: Daemon) -> None:
    for name, (text, _, _) in CRASHING.items():
        daemon.path(name).write_text(text)
    commands = {
        name: Command(daemon, "add", name[:-3], "--size", "1M", "--backend", str(daemon.path(name)))
        for name in CRASHING
    }
    missing = Command(daemon, "add", "missing", "--backend", "file", "path=/nowhere/disk.img")
    unknown = Command(daemon, "add", "unknown", "--backend", "memroy", "size=1M")
    for name, (_, reason, status) in CRASHING.items():
        assert reason in _complaint(commands[name].wait(), status)
    assert "/nowhere/disk.img" in _complaint(missing.wait(), 2)
    assert "no backend is called 'memroy'" in _complaint(unknown.wait(), 2)
    assert daemon.client.devices() == []


@pytest.mark.one_kernel("6.12")
def test_a_device_number_is_given_once(daemon: Daemon) -> None:
    add = ("add", "--backend", "null", "--size", "1M", "--id", "37")
    with daemon.device("first", "null", size_bytes=MIB, id=37) as status:
        assert status.path == "/dev/ublkb37"
        assert "37 is taken" in _complaint(run_command(daemon, *add, "second"))


@pytest.mark.one_kernel("7.3")
def test_more_queues_than_cpus_are_cut_to_what_the_kernel_gives(daemon: Daemon) -> None:
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().rpartition("-")[2]
    cpus = int(last) + 1
    with daemon.device("wide", "null", size_bytes=MIB, queues=cpus + 3, depth=4) as status:
        assert status.queues == len(status.workers) == cpus
        assert f"{cpus + 3} queues asked for, the kernel gives {cpus}" in daemon.said()


def test_a_recovery_that_this_kernel_does_not_offer_is_refused_by_name(daemon: Daemon) -> None:
    add = ("add", "r", "--size", "1M", "--recovery", "fail", "--backend", "null")
    ran = run_command(daemon, *add)
    if "USER_RECOVERY_FAIL_IO" in feature_names(get_features()):
        assert _succeeded(ran).startswith("/dev/ublkb")
        assert "USER_RECOVERY_FAIL_IO" in daemon.status("r").flags
        daemon.delete("r")
    else:
        assert "does not offer USER_RECOVERY_FAIL_IO" in _complaint(ran)


@pytest.mark.one_kernel("7.3")
def test_a_mounted_device_is_deleted_only_by_force(daemon: Daemon) -> None:
    path = daemon.add("busy", "memory", {"size": "16M"}).path
    assert path is not None
    make_file_system("ext4", path)
    with mounted(path, daemon.path("mnt"), "ro"):
        assert "in use" in _complaint(run_command(daemon, "del", "busy"))
        with pytest.raises(DeviceInUse, match="in use"):
            asyncio.run(AsyncClient(daemon.run_dir).delete("busy"))
        assert daemon.status("busy").state == "live"
        daemon.rest("busy")
        assert _succeeded(run_command(daemon, "del", "--force", "busy")) == "busy\n"


@ON_ONE_KERNEL
@pytest.mark.parametrize("command", [("serve",), ("backend", "null", "--device", "nobody")])
def test_a_second_daemon_and_a_backend_without_a_device_say_why_they_end(
    daemon: Daemon, command: tuple[str, ...]
) -> None:
    reason = _complaint(run_command(daemon, *command))
    assert "another daemon is running here" in reason if command == ("serve",) else "nobody" in reason
    assert daemon.client.devices() == []
