"""The users of a file or a block device, as far as /proc and /sys of this machine show them.

A user found here is evidence that the store is in use.  Finding none proves nothing: a mount may be in a namespace
that this process may not read, a lock on another host, a descriptor in flight between processes.  This module touches
no file of another file system, and opens only loop devices whose backing file has the same name, so it never waits for
another store.
"""

import fcntl
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from ublkpool.bufpool.mountinfo import Mount, read_mounts, read_swaps, shown

_PF_EXITING = 0x4
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO_BYTES = 232
_SIGKILL_BIT = 1 << 8
_COMMAND_LENGTH_MAX = 100
_SYS_DEVICES = Path("/sys/dev/block")
_SYS_BLOCK = Path("/sys/block")
_PROC = Path("/proc")


def lockers(path: Path) -> list[int]:
    """The processes with a lock (flock) on this file or node, including a dead one whose I/O still runs.

    Outside the first pid namespace the kernel hides dead processes and other containers' (`locks_translate_pid`).
    """
    wanted = _lock_name(path)
    found = []
    with suppress(OSError):
        for line in (_PROC / "locks").read_text().splitlines():
            words = line.split()
            # An arrow in the second column marks a process that waits for the lock.
            if "->" not in words and len(words) >= 6 and words[1] == "FLOCK" and words[5] == wanted:
                found.append(int(words[4]))
    return [pid for pid in found if pid > 0]


def _lock_name(path: Path) -> str:
    """`major:minor:inode` as /proc/locks writes it: with the file system's own device number, not that of `stat`."""
    about = path.stat()
    mount = _mount_of(path)
    # btrfs and overlayfs report another device number in `stat` than in /proc/locks.
    device = mount.device if mount else f"{os.major(about.st_dev)}:{os.minor(about.st_dev)}"
    major, _, minor = device.partition(":")
    return f"{int(major):02x}:{int(minor):02x}:{about.st_ino}"


def _mount_of(path: Path) -> Mount | None:
    """The mount that a file lies in."""
    file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with suppress(OSError, StopIteration):
            facts = (_PROC / f"self/fdinfo/{file}").read_text().splitlines()
            number = next(int(line.split()[1]) for line in facts if line.startswith("mnt_id:"))
            return next(each for each in read_mounts(_PROC / "self/mountinfo") if each.id == number)
    finally:
        os.close(file)
    return None


def is_dying(pid: int) -> bool:
    """Whether a process has ended or is ending: its remaining work in the kernel ends by itself."""
    if not _exists(pid):
        return True
    try:
        about = (_PROC / f"{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()
        if about[0] in "ZXx" or int(about[6]) & _PF_EXITING:
            return True
        # Not as text: a carriage return in the process's name would begin a line.
        status = os.fsdecode((_PROC / f"{pid}/status").read_bytes())
    except OSError:
        # It has just ended, or /proc is mounted with hidepid.
        return not _exists(pid)
    pending = re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)", status, re.MULTILINE)
    return any(int(each, 16) & _SIGKILL_BIT for each in pending)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def name_process(pid: int) -> str:
    """`process 12 (ublkpool backend of vol0)`, or with the command that it runs."""
    words = []
    with suppress(OSError):
        words = (_PROC / f"{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    command = _backend_of(words) or " ".join(words).strip()
    plain = "".join(each if each.isprintable() else "?" for each in command[:_COMMAND_LENGTH_MAX])
    return f"process {pid} ({plain})" if plain else f"process {pid}"


def _backend_of(words: list[str]) -> str:
    if "backend" not in words:
        return ""
    names = [after for word, after in pairwise(words) if word == "--device"]
    names += [word.removeprefix("--device=") for word in words if word.startswith("--device=")]
    return f"the ublkpool backend of {names[0]}" if names else ""


def claimers(path: Path) -> list[str]:
    """The mounts, swaps and dm or md devices on a block device, on a partition of it or on its whole disk."""
    number = path.stat().st_rdev
    related = _related_devices(number)
    names = {each: each.resolve().name for each in related}
    numbers = {_number_of(each): name for each, name in names.items()}
    found = [f"{names[each]} is held by {holder}" for each in related for holder in _holders(each)]
    found += [f"{name} is mounted at {shown(at)}" for name, at in _mounts_on(numbers)]
    return found + [f"{name} is used as swap" for name in _swaps_on(numbers)]


def users_without_a_claim(path: Path) -> list[str]:
    """Users of a file or block device that claim nothing: loop devices, swap files."""
    found = [f"/dev/{loop} is set up on it" for loop in _loops_on(path)]
    found += ["it is used as swap" for each in _swap_paths() if os.path.realpath(path) == each]
    about = path.stat()
    return found + (lockers_of_loop_files(about.st_rdev) if stat.S_ISBLK(about.st_mode) else [])


def openers(path: Path) -> list[int]:
    """The visible processes that have this node or file open under its name."""
    wanted, found = os.path.realpath(path), []
    for process in _processes():
        with suppress(OSError):
            if any(_link(each) == wanted for each in (process / "fd").iterdir()):
                found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]


def disks_below(path: Path) -> set[str]:
    """The kernel's names of all block devices that the data of a file or a block device lies on."""
    about = path.stat()
    if stat.S_ISBLK(about.st_mode):
        number = f"{os.major(about.st_rdev)}:{os.minor(about.st_rdev)}"
    else:
        mount = _mount_of(path)
        number = _number_of_mount(mount) if mount else f"{os.major(about.st_dev)}:{os.minor(about.st_dev)}"
    return _below(_SYS_DEVICES / number, set())


