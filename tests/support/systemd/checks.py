"""Runs in the systemd guest, once per boot: restarts, deaths, mounts, a poweroff, and a record of each.

Run by the Python in the guest's root, with the installed ublkpool.  It writes facts as lines of JSON to a file; the
tests on the host check them.  A step that fails leaves its traceback as its fact, and the next step runs.
"""

import fcntl
import grp
import json
import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from support.systemd.devices import backend_pid, client, device, is_live
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
from support.systemd.stacks import stacks
from support.systemd.user_session import user_comes_back, user_session
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig

FSTAB_MOUNT, HAND_MOUNT = Path("/srv/vol0"), Path("/mnt/hand")
CGROUP = Path("/sys/fs/cgroup/system.slice/ublkpool.service")
BLKRRPART = 0x125F
REUSED = 40
"""A device number that two devices get, one after the other."""
UUID = "6f7d1c52-0d4f-4a53-9d0e-57a1b7a3c001"
METRICS = ("127.0.0.1", 9847)
CONFIG_FILE = Path("/etc/ublkpool/ublkpool.toml")
NO_NETWORK = Path("/root/ublkpool/config/ublkpool-no-network.conf")
DROP_INS = Path("/etc/systemd/system/ublkpool.service.d")


def queue_groups() -> dict[str, str]:
    """The group of each queue's socket."""
    queues = Path("/run/ublkpool/queues")
    return {each.name: grp.getgrgid(each.stat().st_gid).gr_name for each in sorted(queues.iterdir())}


def at_start() -> None:
    """The state after the boot."""
    eventually(lambda: is_live("vol1") and is_live("vol2"), "all devices that can be live are")
    names = [
        "ublkpool.service",
        "ublkpool-backend@vol0.service",
        "ublkpool-backend@vol1.service",
        "srv-vol0.mount",
    ]
    say("units", units(*names))
    required = shell("systemctl", "show", "--value", "-p", "Requires,BindsTo,PartOf,Requisite", *names[:3])
    say("required", str(required["said"]).split())
    say("mounted", FSTAB_MOUNT.is_mount())
    linked("vol0", "vol1", "vol2")
    say("links at start", links())
    say("states", {each.name: each.state for each in client.devices()})


def restarts_under_fio() -> None:
    """Restart the daemon while fio writes, then the backend of another user."""
    with running_fio("fio", fio_in(FSTAB_MOUNT)) as fio:
        restart_both(fio)


def restart_both(fio: "subprocess.Popen[str]") -> None:
    """Begin each restart while fio writes, and wait until fio writes again."""
    writes_go_on("fio has begun")
    daemon, backend = units("ublkpool.service")["ublkpool.service"]["MainPID"], backend_pid("vol0")
    say("daemon restart", shell("systemctl", "restart", "ublkpool"))
    eventually(lambda: is_live("vol0"), "vol0 is live after the daemon's restart")
    say("daemon replaced", units("ublkpool.service")["ublkpool.service"]["MainPID"] != daemon)
    say("backend stayed", backend_pid("vol0") == backend)
    writes_go_on("fio writes after the daemon's restart")
    say("queue groups", queue_groups())
    say("backend restart", shell("systemctl", "restart", "ublkpool-backend@vol0"))
    eventually(lambda: is_live("vol0", not_pid=backend), "a successor of the backend serves vol0")
    writes_go_on("fio writes after the backend's restart")
    say("fio ran through", fio.poll() is None)


