"""The users of a disk: mounts, devices made of it, swap, loop devices, processes that have it open or mapped.

Owns what /sys and /proc show of them.  Every function runs in a disposable process (`ControlRunner.look`), since a read
of any of these files may wait for a disk that does not answer.  A user that is found is evidence; finding none proves
nothing: a descriptor may be in flight, in io_uring's table, or in another PID namespace.  Only the kernel knows
(`BlockDevice.try_stop`).
"""

import errno
import os
import stat
import struct
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from ublkpool.bufpool.mountinfo import read_mounts, read_swaps, shown
from ublkpool.daemon.kernel.control_process import LOOK_TITLE

USERS_MAX = 20
"""Users of one kind that are named, so that the error stays readable, and the answer fits into a pipe."""
_PROC = Path("/proc")
_SYS_BLOCK = Path("/sys/block")
_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_STATX_BASIC = 0x7FF
_STATX_BYTES = 256
_STATX_MODE = struct.Struct("@28xH")
_STATX_RDEV = struct.Struct("@128xII")


class Users(msgspec.Struct, frozen=True):
    """The users of a disk, in words."""

    lasting: tuple[str, ...] = ()
    """Mounts, swap, devices made of the disk."""
    openers: tuple[str, ...] = ()
    """Processes that have it open, for a moment only (udev, blkid) or for longer."""

    @property
    def words(self) -> str:
        """All users, separated by commas; empty without users."""
        return ", ".join((*self.lasting, *self.openers))


def is_claimed(node: str) -> bool:
    """Whether the kernel refuses an exclusive open: a mount, swap, device mapper or md has the disk or a partition."""
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def find_users(disk: str) -> Users:
    """The users of the disk with this name in /sys/block, and of its partitions."""
    numbers = _numbers(disk)
    lasting = [*_made_of(disk, numbers), *_swaps(numbers), *_loops(numbers), *_mounts(numbers)]
    openers = list(_openers(numbers)) if numbers else []
    return Users(_few(lasting), _few(openers))


def find_mappers(disk: str) -> Users:
    """The processes that map the disk and may have closed it; a separate look, since /proc/PID/maps may wait longer."""
    names = {f"/dev/{name}".encode() for name in _numbers(disk).values()}
    return Users((), _few([f"{_process(pid)} maps it" for pid in _pids() if _maps(pid, names)]))


def _few(users: list[str]) -> tuple[str, ...]:
    distinct = list(dict.fromkeys(users))
    more = len(distinct) - USERS_MAX
    return (*distinct[:USERS_MAX], f"and {more} more") if more > 0 else tuple(distinct)


def _numbers(disk: str) -> dict[str, str]:
    """`major:minor` of the disk and of its partitions, with their names."""
    found = {}
    for directory in (_SYS_BLOCK / disk, *(_SYS_BLOCK / disk).glob(f"{disk}p*")):
        with suppress(OSError):
            found[(directory / "dev").read_text().strip()] = directory.name
    return found


def _directories(disk: str, numbers: dict[str, str]) -> Iterator[Path]:
    for name in numbers.values():
        yield _SYS_BLOCK / disk if name == disk else _SYS_BLOCK / disk / name


def _made_of(disk: str, numbers: dict[str, str]) -> Iterator[str]:
    """The block devices that have registered as the disk's holders: device mapper, md, bcache."""
    for directory in _directories(disk, numbers):
        with suppress(OSError):
            for upper in sorted((directory / "holders").iterdir()):
                yield f"{directory.name} is a part of {_device(upper.name)}"


def _device(name: str) -> str:
    with suppress(OSError):
        return f"{name} ({(_SYS_BLOCK / name / 'dm' / 'name').read_text(errors='replace').strip()})"
    return name


def _swaps(numbers: dict[str, str]) -> Iterator[str]:
    names = {f"/dev/{name}" for name in numbers.values()}
    with suppress(OSError):
        for path in read_swaps(_PROC / "swaps"):
            if path in names or _number_of(path) in numbers:
                yield f"swap is on {shown(path)}"


