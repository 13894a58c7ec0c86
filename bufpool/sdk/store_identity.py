"""Identities of stores: which file or block device an open file is, so that a replaced store is noticed.

Knows file systems and sysfs, and of the wire only `Identity`.  An identity survives changes that keep the data: a
rename, chmod, a remount, a reboot, growth.  It changes when another file or disk gets the same path, even if the new
file got the same inode number.  Where the kernel has nothing that guarantees both, the identity is marked weak.
"""

import fcntl
import os
import re
import stat
import struct
import time
from pathlib import Path

from ublkpool.bufpool.engine.file_facts import file_birth_ns, file_handle, file_system_magic
from ublkpool.bufpool.wire import Identity

_FS_IOC_GETFSUUID = 0x80111500
"""include/uapi/linux/fs.h, since Linux 6.9; answers with a length and 16 bytes."""
_TMPFS, _RAMFS, _NFS = 0x01021994, 0x858458F6, 0x6969
_EXT4, _XFS, _BTRFS, _F2FS, _BCACHEFS = 0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0xCA451A4E
_HANDLES_LAST = frozenset({_EXT4, _XFS, _BTRFS, _F2FS, _BCACHEFS, _NFS, _TMPFS})
"""File systems whose handles name inode and generation for the file's whole life.  A FUSE handle, virtiofs included,
holds a number that the server may assign anew at each lookup (`fuse_encode_fh`)."""
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO64 = struct.Struct("=5Q4I64s64s32s2Q")
_SYS = Path("/sys/dev/block")
_SERIALS = ("wwid", "device/wwid", "serial", "device/cid", "device/serial", "backend")
"""Most reliable first: NVMe; SCSI and ATA; virtio-blk; MMC; others; nbd (Documentation/ABI/stable/sysfs-block)."""
_VOLATILE_DISKS = ("ram", "zram")
_COUNTED = re.compile(r"(/host|/target|/virtio|/(?=\d+:\d+:\d+:\d+))\d+")
"""Parts of a sysfs path that are numbered in the order in which drivers found devices."""
_PATH_LENGTH_MAX = 60


def identify(file: int, path: Path) -> Identity:
    """The identity of an open regular file or block device; `path` is only shown to people.  Raises `OSError`."""
    status = os.fstat(file)
    if stat.S_ISBLK(status.st_mode):
        return _block_device(file, status.st_rdev, path)
    return _regular_file(file, status, path)


def _regular_file(file: int, status: os.stat_result, path: Path) -> Identity:
    magic, born_ns, uuid = file_system_magic(file), file_birth_ns(file), _file_system_uuid(file)
    store = _described(path, f"inode {status.st_ino}{_date(born_ns)}")
    handle = file_handle(file) if magic in _HANDLES_LAST else ""
    value = f"file:{magic:x}:{uuid}:{handle or f'{status.st_ino}:{born_ns}'}"
    if magic in (_TMPFS, _RAMFS):
        return Identity(in_boot=value, store=store)
    is_strong = handle and (uuid or magic == _NFS)
    return Identity(value=value, strength="strong" if is_strong else "weak", store=store)


def memory_identity(file: int, device: str) -> Identity:
    """The identity of a memory disk's memfd, which one process after another holds.  Raises `OSError`."""
    status = os.fstat(file)
    name = file_handle(file) or f"{status.st_ino}:{file_birth_ns(file)}"
    store = f"the memory disk of {device} (inode {status.st_ino})"
    return Identity(in_boot=f"memory:{name}", store=store, ends_with_device=True)


def _file_system_uuid(file: int) -> str:
    try:
        answer = fcntl.ioctl(file, _FS_IOC_GETFSUUID, bytes(17))
    except OSError:
        return ""
    uuid = answer[1 : 1 + answer[0]]
    return uuid.hex() if any(uuid) else ""


