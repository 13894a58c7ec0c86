"""Limits: of the daemon that runs, else of this shell; of huge pages; of the driver's devices."""

import re

import msgspec

from ublkpool.daemon.doctor.finding import Finding
from ublkpool.daemon.doctor.release import Release
from ublkpool.daemon.doctor.system import DEVICES, System

CHECK = "limits"
MEMLOCK_BYTES_MIN = 64 << 20
"""The pools of about eight queues of the default depth."""
FILES_MIN = 4096
CAP_IPC_LOCK = 14
_UNLIMITED = "unlimited"
_LIMIT = re.compile(r"^(Max locked memory|Max open files) +(\S+) +(\S+)", re.MULTILINE)
_CAPABILITIES = re.compile(r"^CapEff:\s*([0-9a-f]+)", re.MULTILINE)
_SHMEM = "sys/kernel/mm/transparent_hugepage/shmem_enabled"
TOTAL_UNTIL = (6, 15, 0)
"""`ublks_max` counts every device before this kernel, and only devices of ordinary users from it on."""


class Limited(msgspec.Struct, frozen=True):
    """A process; its limits are in /proc/PID/limits."""

    pid: int
    who: str


def limit_findings(system: System, kernel: Release | None, limited: Limited) -> list[Finding]:
    """Locked memory, open files, huge pages and the number of ublk devices."""
    return [*_process_findings(system, limited), _huge_pages(system), *_devices(system, kernel)]


def _process_findings(system: System, limited: Limited) -> list[Finding]:
    text = system.text(f"proc/{limited.pid}/limits")
    hard = {name: hard for name, _, hard in _LIMIT.findall(text)}
    if len(hard) < 2:
        says = f"the limits of {limited.who} cannot be read"
        return [Finding(CHECK, "warn", says, "sudo ublkpool doctor")]
    capabilities = _CAPABILITIES.search(system.text(f"proc/{limited.pid}/status"))
    may_lock = capabilities is not None and bool(int(capabilities[1], 16) >> CAP_IPC_LOCK & 1)
    return [_memlock(hard["Max locked memory"], limited, may_lock), _files(hard["Max open files"], limited)]


def _memlock(limit: str, limited: Limited, may_lock: bool) -> Finding:
    if may_lock:
        return Finding(CHECK, "ok", f"{limited.who} may lock any amount of memory (CAP_IPC_LOCK)")
    if _is_below(limit, MEMLOCK_BYTES_MIN):
        says = f"{limited.who} may lock {int(limit) >> 10} KiB of memory (RLIMIT_MEMLOCK), and pools are locked whole"
        return Finding(CHECK, "warn", says, "LimitMEMLOCK=infinity in its unit, or ulimit -l unlimited")
    return Finding(CHECK, "ok", f"{limited.who} may lock {_amount(limit, 'bytes')} of memory")


def _files(limit: str, limited: Limited) -> Finding:
    if _is_below(limit, FILES_MIN):
        says = f"{limited.who} may have {limit} files open (RLIMIT_NOFILE, the hard limit): enough for few devices"
        return Finding(CHECK, "warn", says, "LimitNOFILE=65536 in its unit, or ulimit -Hn 65536")
    return Finding(CHECK, "ok", f"{limited.who} may have {_amount(limit, 'files')} open")


def _is_below(limit: str, least: int) -> bool:
    return limit.isdecimal() and int(limit) < least


def _amount(limit: str, unit: str) -> str:
    return f"any number of {unit}" if limit == _UNLIMITED else f"{limit} {unit}"


def _huge_pages(system: System) -> Finding:
    setting = system.text(_SHMEM)
    if not setting:
        says = "this kernel has no transparent huge pages: pools stay in small pages"
        return Finding(CHECK, "warn", says, "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
    if "[deny]" in setting:
        says = f"huge pages of shared memory are denied (/{_SHMEM}): pools stay in small pages"
        return Finding(CHECK, "warn", says, f"echo never > /{_SHMEM}; ublkpool asks for its pools alone")
    return Finding(CHECK, "ok", "pools may be in huge pages; none have to be reserved")


def _devices(system: System, kernel: Release | None) -> list[Finding]:
    most = system.number("sys/module/ublk_drv/parameters/ublks_max")
    if most is None:
        return []
    count = len(system.names(DEVICES))
    if kernel is not None and kernel.version >= TOTAL_UNTIL:
        says = f"the driver has {count} devices; ublks_max = {most} is for devices of ordinary users"
        return [Finding(CHECK, "ok", says)]
    says = f"the driver has {count} devices of at most {most} (ublks_max)"
    way_out = f"echo {4 * most} > /sys/module/ublk_drv/parameters/ublks_max"
    if count >= most:
        return [Finding(CHECK, "fail", f"{says}: it refuses the next", way_out)]
    if 4 * count >= 3 * most:
        return [Finding(CHECK, "warn", f"{says}: few are left", way_out)]
    return [Finding(CHECK, "ok", says)]
