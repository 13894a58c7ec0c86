"""The daemon of an ordinary user, run by the user's own systemd, with the rules for users read by the machine's udev.

Runs in the systemd guest, as a step of each boot.  Root and the user do what docs/OPERATIONS.md says.
"""

import grp
import pwd
import shutil
import stat
from pathlib import Path
from typing import Any

from support.systemd.devices import device
from support.systemd.facts import eventually, running_fio, say, shell, units, write_known, writes_go_on
from ublkpool.daemon.admin.client import Client
from ublkpool.daemon.status import DeviceStatus

USER, STRANGER, GROUP = "alice", "mallory", "ublk"
NAME = "vol"
CHECKOUT = Path("/root/ublkpool/config")
RULES = Path("/etc/udev/rules.d/99-ublkpool.users.rules")
PACKAGE_S_PROGRAM, PROGRAM = "/usr/bin/ublkpool", "/usr/local/bin/ublkpool"
UNIT = "ublkpool.service"
HOME = Path("/home") / USER
CONFIG, KNOWN = HOME / ".config/ublkpool/ublkpool.toml", HOME / "known"
DEVICE = f"""\
[[device]]
name = "{NAME}"

[device.backend]
kind = "file"
path = "{HOME}/{NAME}.img"
size = "16M"
"""
# A user's systemd has a limit of its own for the start of a unit, which a busy machine exceeds.
PATIENT = "[Manager]\nDefaultTimeoutStartSec=1200\n"
SEED = 7


def user_session() -> None:
    """Let a user serve disks, and have the user serve one; leave it to the poweroff."""
    let_user_serve()
    start_manager()
    enable()
    restart_under_fio()
    leave_known_data()


def user_comes_back() -> None:
    """What the next boot has started by itself."""
    eventually(is_served, "the user's daemon serves the user's disk after the boot")
    say("user's unit after boot", user_unit())
    say("user's nodes after boot", nodes(served()))
    say("user's data", as_user(USER, "cmp", f"--bytes={KNOWN.stat().st_size}", str(KNOWN), disk()))


def let_user_serve() -> None:
    """Install rules and group, as root does; devices that are there already keep their owner."""
    for name in (USER, STRANGER):
        shell("useradd", "--create-home", name)
    text = (CHECKOUT / RULES.name).read_text()
    RULES.write_text(text.replace(PACKAGE_S_PROGRAM, PROGRAM))
    shell("groupadd", "--system", GROUP)
    shell("usermod", "-aG", GROUP, USER)
    say("users' rules", shell("udevadm", "verify", str(RULES)))
    shell("udevadm", "control", "--reload")
    shell("udevadm", "trigger", "--settle", "--name-match=ublk-control")
    say("control node", owner(Path("/dev/ublk-control")))
    roots = device("vol2")
    assert roots is not None
    before = nodes(roots)
    shell("udevadm", "trigger", "--settle", *(f"--name-match={name}" for name in before))
    say("root's nodes", {"before": before, "after": nodes(roots)})


def start_manager() -> None:
    """Have the user's systemd run without a login."""
    patient = Path("/etc/systemd/user.conf.d/patient.conf")
    patient.parent.mkdir(parents=True, exist_ok=True)
    patient.write_text(PATIENT)
    say("linger", shell("loginctl", "enable-linger", USER))
    eventually((runtime() / "systemd/private").exists, "the user's systemd runs")


def enable() -> None:
    """Install and start the user's unit, and add a device to its config, as the user does."""
    source = Path("/run/ublkpool.service.user")
    shutil.copy(CHECKOUT / source.name, source)
    source.chmod(0o644)
    target = HOME / ".config/systemd/user" / UNIT
    as_user(USER, "install", "-D", "-m", "644", str(source), str(target))
    as_user(USER, "systemctl", "--user", "daemon-reload")
    say("user's enable", as_user(USER, "systemctl", "--user", "enable", "--now", UNIT))
    say("user's unit", user_unit())
    say("user's first config", CONFIG.read_text())
    CONFIG.write_text(DEVICE)
    say("user's reload", as_user(USER, "systemctl", "--user", "reload", UNIT))
    eventually(is_served, "the user's daemon serves the device that a reload has added")
    say("user's nodes", nodes(served()))
    say("stranger", as_user(STRANGER, "dd", f"if={disk()}", "of=/dev/null", "count=1"))