def _date(born_ns: int) -> str:
    if not born_ns:
        return ""
    return time.strftime(", made %Y-%m-%d %H:%M:%S", time.localtime(born_ns // 1_000_000_000))


def printable(text: str) -> str:
    """Text as the attach may carry it: characters that are not printable become backslash escapes."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _described(path: Path, facts: str) -> str:
    text = printable(os.fsencode(path).decode(errors="backslashreplace"))
    if len(text) > _PATH_LENGTH_MAX:
        text = "..." + text[3 - _PATH_LENGTH_MAX :]
    return f"{text} ({facts})"


def _block_device(file: int, number: int, path: Path) -> Identity:
    directory = (_SYS / f"{os.major(number)}:{os.minor(number)}").resolve()
    start = _read(directory / "start") if (directory / "partition").exists() else ""
    disk = directory.parent if start else directory
    whole = _loop_device(file, disk) if (disk / "loop").exists() else _disk(disk)
    if not start:
        return _named(whole, path)
    # A partition is identified by its disk and its first sector, not by its name in the table.
    at = f":at:{start}"
    return _named(
        Identity(
            value=whole.value and whole.value + at,
            in_boot=whole.in_boot and whole.in_boot + at,
            strength=whole.strength,
            store=f"{whole.store}, from sector {start}",
        ),
        path,
    )


def _named(identity: Identity, path: Path) -> Identity:
    return Identity(
        value=identity.value,
        in_boot=identity.in_boot,
        strength=identity.strength,
        store=_described(path, identity.store),
    )


def _disk(disk: Path) -> Identity:
    if uuid := _read(disk / "dm/uuid"):
        return Identity(value=f"disk:dm:{uuid}", store=f"dm {uuid}")
    if uuid := _read(disk / "md/uuid"):
        return Identity(value=f"disk:md:{uuid}", store=f"md {uuid}")
    for name in _SERIALS:
        if serial := printable(_read(disk / name)):
            return Identity(value=f"disk:{name}:{serial}", store=f"{Path(name).name} {serial}")
    return _usb_disk(disk) or _unnumbered_disk(disk)


def _usb_disk(disk: Path) -> Identity | None:
    """The serial number of a USB disk, from its USB device, and the unit behind that from its SCSI address."""
    for above in disk.parents:
        serial = _read(above / "serial")
        if serial and (model := _read(above / "idVendor") + ":" + _read(above / "idProduct")) != ":":
            unit = disk.parent.parent.name.rpartition(":")[2]
            return Identity(value=f"disk:usb:{model}:{serial}:{unit}", store=f"usb {model} {serial}")
    return None


def _unnumbered_disk(disk: Path) -> Identity:
    """A disk without a number of its own: where it is plugged in, and within a boot its `diskseq`."""
    sequence = _read(disk / "diskseq")
    in_boot = f"disk:seq:{sequence}" if sequence else ""
    store = f"{disk.name}, disk number {sequence or '?'} of this boot"
    if disk.name.rstrip("0123456789") in _VOLATILE_DISKS:
        return Identity(in_boot=in_boot or f"disk:{disk.name}", strength="weak", store=store)
    place = _read(disk / "dm/name") or _COUNTED.sub(r"\1", str(disk.parent.parent))
    if disk.parent.parent.name == "virtual":
        place = disk.name
    return Identity(value=f"disk:place:{place}", in_boot=in_boot, strength="weak", store=store)


def _loop_device(file: int, disk: Path) -> Identity:
    """A loop device is its backing file and the offset in it, whichever number the device has."""
    backing = Path(_read(disk / "loop/backing_file"))
    offset = _read(disk / "loop/offset") or "0"
    sequence = _read(disk / "diskseq")
    in_boot = f"loop:{offset}:seq:{sequence}" if sequence else ""
    found = _backing_file(file, backing)
    if found is not None:
        # A file may lose its name while the loop device has it; the device then still has its number of this boot.
        is_file = found.value.startswith("file:")
        return Identity(
            value=found.value and f"loop:{offset}:{found.value}",
            in_boot=in_boot if is_file else found.in_boot and f"loop:{offset}:{found.in_boot}",
            strength=found.strength,
            store=f"on {found.store}",
        )
    # This process cannot open the file: use what the loop driver says of it.
    _, inode = _loop_status(file)
    return Identity(
        value=f"loop:{offset}:inode:{inode}",
        in_boot=in_boot,
        strength="weak",
        store=f"on {printable(str(backing))}, inode {inode}",
    )


def _backing_file(file: int, backing: Path) -> Identity | None:
    """The identity of the file at `backing`, if that is the loop device's file."""
    try:
        opened = os.open(backing, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        status = os.fstat(opened)
        if (status.st_dev, status.st_ino) != _loop_status(file):
            return None
        return identify(opened, backing)
    except OSError:
        return None
    finally:
        os.close(opened)


def _loop_status(file: int) -> tuple[int, int]:
    """Device and inode of the file behind a loop device (`struct loop_info64`).  Raises `OSError`."""
    fields = _LOOP_INFO64.unpack(fcntl.ioctl(file, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64.size)))
    return fields[0], fields[1]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
