"""Boots of the systemd guest in which a script runs: how it gets into the root, and what a boot has shown.

Owns the root's check.target and the folder of the script; what the script finds is the scene's, see `scene.py`.
"""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.systemd.guest import Boot, boot
from support.systemd.root import inside

BOOT_TIMEOUT_S = 2400
REPORT_LINES = 400
CHECK = "root/check"
SUPPORT = Path(__file__).parents[1]
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
# systemctl waits 25 s for an answer, and a guest on a busy machine may need longer to reload its units.
Environment=SYSTEMD_BUS_TIMEOUT=600s
ExecStart={python} -m {module} {arguments}
ExecStopPost=/bin/systemctl --no-block poweroff
TimeoutStartSec=infinity
StandardOutput=journal+console
StandardError=journal+console
"""
# A Python that starts takes longer than systemd's 90 s on a busy machine, and so do some of systemd's own units.
START_LIMIT_S = 1200
MANAGER = f"[Manager]\nDefaultTimeoutStartSec={START_LIMIT_S}\n"
PATIENT = f"[Service]\nTimeoutStartSec={START_LIMIT_S}\n"
UNITS = "usr/lib/systemd/system"
SHUTDOWN = ("ublkpool-shutdown.service", "ublkpool-shutdown-final.service")
"""Our units whose limits a guest on a busy machine exceeds; they need not be there yet."""
_SHORT_LIMIT = re.compile(r"^Timeout(?:Start)?Sec=(?!infinity|0\b)", re.MULTILINE)
CHECK_TARGET = """\
[Unit]
Description=Everything, and then the script
Requires=multi-user.target
After=multi-user.target
Wants=check.service
AllowIsolate=yes
"""


@dataclass(frozen=True)
class Script:
    """A module of `support` that runs in the guest, by which Python, and the files of all modules that it needs."""

    module: str
    python: str
    files: tuple[str, ...]


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


def start_with_script(root: Path) -> None:
    """Have each boot of the root run a script, after all units have started, and then power off."""
    write(root / "etc/systemd/system/check.target", CHECK_TARGET)
    write(root / "etc/systemd/system.conf.d/patient.conf", MANAGER)
    for unit in (*limited_units(root), *SHUTDOWN):
        write(root / f"etc/systemd/system/{unit}.d/patient.conf", PATIENT)
    default = root / "etc/systemd/system/default.target"
    default.unlink(missing_ok=True)
    default.symlink_to("/etc/systemd/system/check.target")


def limited_units(root: Path) -> list[str]:
    """Debian's services that limit their start themselves, which the manager's default does not change."""
    services = (root / UNITS).glob("systemd-*.service")
    return sorted(each.name for each in services if _SHORT_LIMIT.search(each.read_text()))


def run_boot(
    root: Path, kernel: str, script: Script, *arguments: str, timeout_s: float = BOOT_TIMEOUT_S
) -> Seen:
    """Boot the root, run the script with these arguments, and collect the facts."""
    check = root / CHECK
    for name in script.files:
        (check / "support" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SUPPORT / name, check / "support" / name)
    facts = check / "facts"
    facts.unlink(missing_ok=True)
    # One boot only, because a journal of several has no current boot when it is read from the host.
    shutil.rmtree(root / "var/log/journal", ignore_errors=True)
    (root / "var/log/journal").mkdir()
    unit = CHECK_UNIT.format(python=script.python, module=script.module, arguments=shlex.join(arguments))
    write(root / "etc/systemd/system/check.service", unit)
    seen = boot(root, kernel, timeout_s=timeout_s)
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
