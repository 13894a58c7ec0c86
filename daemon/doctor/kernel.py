"""The kernel, its ublk driver with the control device, and whether io_uring is allowed."""

import stat

from ublkpool.daemon.doctor.finding import Finding
from ublkpool.daemon.doctor.release import Release
from ublkpool.daemon.doctor.system import RULES_DIRECTORIES, System

TESTED_SINCE = (6, 12, 0)
MODULE = "ublk_drv"
CONTROL = "dev/ublk-control"
USERS_RULES = "99-ublkpool.users.rules"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def kernel_findings(system: System, kernel: Release | None) -> list[Finding]:
    """The version of the kernel."""
    if kernel is None:
        says = f"the version of this kernel is not understood: {system.release}"
        return [
            Finding(
                "kernel", "warn", says, "compare it with Linux 6.12, the oldest that ublkpool is tested on"
            )
        ]
    if kernel.version < TESTED_SINCE:
        says = f"Linux {kernel.text} is older than 6.12, the oldest that ublkpool is tested on"
        return [Finding("kernel", "warn", says, "boot Linux 6.12 or newer")]
    return [Finding("kernel", "ok", f"Linux {kernel.text}")]


def driver_findings(system: System) -> list[Finding]:
    """Whether the driver is loaded or can be, and what its control device lets in."""
    if (system.root / "sys/module" / MODULE).exists():
        return [Finding("driver", "ok", f"{MODULE} is loaded"), *_control(system)]
    where = f"lib/modules/{system.release}"
    if _is_module(system, where):
        says = f"{MODULE} is not loaded, and this kernel has it as a module"
        return [
            Finding(
                "driver", "warn", says, f"modprobe {MODULE}; config/ublkpool.service does it before its start"
            )
        ]
    if not system.names(where):
        says = f"{MODULE} is not loaded, and /{where} has no modules, so it cannot be loaded from here"
        return [
            Finding(
                "driver", "fail", says, f"modprobe {MODULE} outside of this container, or install the modules"
            )
        ]
    says = f"this kernel has no ublk driver: /{where} has no {MODULE}"
    way_out = "install linux-modules-extra (Ubuntu), or a kernel with CONFIG_BLK_DEV_UBLK"
    return [Finding("driver", "fail", says, way_out)]


def _is_module(system: System, where: str) -> bool:
    lists = (f"{where}/modules.dep", f"{where}/modules.builtin")
    return any(f"/{MODULE}.ko" in system.text(each) for each in lists)


def _control(system: System) -> list[Finding]:
    path = system.root / CONTROL
    try:
        about = path.stat()
    except OSError as error:
        says = f"{MODULE} is loaded, and /{CONTROL} is not there: {error.strerror}"
        way_out = "in a container, pass the device on; elsewhere: udevadm trigger --name-match=ublk-control"
        return [Finding("driver", "fail", says, way_out)]
    return [control_finding(about.st_mode, _lets_users_in(system))]


def _lets_users_in(system: System) -> bool:
    return any(USERS_RULES in system.names(each) for each in RULES_DIRECTORIES)


def control_finding(mode: int, lets_users_in: bool = False) -> Finding:
    """The control device with this mode (`st_mode`), where the rules for ordinary users are installed or not."""
    if not stat.S_ISCHR(mode):
        says = f"/{CONTROL} is no character device"
        return Finding("driver", "fail", says, f"remove it, then: modprobe -r {MODULE}; modprobe {MODULE}")
    if lets_users_in and not mode & stat.S_IRWXO:
        says = f"/{CONTROL} is there, for root and the group of {USERS_RULES}, whose members serve disks of their own"
        return Finding("driver", "ok", says)
    if mode & _OTHERS:
        says = f"/{CONTROL} may be opened by other users than its owner (mode {stat.S_IMODE(mode):04o})"
        return Finding("driver", "warn", says, "install config/99-ublkpool.rules, then: udevadm trigger")
    return Finding("driver", "ok", f"/{CONTROL} is there, for its owner alone")


def io_uring_findings(system: System) -> list[Finding]:
    """Whether `kernel.io_uring_disabled` lets the daemon and its backends use io_uring."""
    disabled = system.text("proc/sys/kernel/io_uring_disabled")
    check = "io_uring"
    if disabled == "2":
        says = "io_uring is forbidden on this machine (kernel.io_uring_disabled = 2), and ublk needs it"
        return [
            Finding(check, "fail", says, "sysctl kernel.io_uring_disabled=0, or 1 for root and one group")
        ]
    if disabled == "1":
        group = system.text("proc/sys/kernel/io_uring_group")
        says = f"io_uring is for root and the group with number {group or 'unknown'} (kernel.io_uring_disabled = 1)"
        if system.is_root:
            return [Finding(check, "ok", says)]
        return [Finding(check, "warn", says, "run the daemon as root or as a member of that group")]
    return [Finding(check, "ok", "io_uring is allowed")]