def _loops(numbers: dict[str, str]) -> Iterator[str]:
    names = {f"/dev/{name}" for name in numbers.values()}
    for file in _SYS_BLOCK.glob("loop*/loop/backing_file"):
        with suppress(OSError):
            path = file.read_text(errors="replace").rstrip("\n")
            if path in names or _number_of(path) in numbers:
                yield f"{file.parts[-3]} is a loop device on it"


def _mounts(numbers: dict[str, str]) -> Iterator[str]:
    """The mounts in every mount namespace that a process is in."""
    names = {f"/dev/{name}" for name in numbers.values()}
    first = _namespace(1)
    for namespace, pid in _namespaces().items():
        with suppress(OSError):
            for mount in read_mounts(_PROC / str(pid) / "mountinfo"):
                # Some file systems have a device number of their own; then the source names the disk.
                if mount.device in numbers or mount.source in names:
                    where = "" if namespace == first else f" for {_process(pid)}"
                    yield f"mounted at {shown(mount.path)}{where}"


def _namespaces() -> dict[str, int]:
    """Each mount namespace, and the process with the lowest number in it."""
    found: dict[str, int] = {}
    for pid in _pids():
        if namespace := _namespace(pid):
            found.setdefault(namespace, pid)
    return found


def _namespace(pid: int) -> str:
    with suppress(OSError):
        return os.readlink(f"{_PROC}/{pid}/ns/mnt")  # noqa: PTH115
    return ""


def _openers(numbers: dict[str, str]) -> Iterator[str]:
    names = {f"/dev/{name}" for name in numbers.values()}
    for pid in _pids():
        # The daemon's own looks open the disk for a moment, too.
        if _comm(pid) != LOOK_TITLE and _has_open(pid, names, numbers):
            yield f"{_process(pid)} has it open"


def _has_open(pid: int, names: Collection[str], numbers: Collection[str]) -> bool:
    # Without pathlib, which takes several times as long: a thousand devices have ten thousand descriptors.
    directory = f"{_PROC}/{pid}/fd"
    with suppress(OSError):
        for number in os.listdir(directory):  # noqa: PTH208
            entry = f"{directory}/{number}"
            with suppress(OSError):
                target = os.readlink(entry)  # noqa: PTH115
                if target in names or (_may_be_a_node(target) and _number_of(entry) in numbers):
                    return True
    return False


def _may_be_a_node(target: str) -> bool:
    """Whether a descriptor's link may lead to a node, which may have any name in another mount namespace.

    The link of a socket or a pipe is no path; that of a memfd is "/memfd:NAME (deleted)".
    """
    return target.startswith("/") and not target.startswith("/memfd:")


def _maps(pid: int, names: Collection[bytes]) -> bool:
    with suppress(OSError):
        maps = (_PROC / str(pid) / "maps").read_bytes()
        if any(name in maps for name in names):
            return any(line[line.find(b"/") :] in names for line in maps.splitlines() if b"/" in line)
    return False


def _number_of(path: str) -> str:
    """`major:minor` of a block device node; empty for anything else.

    Unlike stat(2), statx(2) with AT_STATX_DONT_SYNC asks no server of a network or user-space file system.
    """
    import ctypes

    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if _statx()(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, _STATX_BASIC, buffer) != 0:
        return ""
    (mode,), (major, minor) = _STATX_MODE.unpack_from(buffer), _STATX_RDEV.unpack_from(buffer)
    return f"{major}:{minor}" if stat.S_ISBLK(mode) else ""


@cache
def _statx() -> Any:
    """The C library's statx, looked up once: it is called for thousands of descriptors."""
    import ctypes

    return ctypes.CDLL(None).statx


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir(_PROC) if name.isdigit())  # noqa: PTH208


def _comm(pid: int) -> str:
    with suppress(OSError), open(f"{_PROC}/{pid}/comm", errors="replace") as file:  # noqa: PTH123
        return file.read().strip()
    return ""


def _process(pid: int) -> str:
    return f"process {pid} ({_comm(pid) or 'it has ended'})"
