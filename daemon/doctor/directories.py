"""The run directory, the state directory and /dev/shm: usable, owned as they must be, with room."""

import errno
import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import msgspec

from ublkpool.bufpool.way_out import explain
from ublkpool.daemon.device.state import DeviceState
from ublkpool.daemon.doctor.finding import Finding, some
from ublkpool.daemon.doctor.system import StatVfs, System, free_bytes, instance_of
from ublkpool.daemon.settings.own_directory import why_refused
from ublkpool.daemon.settings.run_directory import why_not_a_run_directory

ROOM_BYTES = 1 << 20
SHM_BYTES_MIN, SHM_BYTES = 64 << 10, 4 << 20
_POOL = re.compile(r"ublkpool-([A-Za-z0-9_.-]+)-(\d+)-(?:data|ctl)\Z")
_STATE = re.compile(r"[^.].*\.json\Z", re.DOTALL)


def run_directory_findings(system: System, statvfs: StatVfs = os.statvfs) -> list[Finding]:
    """Whether `ublkpool serve` accepts the run directory."""
    check, path = "run-directory", system.run_dir
    found = _directory(check, "the run directory", path, "--run-dir", statvfs)
    may_list = found.level != "fail" and _is_directory(path) and os.access(path, os.R_OK)
    if may_list and (reason := why_not_a_run_directory(path)):
        return [Finding(check, "fail", reason, "choose another with --run-dir")]
    return [found]


def state_directory_findings(system: System, statvfs: StatVfs = os.statvfs) -> list[Finding]:
    """Whether the state directory is accepted, lies on no disk of ours, and has only states that can be read."""
    check = "state-directory"
    path = next((each for each in system.state_dirs if _is_directory(each)), system.state_dirs[0])
    found = [_directory(check, "the state directory", path, "--state-dir", statvfs)]
    if not _is_directory(path):
        return found
    if on := _ublk_disk_of(system, path):
        says = f"the state directory {path} lies on {on}, a ublk disk: a daemon that serves it cannot start before it"
        found.append(Finding(check, "fail", says, "choose another with --state-dir"))
    if damaged := _damaged(path):
        says = f"{path}: no state of a device: {some(damaged)}: backends of these devices are refused"
        way_out = "restore the files from a backup, or accept any store with: ublkpool rebind NAME"
        found.append(Finding(check, "fail", says, way_out))
    return found


def _is_directory(path: Path) -> bool:
    with suppress(OSError):
        return path.is_dir()
    return False


def _directory(check: str, what: str, path: Path, option: str, statvfs: StatVfs) -> Finding:
    choose = f"choose another with {option}"
    try:
        if reason := why_refused(path):
            return Finding(check, "fail", f"{what} {path}: {reason}", choose)
        there = path.is_dir()
        about = statvfs(path if there else _nearest(path))
    except PermissionError as error:
        return Finding(
            check, "warn", f"{what} {path} was not looked at: {error.strerror}", "sudo ublkpool doctor"
        )
    except OSError as error:
        return Finding(check, "fail", f"{what} {path}: {explain(error)}", choose)
    if about.f_flag & os.ST_RDONLY:
        return Finding(
            check, "fail", f"{what} {path}: its file system is read-only", f"remount it, or {choose}"
        )
    if about.f_blocks and free_bytes(about) < ROOM_BYTES:
        says = f"{what} {path}: its file system has {free_bytes(about) >> 10} KiB left, and records need room"
        return Finding(check, "warn", says, "free some space there: df, df -i")
    if not there and not os.access(_nearest(path), os.W_OK):
        return Finding(
            check, "warn", f"{what} {path} is not there, and this user cannot make it", "sudo ublkpool serve"
        )
    return Finding(
        check, "ok", f"{what} {path} " + ("is usable" if there else "is not there: a daemon makes it")
    )


def _nearest(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def _ublk_disk_of(system: System, path: Path) -> str:
    """The ublk disk, also one below device mapper or a partition, that the file system is on; empty if none."""
    device = path.stat().st_dev
    block = (system.root / "sys/dev/block" / f"{os.major(device)}:{os.minor(device)}").resolve()
    below = [*block.parts, *(part for each in block.glob("slaves/*") for part in each.resolve().parts)]
    return next((f"/dev/{part}" for part in below if part.startswith("ublkb")), "")


def _damaged(directory: Path) -> list[str]:
    """The states that the daemon would not accept; those that this user may not read are left out."""
    found: list[str] = []
    with suppress(PermissionError):
        for path in sorted(directory.iterdir()):
            with suppress(OSError):
                if _STATE.match(path.name) and not _is_state(path.read_bytes(), path.stem):
                    found.append(path.name)
    return found


def _is_state(content: bytes, name: str) -> bool:
    try:
        return msgspec.json.decode(content, type=DeviceState).name == name
    except (msgspec.DecodeError, ValueError, RecursionError):
        return False


def shm_findings(
    system: System, on_record: Collection[int] | None, daemon_runs: bool, statvfs: StatVfs = os.statvfs
) -> list[Finding]:
    """The room in /dev/shm, and pools in it that a dead daemon left.

    `on_record`: device numbers on record; None if the records cannot be read.
    """
    check, path = "shm", system.root / "dev/shm"
    try:
        free, names = free_bytes(statvfs(path)), [each.name for each in path.iterdir()]
    except OSError as error:
        lacks = error.errno == errno.ENOENT
        says = f"/dev/shm {'is not there' if lacks else f'cannot be looked at: {error.strerror}'}, and pools need it"
        return [Finding(check, "fail", says, "mount -t tmpfs -o mode=1777 tmpfs /dev/shm")]
    return [_shm_room(check, free), *_leftovers(check, names, system, on_record, daemon_runs)]


def _shm_room(check: str, free: int) -> Finding:
    way_out = "mount -o remount,size=64M /dev/shm, or --shm-size of the container; remove what is not needed"
    if free < SHM_BYTES_MIN:
        return Finding(
            check, "fail", f"/dev/shm is full: {free >> 10} KiB are left, and no device can start", way_out
        )
    if free < SHM_BYTES:
        return Finding(check, "warn", f"/dev/shm has {free >> 10} KiB left, enough for few devices", way_out)
    return Finding(check, "ok", f"/dev/shm has {free >> 20} MiB left")


def _leftovers(
    check: str, names: list[str], system: System, on_record: Collection[int] | None, daemon_runs: bool
) -> list[Finding]:
    pools = [(match[1], int(match[2]), name) for name in sorted(names) if (match := _POOL.match(name))]
    instance = instance_of(system.run_dir)
    others = {each for each, _, _ in pools} - {instance}
    found = (
        [Finding(check, "ok", f"/dev/shm has pools of {len(others)} other run directories")] if others else []
    )
    left = [name for each, number, name in pools if each == instance and number not in (on_record or ())]
    if left and not daemon_runs and on_record is not None:
        says = f"a daemon that was killed left pools in /dev/shm: {some(left)}"
        way_out = f"ublkpool serve --run-dir {system.run_dir} removes them at its start"
        found.append(Finding(check, "warn", says, way_out))
    return found
