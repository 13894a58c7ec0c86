"""The machine that the systemd tests boot: units, users, backing files, fstab, and the script that a boot runs.

Owns the root's content besides the product; `checks.py` runs in it.
"""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import prometheus_client

from support.systemd.guest import Boot, boot
from support.systemd.root import inside

BOOT_TIMEOUT_S = 2400
REPORT_LINES = 400
CHECK = "root/check"
INSIDE = ("checks.py", "facts.py", "stacks.py")
"""The modules of this folder that run in the guest."""
CONFIG = """\
[daemon]
group = "ublkpool"

[metrics]
listen = "127.0.0.1:9847"

# Its backend is of another user, its file system is in fstab.
[[device]]
name = "vol0"
id = 0

# Its backend is root's, its file system is mounted by hand.
[[device]]
name = "vol1"
id = 1

# The daemon runs its backend, as a user of its own.
[[device]]
name = "vol2"
id = 2

[device.backend]
kind = "file"
path = "/var/lib/vol2/vol2.img"
size = "64M"
user = "vol2"

# Its backend never ends opening.
[[device]]
name = "stuck"
id = 3
size = "64M"

[device.backend]
kind = "/root/stuck.py"
"""
STUCK = """\
import time


def open() -> None:
    time.sleep(100000)


def get_size() -> int:
    return 64 << 20


def pread(buf: memoryview, offset: int) -> None:
    raise OSError("it was never opened")
"""
# The timeout counts from the beginning of the boot; in a guest on a busy machine the daemon takes minutes to start.
FSTAB = "/dev/ublkpool/vol0 /srv/vol0 ext4 _netdev,x-systemd.device-timeout=600 0 0\n"
# At each start systemd logs which of our processes it finds, and on the console repeatedly what it waits for.
_LEFT_OVER = re.compile(r"Found left-over process|This usually indicates unclean termination")
_PROGRESS = re.compile(r"\] (?:\(\d+ of \d+\) )?Job \S+ running \(")
CHECK_UNIT = """\
[Unit]
Description=The script of this boot
After=multi-user.target

[Service]
Type=oneshot
WorkingDirectory=/root/check
ExecStart=/opt/ublkpool/bin/python -m support.systemd.checks {script}
ExecStopPost=/bin/systemctl --no-block poweroff
TimeoutStartSec=infinity
StandardOutput=journal+console
StandardError=journal+console
"""
CHECK_TARGET = """\
[Unit]
Description=Everything, and then the script
Requires=multi-user.target
After=multi-user.target
Wants=check.service
AllowIsolate=yes
"""


def prepare(root: Path) -> None:
    """Install units, users and files into a root that has the product.  Raises `CacheError`."""
    write(root / "etc/ublkpool/ublkpool.toml", CONFIG)
    write(root / "root/stuck.py", STUCK)
    write(root / "etc/fstab", FSTAB)
    for name in ("vol0", "vol1"):
        write(
            root / f"etc/ublkpool/backends/{name}.conf", f"KIND=file\nOPTIONS=path=/var/lib/{name}/disk.img\n"
        )
    # Of Python alone: the same files serve the guest's Python.
    (packages,) = (root / "opt/ublkpool/lib").glob("python*/site-packages")
    for each in (h11, prometheus_client):
        source = Path(str(each.__file__)).parent
        shutil.copytree(source, packages / source.name)
    user = "[Service]\nUser=vol0\nSupplementaryGroups=ublkpool\n"
    write(root / "etc/systemd/system/ublkpool-backend@vol0.service.d/user.conf", user)
    write(root / "etc/systemd/system/check.target", CHECK_TARGET)
    inside(
        root,
        "useradd --system --groups ublkpool vol0",
        # The daemon itself makes its backends members of the group.
        "useradd --system vol2",
        "mkdir -p /srv/vol0 /var/lib/vol0 /var/lib/vol1 /var/lib/vol2",
        "for each in vol0 vol1; do truncate -s 96M /var/lib/$each/disk.img; done",
        # With lazy initialization the kernel writes to the disk on its own, which would spoil the count of writes.
        "for each in vol0 vol1; do mkfs.ext4 -q -E lazy_itable_init=0 /var/lib/$each/disk.img; done",
        "chown -R vol0 /var/lib/vol0",
        "chown vol2 /var/lib/vol2",
        "systemctl --quiet enable ublkpool ublkpool-backend@vol0 ublkpool-backend@vol1 2>&1",
        "ln -sf /etc/systemd/system/check.target /etc/systemd/system/default.target",
    )


def write(path: Path, text: str) -> None:
    """Write a file and make the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@dataclass(frozen=True)
class Seen:
    """One boot, as seen from the guest and from the host."""

    boot: Boot
    facts: dict[str, Any]
    log: str

    def fact(self, name: str) -> Any:
        """A fact that the script wrote.  Raises `LookupError` with all known facts if it is missing."""
        if name not in self.facts:
            raise LookupError(f"nothing was seen of {name!r}:\n{self.report()}")
        return self.facts[name]

    def report(self) -> str:
        """For a reader of a failed test."""
        log = [line for line in self.log.splitlines() if not _LEFT_OVER.search(line)]
        console = [line for line in self.boot.console.splitlines() if not _PROGRESS.search(line)]
        facts = "\n".join(
            f"{name}: {json.dumps(value)[:2000]}" for name, value in self.facts.items() if name != "journal"
        )
        shown = {"facts": [facts], "journal": log[-REPORT_LINES:], "console": console[-REPORT_LINES:]}
        return "\n".join(line for title, lines in shown.items() for line in (f"--- {title}", *lines))


def run_boot(root: Path, kernel: str, *script: str) -> Seen:
    """Boot the root, run the script with these arguments, and collect the facts."""
    check = root / CHECK
    modules = check / "support/systemd"
    modules.mkdir(parents=True, exist_ok=True)
    for name in INSIDE:
        shutil.copy(Path(__file__).with_name(name), modules)
    facts = check / "facts"
    facts.unlink(missing_ok=True)
    # One boot only, because a journal of several has no current boot when it is read from the host.
    shutil.rmtree(root / "var/log/journal", ignore_errors=True)
    (root / "var/log/journal").mkdir()
    write(root / "etc/systemd/system/check.service", CHECK_UNIT.format(script=shlex.join(script)))
    seen = boot(root, kernel, timeout_s=BOOT_TIMEOUT_S)
    lines = facts.read_text().splitlines() if facts.exists() else []
    found = {each["fact"]: each["value"] for each in map(json.loads, lines)}
    return Seen(seen, found, read_journal(root))


def read_journal(root: Path) -> str:
    """The lines of our units in the last boot's journal, and all lines of priority warning or worse."""
    log = root / CHECK / "log"
    read = "journalctl --no-pager -o short-monotonic"
    ours = "-u 'ublkpool*' -u check -u 'srv-*' -u 'mnt-*'"
    inside(root, f"{{ {read} {ours}; {read} -p warning; }} > {shlex.quote('/' + CHECK)}/log 2>&1 || true")
    return log.read_text(errors="replace")