def restart_under_fio() -> None:
    """Restart the user's daemon while the user writes to the disk."""
    fio = (
        *("fio", "--name=check", f"--filename={disk()}", "--ioengine=libaio", "--direct=1", "--size=8M"),
        *("--rw=randwrite", "--bs=4k", "--iodepth=4", "--rate=100k", "--time_based", "--runtime=3600"),
        *("--verify=crc32c", "--verify_backlog=16", "--verify_state_save=0", "--output-format=json"),
        # Only root may flush its cache, which direct I/O does not need.
        "--invalidate=0",
    )
    kernels_name = Path(disk()).name
    with running_fio("user's fio", command_of(USER, *fio)) as writer:
        writes_go_on("the user's fio has begun", kernels_name)
        before = processes()
        say("user's restart", as_user(USER, "systemctl", "--user", "restart", UNIT))
        eventually(is_served, "the user's disk is served after the restart")
        writes_go_on("the user's fio writes after the restart", kernels_name)
        say("user's processes", {"before": before, "after": processes()})
        say("user's fio ran through", writer.poll() is None)


def leave_known_data() -> None:
    """Write what the next boot compares, down to the store."""
    write_known(KNOWN, SEED)
    KNOWN.chmod(0o644)
    say(
        "user's copy",
        as_user(USER, "dd", f"if={KNOWN}", f"of={disk()}", "bs=1M", "conv=fsync", "status=none"),
    )


def command_of(name: str, *command: str) -> tuple[str, ...]:
    """The command as this user, as after a login."""
    as_this = ("setpriv", f"--reuid={name}", f"--regid={name}", "--init-groups", "--reset-env")
    # systemctl waits 25 s for an answer.
    environment = ("env", f"XDG_RUNTIME_DIR={runtime(name)}", "SYSTEMD_BUS_TIMEOUT=600s")
    return (*as_this, *environment, *command)


def as_user(name: str, *command: str) -> dict[str, Any]:
    """Run a command as this user; its status and output."""
    return shell(*command_of(name, *command))


def runtime(name: str = USER) -> Path:
    """The user's run-time directory."""
    return Path(f"/run/user/{pwd.getpwnam(name).pw_uid}")


def user_unit() -> dict[str, str]:
    """The properties of the user's unit."""
    return units(UNIT, command=lambda systemctl, *words: as_user(USER, systemctl, "--user", *words))[UNIT]


def found() -> DeviceStatus | None:
    """The user's device; None while the user's daemon does not answer or has none."""
    return device(NAME, Client(runtime() / "ublkpool"))


def served() -> DeviceStatus:
    """The user's device, which must be there."""
    status = found()
    assert status is not None
    return status


def is_served() -> bool:
    """Whether the user's device is live, with a backend."""
    status = found()
    return status is not None and status.state == "live" and status.backend.attached


def disk() -> str:
    """The path of the user's disk."""
    path = served().path
    assert path is not None
    return path


def processes() -> dict[str, Any]:
    """What serves the user's device."""
    status = served()
    return {
        "daemon": user_unit()["MainPID"],
        "workers": [each.pid for each in status.workers],
        "backend": status.backend.pid,
    }


def nodes(status: DeviceStatus) -> dict[str, str]:
    """Both nodes of a device with their owners."""
    assert status.path is not None
    paths = [Path(status.path), Path(status.path.replace("ublkb", "ublkc"))]
    return {str(each): owner(each) for each in paths}


def owner(node: Path) -> str:
    """Who may open it: user, group and mode."""
    about = node.stat()
    names = pwd.getpwuid(about.st_uid).pw_name, grp.getgrgid(about.st_gid).gr_name
    return f"{names[0]} {names[1]} {stat.S_IMODE(about.st_mode):o}"
