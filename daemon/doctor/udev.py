"""Whether udev has the rules of ublkpool in force: in its files, and for the disks that are there."""

import re
from contextlib import suppress
from pathlib import Path

from ublkpool.daemon.doctor.finding import Finding, some
from ublkpool.daemon.doctor.system import RULES_DIRECTORIES, System
from ublkpool.daemon.kernel.disk_names import DiskNames

CHECK = "udev"
RULES = "99-ublkpool.rules"
_INSTALL = f"install -m 644 config/{RULES} /etc/udev/rules.d/ && udevadm control --reload && udevadm trigger -s block"
_NOWATCH = re.compile(r'^[^#\n]*"ublkb\*"[^#\n]*"nowatch"', re.MULTILINE)
_NAMES = re.compile(r'^[^#\n]*"ublkb\*"[^#\n]*IMPORT\{file\}="/run/ublkpool-names/', re.MULTILINE)


def udev_findings(system: System) -> list[Finding]:
    """Nothing has to be in force on a machine without udev."""
    if not (system.root / "run/udev/control").exists():
        return [Finding(CHECK, "ok", "no udev runs here")]
    watched = _watched(system)
    if watched:
        says = f"udev watches {some(watched)}: an open of its own just as a disk's server ends would hang"
        way_out = (
            f"install config/{RULES}, then: udevadm control --reload; udevadm trigger --action=change NAME"
        )
        return [Finding(CHECK, "warn", says, way_out)]
    texts = {path: _text(path) for path in _effective(system)}
    where = next((path for path, text in texts.items() if _NOWATCH.search(text)), None)
    if where is None:
        says = "udev has no rule that turns its watch on ublk disks off, with which it opens a disk behind each writer"
        return [Finding(CHECK, "warn", says, _INSTALL)]
    if not any(_NAMES.search(text) for text in texts.values()):
        return [Finding(CHECK, "warn", "udev has no rule that links /dev/ublkpool/NAME to disks", _INSTALL)]
    if unlinked := _unlinked(system):
        says = f"udev has not linked {some(f'/dev/ublkpool/{name} to {disk}' for name, disk in unlinked)}"
        disks = " ".join(f"/dev/{disk}" for _, disk in unlinked)
        return [Finding(CHECK, "warn", says, f"udevadm control --reload; udevadm trigger {disks}")]
    about = f"/{where.relative_to(system.root)} turns the watch on ublk disks off"
    if not system.is_root:
        return [Finding(CHECK, "ok", f"{about}; only root may look whether /dev/ublkpool has their names")]
    return [Finding(CHECK, "ok", f"{about}, and /dev/ublkpool has their names")]


def _unlinked(system: System) -> list[tuple[str, str]]:
    """The disks whose daemon has told udev a name, and which have no link of that name."""
    names = DiskNames(system.root)
    return sorted((name, disk) for name, disk in names.published().items() if names.linked(name) != disk)


def _effective(system: System) -> list[Path]:
    """The rules files that udev reads, in the order of their names."""
    found: dict[str, Path] = {}
    for directory in RULES_DIRECTORIES:
        for name in system.names(directory):
            if name.endswith(".rules"):
                found.setdefault(name, system.root / directory / name)
    return [found[name] for name in sorted(found)]


def _text(path: Path) -> str:
    """The text of a regular file, else nothing: a link to /dev/null switches the file off."""
    with suppress(OSError):
        if path.is_file():
            return path.read_text(errors="replace").replace("\\\n", " ")
    return ""


def _watched(system: System) -> list[str]:
    """The ublk disks and partitions on which udev has a watch: links in /run/udev/watch, to or from the device."""
    entries = set()
    watches = system.root / "run/udev/watch"
    for name in system.names("run/udev/watch"):
        entries.add(name)
        with suppress(OSError):
            entries.add(str((watches / name).readlink()))
    disks = (name for name in system.names("sys/class/block") if name.startswith("ublkb"))
    return [f"/dev/{name}" for name in disks if f"b{system.text(f'sys/class/block/{name}/dev')}" in entries]
