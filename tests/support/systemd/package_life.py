"""The life of the Debian package on a booted machine: installed, mounted by name, restarted, upgraded, removed, purged.

Runs in the systemd guest, by Debian's Python alone, because the package comes and goes meanwhile.  It writes facts; the
tests on the host (`tests/package/test_deb_booted.py`) check them.
"""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from support.listing import Listing, entries
from support.systemd.facts import (
    eventually,
    fio_in,
    is_known,
    run_steps,
    running_fio,
    say,
    shell,
    units,
    write_known,
    writes_go_on,
)

EARLIER, CURRENT = Path("/root/earlier.deb"), Path("/root/current.deb")
FSTAB = Path("/etc/fstab")
REMEMBERED_MAX = 2000
STORES, MOUNT = Path("/srv/stores"), Path("/srv/vol0")
RECORDS = Path("/run/ublkpool/devices")
USER = "backup"
"""A user of each Debian."""
DEVICES = ("vol0", "vol1")
SERVICE, BACKEND = "ublkpool.service", "ublkpool-backend@vol1.service"
OURS = (SERVICE, BACKEND, "ublkpool-shutdown.service", "ublkpool-shutdown-final.service")
CONFIG = f"""
[daemon]
group = "ublkpool"

# The daemon runs its backend, as a user of its own; its file system is in fstab.
[[device]]
name = "vol0"

[device.backend]
kind = "file"
path = "{STORES}/vol0.img"
size = "64M"
user = "{USER}"

# Its backend is a unit.
[[device]]
name = "vol1"
"""
BACKEND_CONFIG = f"KIND=file\nOPTIONS=path={STORES}/vol1.img size=16M\n"
# The timeout counts from the beginning of the boot; in a guest on a busy machine the daemon takes minutes to start.
MOUNTED = f"/dev/ublkpool/vol0 {MOUNT} ext4 _netdev,x-systemd.device-timeout=1800 0 0\n"


def state() -> dict[str, Any]:
    """All that a package may leave on a machine that runs; units that are enabled are among the files."""
    shell("udevadm", "settle")
    return {"files": files(), **running()}


def files() -> Listing:
    """All files of the machine.

    The host's virtiofsd keeps a descriptor for each file that this kernel remembers, and may not have enough for all.
    """
    found: Listing = {}
    for path, about in entries("/"):
        found[path] = about
        if len(found) % REMEMBERED_MAX == 0:
            forget_files()
    forget_files()
    return found


def forget_files() -> None:
    """Have the kernel forget what it knows of files that are not in use."""
    Path("/proc/sys/vm/drop_caches").write_text("2\n")


def running() -> dict[str, list[str]]:
    """What is loaded, runs or is served: units, disks and processes with our names."""
    loaded = shell("systemctl", "list-units", "--all", "--plain", "--no-legend", "--no-pager")
    if loaded["status"] != 0:
        raise OSError(loaded["said"])
    lines = str(loaded["said"]).splitlines()
    return {
        "units": sorted(line for line in lines if "ublk" in line or " failed " in line),
        "disks": sorted(each.name for each in Path("/sys/class/block").iterdir()),
        "queues": sorted(each.name for each in Path("/sys/class/ublk-char").iterdir()),
        "processes": processes(),
    }


def processes() -> list[str]:
    """The command lines of all processes of the package."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(each.read_bytes().replace(b"\0", b" ").decode())
    return sorted(each for each in found if "ublkpool" in each)


def record(name: str) -> dict[str, Any]:
    """The daemon's record of a device, empty without one."""
    try:
        found: dict[str, Any] = json.loads((RECORDS / f"{name}.json").read_text())
    except FileNotFoundError:
        return {}
    return found


def is_served(name: str) -> bool:
    """Whether the device has its link, its workers and a backend."""
    found = record(name)
    return bool(Path("/dev/ublkpool", name).exists() and found.get("live") and found.get("served"))


def are_served() -> bool:
    """Whether both devices are."""
    return all(map(is_served, DEVICES))


def serving() -> dict[str, Any]:
    """Who serves: the daemon, each device's workers and their code, and backends, of which one is a unit's."""
    return {
        "daemon": units(SERVICE)[SERVICE]["MainPID"],
        "workers": {name: [each["process"]["pid"] for each in record(name)["workers"]] for name in DEVICES},
        "code": {name: record(name)["build"] for name in DEVICES},
        "backends": {"vol0": record("vol0")["managed"]["pid"], "vol1": units(BACKEND)[BACKEND]["MainPID"]},
    }


def installed() -> str:
    """The package's version and state, as dpkg knows them."""
    return str(shell("dpkg-query", "-W", "-f", "${Version} ${db:Status-Status}", "ublkpool")["said"])


