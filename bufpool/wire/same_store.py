"""Whether two identities name the same store, though another kernel or mount option wrote them differently.

Compares the parts of a file's value as `bufpool/sdk/store_identity.py` makes it, `file:MAGIC:UUID:NAME`, also behind
`loop:OFFSET:`.  All other values are compared as a whole.  Pure.
"""

import re

from ublkpool.bufpool.wire.attach import Identity

_FILE = re.compile(r"(?P<before>(?:loop:\d+:)*)file:(?P<magic>[0-9a-f]+):(?P<uuid>[0-9a-f]*):(?P<name>.+)")
_XFS = "58465342"
_XFS_HANDLE = re.compile(
    r"(?P<type>81|1)-(?P<inode>[0-9a-f]{8}(?:[0-9a-f]{8})?)(?P<generation>[0-9a-f]{8})(?P<rest>:.*|)"
)


_LOOP_IN_BOOT = re.compile(r"loop:\d+:seq:\d+(?::at:\d+)?")


def is_same_store(bound: Identity, brought: Identity, *, is_same_boot: bool) -> bool:
    """Whether `brought` names the store that `bound` named, in this boot of the machine or an earlier one."""
    is_loop = bool(_LOOP_IN_BOOT.fullmatch(bound.in_boot) and _LOOP_IN_BOOT.fullmatch(brought.in_boot))
    if is_same_boot and is_loop and bound.in_boot == brought.in_boot:
        # The loop device has had one file all the time (`diskseq`), though the file may have no name any more.
        return True
    if not is_same_value(bound.value, brought.value):
        return False
    if not is_same_boot or not (bound.in_boot and brought.in_boot):
        return bool(bound.value) or not bound.in_boot
    if is_loop:
        # A file is the same on another loop device; an inode number alone does not tell that it is the file.
        return bool(_FILE.fullmatch(bound.value))
    return bound.in_boot in (brought.in_boot, _as_before(brought.in_boot))


def _as_before(in_boot: str) -> str:
    """A loop device's number of this boot as earlier versions wrote it."""
    return re.sub(r"^loop:\d+:seq:(\d+(?::at:\d+)?)$", r"disk:seq:\1", in_boot)


def is_same_value(one: str, other: str) -> bool:
    """Whether both values name the same store.

    Linux before 6.9 does not tell the file system's UUID (FS_IOC_GETFSUUID): a missing one equals any.  xfs writes
    64-bit inode numbers into handles unless it is mounted with inode32 (fs/xfs/xfs_export.c).
    """
    if one == other:
        return True
    first, second = _FILE.fullmatch(one), _FILE.fullmatch(other)
    if first is None or second is None:
        return False
    if first["uuid"] and second["uuid"] and first["uuid"] != second["uuid"]:
        return False
    return _without_uuid(first) == _without_uuid(second)


def _without_uuid(value: re.Match[str]) -> tuple[str, str, str]:
    name = value["name"]
    if value["magic"] == _XFS and (handle := _XFS_HANDLE.fullmatch(name)):
        # Little-endian: a 32-bit number is a 64-bit one without its upper half.
        name = f"{handle['inode']:0<16}-{handle['generation']}{handle['rest']}"
    return value["before"], value["magic"], name