def quick_restarts() -> None:
    """Restart more often within 10 s than systemd's default start limit allows."""
    for _ in range(8):
        # SIGKILL, because a daemon that ends cleanly may take longer.
        shell("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "ublkpool")
        shell("systemctl", "restart", "--no-block", "ublkpool")
        time.sleep(0.2)
    eventually(lambda: is_live("vol0") and is_live("vol1"), "the devices serve after quick restarts")
    eventually(is_active, "no restart is under way any more")
    say("after quick restarts", units("ublkpool.service")["ublkpool.service"])


def is_active() -> bool:
    """Whether the daemon's unit is active, and has no job."""
    said = shell("systemctl", "show", "--value", "-p", "ActiveState,Job", "ublkpool")["said"]
    return sorted(str(said).split()) == ["active"]


def out_of_memory() -> None:
    """Let the OOM killer kill one process in the service's cgroup."""
    before = units("ublkpool.service")["ublkpool.service"]
    limit = CGROUP / "memory.max"
    limit.write_text(str(int((CGROUP / "memory.current").read_text()) + (32 << 20)))
    try:
        # Writing 0 moves the writing process.
        hog = f"echo 0 > {CGROUP}/cgroup.procs; echo 1000 > /proc/self/oom_score_adj; exec tail /dev/zero"
        status = subprocess.run(["bash", "-c", hog], stderr=subprocess.DEVNULL).returncode
    finally:
        limit.write_text("max")
    events = dict(line.split() for line in (CGROUP / "memory.events").read_text().splitlines())
    eventually(systemd_saw_the_kill, "systemd notices the kill of a process of the unit")
    say(
        "out of memory",
        {
            "hog": status,
            "kills": events["oom_kill"],
            "before": before,
            "after": units("ublkpool.service")["ublkpool.service"],
        },
    )


def systemd_saw_the_kill() -> bool:
    """Whether systemd has logged it; it has then done what the unit's OOMPolicy says."""
    said = shell("journalctl", "-b", "-o", "cat", "--no-pager", "-u", "ublkpool")["said"]
    return "killed by the OOM killer" in str(said)


def deaths() -> None:
    """Kill processes, so that the journal gets lines of each priority."""
    found = device("vol2")
    assert found is not None and found.backend.pid
    os.kill(found.workers[0].pid, signal.SIGKILL)
    eventually(lambda: (device("vol2") or found).epoch > found.epoch and is_live("vol2"), "vol2 is recovered")
    os.kill(found.backend.pid, signal.SIGKILL)
    eventually(lambda: is_live("vol2", not_pid=found.backend.pid), "vol2 has another backend")


def links() -> dict[str, str]:
    """The nodes to which the links with our devices' names lead, by the links' paths below /dev."""
    found = [*Path("/dev/ublkpool").glob("*"), *Path("/dev/disk/by-id").glob("ublkpool-*")]
    return {str(each.relative_to("/dev")): each.readlink().name for each in sorted(found)}


def linked(*names: str) -> None:
    """Wait until udev, which may be slow, has made the links to these devices or partitions."""
    wanted = {f"{prefix}{name}" for name in names for prefix in ("ublkpool/", "disk/by-id/ublkpool-")}
    eventually(lambda: wanted <= links().keys(), f"links to {', '.join(names)}")


def names() -> None:
    """Devices that get each other's numbers, with partitions and with a udev that does nothing for a while."""
    say("links after deaths", links())
    said = str(shell("udevadm", "info", "--query=property", "/dev/ublkpool/vol0")["said"])
    say("properties", dict(line.split("=", 1) for line in said.splitlines()))
    add("one")
    linked("one")
    say("links of one", links())
    partition_table("/dev/ublkpool/one")
    linked("one-part1")
    say("links of a partition", links())
    say("mkfs", shell("mkfs.ext4", "-q", "-U", UUID, "/dev/ublkpool/one-part1"))
    say("trigger", shell("udevadm", "trigger", "--settle", "/dev/ublkpool/one-part1"))
    by_uuid = Path("/dev/disk/by-uuid") / UUID
    say("by-uuid", by_uuid.readlink().name if by_uuid.is_symlink() else "")
    shell("udevadm", "control", "--stop-exec-queue")
    try:
        client.delete(["one"])
        say("links without udev", links())
        add("two")
    finally:
        shell("udevadm", "control", "--start-exec-queue")
    linked("two")
    say("links of two", links())
    client.delete(["two"])
    say("links after all", links())


def add(name: str) -> None:
    """A device with the reused number, live when this returns."""
    backend = BackendConfig(kind="memory", options={"size": "16M"})
    client.add(DeviceConfig(name=name, id=REUSED, backend=backend))


def partition_table(disk: str) -> None:
    """Give the disk one partition, from 1 MiB to 15 MiB, and have the kernel read it."""
    entry = struct.pack("<B3sB3sII", 0, bytes(3), 0x83, bytes(3), 2048, 28672)
    fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(fd, bytes(446) + entry + bytes(48) + b"\x55\xaa", 0)
        os.fsync(fd)
        fcntl.ioctl(fd, BLKRRPART)
    finally:
        os.close(fd)


def confinement() -> None:
    """What the drop-in leaves to the unit's processes, and that a reload and the metrics' port work under it."""
    found = device("vol2")
    assert found is not None and found.backend.pid
    pids = {"daemon": daemon_pid(), "worker": found.workers[0].pid, "backend": found.backend.pid}
    say("confined", {name: status_of(pid) for name, pid in pids.items()})
    users = {name: pwd.getpwnam(name).pw_uid for name in ("vol2", "ublkpool-worker")}
    say("numbers", {**users, "ublkpool": grp.getgrnam("ublkpool").gr_gid})
    exposed = shell("systemd-analyze", "security", "--no-pager", "--threshold=40", "ublkpool.service")
    say("exposure", {"status": exposed["status"], "said": str(exposed["said"])[-200:]})
    say("reload", shell("systemctl", "reload", "ublkpool"))
    say("scraped", scraped(lambda: socket.create_connection(METRICS)))


def no_network() -> None:
    """Give the unit no network either; what the daemon then starts has none, and what was started before serves on."""
    before = device("vol2")
    assert before is not None and before.backend.pid
    shutil.copy(NO_NETWORK, DROP_INS)
    config = CONFIG_FILE.read_text()
    CONFIG_FILE.write_text(config.replace(f'"{METRICS[0]}:{METRICS[1]}"', '"unix"'))
    shell("systemctl", "daemon-reload")
    say("restart without network", shell("systemctl", "restart", "ublkpool"))
    eventually(lambda: is_live("vol0") and is_live("vol1"), "backends of other units serve on")
    eventually(lambda: is_live("vol2"), "the backend that an earlier daemon started serves on")
    os.kill(before.backend.pid, signal.SIGKILL)
    eventually(lambda: is_live("vol2", not_pid=before.backend.pid), "vol2 has a backend without a network")
    pids = {"daemon": daemon_pid(), "backend": backend_pid("vol2"), "host": os.getpid()}
    say("networks", {name: str(Path(f"/proc/{pid}/ns/net").readlink()) for name, pid in pids.items()})
    say("scraped without network", scraped(metrics_socket))


def daemon_pid() -> int:
    """The daemon's process."""
    return int(units("ublkpool.service")["ublkpool.service"]["MainPID"])


def status_of(pid: int) -> dict[str, str]:
    """What the kernel says of a process: /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def metrics_socket() -> socket.socket:
    """A connection to the exporter's unix socket."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect("/run/ublkpool/metrics.sock")
    except OSError:
        sock.close()
        raise
    return sock


def scraped(connect: Callable[[], socket.socket]) -> list[str]:
    """The metrics that the exporter serves there."""
    text = ""

    def is_served() -> bool:
        nonlocal text
        with suppress(OSError), connect() as sock, sock.makefile("rb") as answer:
            sock.settimeout(60)
            sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            text = answer.read().decode()
        return "\n" in text

    eventually(is_served, "the exporter answers")
    return [line for line in text.splitlines() if not line.startswith("#")]


def journal() -> None:
    """All log lines of the daemon and the backends in this boot."""
    # journald reads what was sent to it, before it answers.
    shell("journalctl", "--sync")
    said = shell(
        "journalctl", "-b", "-o", "json", "--no-pager", "-u", "ublkpool", "-u", "ublkpool-backend@*"
    )["said"]
    entries = [json.loads(line) for line in str(said).splitlines() if line.startswith("{")]
    say("journal", [(each.get("_COMM"), int(each["PRIORITY"]), each["MESSAGE"]) for each in entries])


def verify() -> None:
    """Check the units with `systemd-analyze verify`."""
    shipped = [str(each) for each in sorted(Path("/etc/systemd/system").glob("ublkpool*.service"))]
    named = [each.replace("@.service", "@vol0.service") for each in shipped]
    say("verify", {"units": named, **shell("systemd-analyze", "verify", "--man=no", *named)})
    say("verified rules", shell("udevadm", "verify", "/etc/udev/rules.d/99-ublkpool.rules"))


def write_dirty(where: Path, seed: int) -> None:
    """Write a file and leave it dirty."""
    write_known(where / f"dirty-{seed}", seed)
    dirty_kib = re.search(r"Dirty: *(\d+)", Path("/proc/meminfo").read_text())
    say(f"dirty KiB {where}", int(dirty_kib[1]) if dirty_kib else 0)


def stop_writeback() -> None:
    """Keep dirty pages from being written back until a sync."""
    for name, value in {"writeback": 0, "expire": 60000}.items():
        Path(f"/proc/sys/vm/dirty_{name}_centisecs").write_text(str(value))
    # By default a share of the free memory, which is little here: writeback would begin with the second file.
    for name, size_bytes in {"background_bytes": 256 << 20, "bytes": 512 << 20}.items():
        Path(f"/proc/sys/vm/dirty_{name}").write_text(str(size_bytes))


def time_a_command() -> None:
    """Measure how long one command of ours takes in this guest, as the shutdown runs them."""
    began_s = time.monotonic()
    shell("ublkpool", "list")
    say("seconds of a command", round(time.monotonic() - began_s, 1))


def mount_by_hand() -> None:
    """Mount as an operator does, without a unit."""
    HAND_MOUNT.mkdir(exist_ok=True)
    say("hand mount", shell("mount", "/dev/ublkb1", str(HAND_MOUNT)))


def leave_dirty() -> None:
    """Leave both file systems dirty for the poweroff."""
    mount_by_hand()
    time_a_command()
    stop_writeback()
    write_dirty(FSTAB_MOUNT, 1)
    write_dirty(HAND_MOUNT, 2)


def after_poweroff() -> None:
    """Check what the first boot left."""
    say("fstab data", is_known(FSTAB_MOUNT / "dirty-1", 1))
    say("umount", shell("umount", str(FSTAB_MOUNT)))
    say("fsck vol0", shell("e2fsck", "-fn", "/dev/ublkb0"))
    say("fsck vol1", shell("e2fsck", "-fn", "/dev/ublkb1"))
    mount_by_hand()
    say("hand data", is_known(HAND_MOUNT / "dirty-2", 2))


def leave_without_backend() -> None:
    """Leave both file systems dirty, and one without its backend, for the poweroff."""
    say("mount again", shell("mount", str(FSTAB_MOUNT)))
    time_a_command()
    stop_writeback()
    write_dirty(FSTAB_MOUNT, 3)
    write_dirty(HAND_MOUNT, 4)
    say("backend stop", shell("systemctl", "stop", "ublkpool-backend@vol1"))
    eventually(lambda: not is_live("vol1"), "vol1 has lost its backend")


STEPS: dict[str, tuple[Callable[[], None], ...]] = {
    "first": (
        at_start,
        restarts_under_fio,
        quick_restarts,
        out_of_memory,
        deaths,
        confinement,
        no_network,
        names,
        stacks,
        user_session,
        journal,
        verify,
        leave_dirty,
    ),
    "second": (at_start, user_comes_back, after_poweroff, leave_without_backend),
}
IN_ONE_GUEST = (confinement, no_network, names, stacks, user_session, user_comes_back)
"""Steps that run only if they are named."""


def main(boot: str, *named: str) -> None:
    """Run all steps of one boot."""
    run_steps(step for step in STEPS[boot] if step not in IN_ONE_GUEST or step.__name__ in named)


if __name__ == "__main__":
    main(*sys.argv[1:])