def disk_of(name: str) -> str:
    """The kernel's name of a disk of ours."""
    return Path("/dev/ublkpool", name).resolve().name


def install() -> None:
    """Install the earlier version on a machine that has never had one."""
    # A package does not unload a driver, which other programs may use.
    shell("modprobe", "ublk_drv")
    say("before", state())
    say("install", shell("dpkg", "-i", str(EARLIER)))
    say("installed", installed())
    say("units after install", units(*OURS))
    say("users' unit", shell("systemctl", "--global", "is-enabled", SERVICE))
    say("running after install", running())


def configure() -> None:
    """Do what the operator does: config, service, file system, fstab."""
    STORES.mkdir()
    shutil.chown(STORES, USER)
    MOUNT.mkdir()
    Path("/etc/ublkpool/ublkpool.toml").write_text(CONFIG)
    Path("/etc/ublkpool/backends/vol1.conf").write_text(BACKEND_CONFIG)
    say("enable", shell("systemctl", "enable", "--now", SERVICE, BACKEND))
    eventually(are_served, "both devices are served")
    # With lazy initialization the kernel writes to the disk on its own, which would spoil the count of writes.
    say("mkfs", shell("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", "/dev/ublkpool/vol0"))
    FSTAB.write_text(MOUNTED)
    shell("systemctl", "daemon-reload")
    say("mount", shell("mount", str(MOUNT)))


def change_under_fio() -> None:
    """Restart the service, then upgrade the package, while fio writes to the mounted file system."""
    with running_fio("fio", fio_in(MOUNT, "64k")) as fio:
        disk = disk_of("vol0")
        writes_go_on("fio has begun", disk)
        restart(disk)
        upgrade(disk)
        say("fio ran through", fio.poll() is None)


def restart(disk: str) -> None:
    """Restart the service, until the next daemon serves both devices."""
    say("before restart", serving())
    say("restart", shell("systemctl", "restart", SERVICE))
    eventually(are_served, "both devices are served after the restart")
    writes_go_on("fio writes after the restart", disk)
    say("after restart", serving())


def upgrade(disk: str) -> None:
    """Install the current version, until its code serves both devices."""
    before = serving()
    say("upgrade", shell("dpkg", "-i", str(CURRENT)))
    say("installed by the upgrade", installed())
    eventually(lambda: has_other_code(before), "workers and backend of the current version serve")
    writes_go_on("fio writes after the upgrade", disk)
    say("after upgrade", serving())
    said = str(shell("ublkpool", "events", "--json")["said"])
    say("events", [json.loads(line) for line in said.splitlines() if line.startswith("{")])


def has_other_code(before: dict[str, Any]) -> bool:
    """Whether both devices are served, by other code, and the daemon has replaced its own backend."""
    if not are_served():
        return False
    now = serving()
    return (
        not now["code"].items() & before["code"].items()
        and now["backends"]["vol0"] != before["backends"]["vol0"]
    )


def leave_data() -> None:
    """Leave a file in the page cache for the poweroff."""
    write_known(MOUNT / "kept", 1)


def come_back() -> None:
    """What the next boot has started and mounted by itself."""
    eventually(are_served, "both devices are served after the boot")
    say("units after boot", units(*OURS, "srv-vol0.mount"))
    say("kept", is_known(MOUNT / "kept", 1))


def remove_in_use() -> None:
    """Try to remove the package while a disk is mounted."""
    say("remove in use", shell("dpkg", "-r", "ublkpool"))
    say("installed after refusal", installed())
    say("units after refusal", units(SERVICE))
    write_known(MOUNT / "later", 2)
    say("sync", shell("sync", "-f", str(MOUNT)))
    say("served after refusal", is_served("vol0") and is_known(MOUNT / "later", 2))


def remove() -> None:
    """Unmount, and remove the package."""
    say("umount", shell("umount", str(MOUNT)))
    FSTAB.write_text("")
    shell("systemctl", "daemon-reload")
    say("remove", shell("dpkg", "-r", "ublkpool"))
    say("installed after remove", installed())
    say("running after remove", running())
    say("config after remove", Path("/etc/ublkpool/ublkpool.toml").read_text() == CONFIG)


def purge() -> None:
    """Purge the package, and delete what is the operator's."""
    say("purge", shell("dpkg", "-P", "ublkpool"))
    say("stores", sorted(each.name for each in STORES.iterdir()))
    shutil.rmtree(STORES)
    MOUNT.rmdir()
    say("after", state())


STEPS: dict[str, tuple[Callable[[], None], ...]] = {
    "first": (install, configure, change_under_fio, leave_data),
    "second": (come_back, remove_in_use, remove, purge),
}

if __name__ == "__main__":
    run_steps(STEPS[sys.argv[1]])