def _number_of_mount(mount: Mount) -> str:
    return _node_number(mount.source) or mount.device


def _below(block: Path, seen: set[str]) -> set[str]:
    if not block.exists() or block.resolve().name in seen:
        return seen
    place = block.resolve()
    seen.add(place.name)
    if (place / "partition").exists():
        _below(place.parent, seen)
    for part in (place / "slaves").glob("*"):
        _below(part, seen)
    with suppress(OSError):
        backing = os.fsdecode((place / "loop/backing_file").read_bytes()).rstrip("\n")
        seen |= disks_below(Path(backing)) if backing not in seen else set()
    return seen


def _related_devices(number: int) -> list[Path]:
    """A device and the devices that overlap it: a disk's partitions, or a partition's disk."""
    own = _SYS_DEVICES / f"{os.major(number)}:{os.minor(number)}"
    if not own.exists():
        return []
    place = own.resolve()
    if (place / "partition").exists():
        return [place, place.parent]
    return [place, *(each.parent for each in sorted(place.glob("*/partition")))]


def _number_of(block: Path) -> str:
    with suppress(OSError):
        return (block / "dev").read_text().strip()
    return ""


def _holders(block: Path) -> list[str]:
    return [f"/dev/{each.name}" for each in sorted((block / "holders").glob("*"))]


def _mounts_on(numbers: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The devices of `numbers` (`major:minor` to name) that are mounted, and where, in any namespace."""
    seen = set()
    for mount in _all_mounts():
        name = numbers.get(mount.device) or numbers.get(_node_number(mount.source))
        if name is not None and (name, mount.path) not in seen:
            seen.add((name, mount.path))
            yield name, mount.path


def _all_mounts() -> Iterator[Mount]:
    """The mounts of every mount namespace that can be read."""
    namespaces = set()
    for process in (_PROC / "self", *_processes()):
        with suppress(OSError):
            namespace = (process / "ns/mnt").readlink()
            if namespace not in namespaces:
                namespaces.add(namespace)
                yield from read_mounts(process / "mountinfo")


def _node_number(source: str) -> str:
    """`major:minor` of a node in /dev: btrfs mounts have device numbers of their own."""
    if source.startswith("/dev/"):
        with suppress(OSError):
            about = Path(source).stat()
            if stat.S_ISBLK(about.st_mode):
                return f"{os.major(about.st_rdev)}:{os.minor(about.st_rdev)}"
    return ""


def _swaps_on(numbers: dict[str, str]) -> Iterable[str]:
    return [numbers[number] for each in _swap_paths() if (number := _node_number(each)) in numbers]


def _swap_paths() -> list[str]:
    with suppress(OSError):
        return read_swaps(_PROC / "swaps")
    return []


def _loops_on(path: Path) -> list[str]:
    """The loop devices on this file.  Names are compared first, so that no other file is touched."""
    ours = path.stat()
    wanted = Path(os.path.realpath(path))

    def is_ours(name: str, backing: Path) -> bool:
        # Another mount shows the same file under another path; only a hard link gives it another name.
        if backing.name != wanted.name and ours.st_nlink == 1:
            return False
        found = _backing_inode(name)
        if found is not None:
            return found == (os.major(ours.st_dev), os.minor(ours.st_dev), ours.st_ino)
        return backing == wanted

    return [name for name, backing in _loops() if is_ours(name, Path(backing))]


def _backing_inode(loop: str) -> tuple[int, int, int] | None:
    """Major and minor number and inode of a loop device's file: in another container another file may have its path."""
    about = bytearray(_LOOP_INFO_BYTES)
    with suppress(OSError):
        file = os.open(f"/dev/{loop}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(file, _LOOP_GET_STATUS64, about)
        finally:
            os.close(file)
        device, inode = struct.unpack_from("=QQ", about)
        # `huge_encode_dev`
        return (device & 0xFFF00) >> 8, device & 0xFF | device >> 12 & 0xFFF00, inode
    return None


def _loops() -> Iterator[tuple[str, str]]:
    for each in sorted(_SYS_BLOCK.glob("loop*/loop/backing_file")):
        with suppress(OSError):
            yield each.parent.parent.name, os.fsdecode(each.read_bytes()).rstrip("\n")


def lockers_of_loop_files(number: int) -> list[str]:
    """The processes that have locked the file of a loop device, as our backends do, for the block device `number`.

    The loop device is that block device, its disk, or one under its device mapper or md disk.
    """
    layers = _layers(_SYS_DEVICES / f"{os.major(number)}:{os.minor(number)}", set())
    found = []
    for loop, backing in _loops():
        if loop in layers:
            with suppress(OSError):
                found += [
                    f"the file {shown(backing)} of {loop} is locked by {name_process(pid)}"
                    for pid in lockers(Path(backing))
                ]
    return found


def _layers(block: Path, seen: set[str]) -> set[str]:
    """The names of a block device and of those that it consists of: a partition's disk, the devices under dm and md.

    Unlike `_below` it does not go on through files: another file of the same file system is another store.
    """
    place = block.resolve()
    if not place.exists() or place.name in seen:
        return seen
    seen.add(place.name)
    if (place / "partition").exists():
        _layers(place.parent, seen)
    for part in sorted((place / "slaves").glob("*")):
        _layers(part, seen)
    return seen


def _processes() -> Iterator[Path]:
    return (each for each in _PROC.iterdir() if each.name.isdigit())


def _link(path: Path) -> str:
    with suppress(OSError):
        return str(path.readlink())
    return ""
