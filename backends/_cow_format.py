"""The head of a copy-on-write overlay, as docs/COW.md describes it: bytes in, facts out, and the other way round.

The head lies in the file twice and is written in turns, so that a power failure in the middle of a write leaves the
other one.  Knows nothing of the map's content.
"""

import os
import struct
import zlib
from pathlib import Path

import msgspec

from ublkpool.bufpool.engine.cow import BLOCK_BYTES, MAP_PAGE_COVERS_BYTES, CowLayout
from ublkpool.bufpool.errors import BackendError

MAGIC = b"UBLKPCOW"
VERSION = 1
HEAD_BYTES = 4096
_HEADS = 2
_MAP_AT = 1 << 16
_DATA_ALIGN_BYTES = 1 << 20
_CAPACITY_MIN_BYTES = 64 << 30
_ROOM_TO_GROW = 8
_PATH_AT = 512
_PATH_BYTES_MAX = HEAD_BYTES - _PATH_AT - 4
_FIELDS = struct.Struct("<8sIIIIQQQQQQQqII16s")
"""Magic, version, bytes of the head, bytes of a block, features, sequence; size, capacity, the places of live map,
durable map and data; the base's size, its mtime in seconds and nanoseconds, the bytes of its path; the boot."""
_SUM = struct.Struct("<I")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What the head says."""

    sequence: int
    layout: CowLayout
    base: Path
    base_mtime_ns: int
    boot: bytes
    """The boot in which the overlay was opened for writing last."""


def this_boot() -> bytes:
    """The number of this boot of the machine, 16 bytes.  Raises `OSError`."""
    return bytes.fromhex(_BOOT_ID.read_text().strip().replace("-", ""))


def new_layout(size_bytes: int, base_bytes: int) -> CowLayout:
    """The places in a new overlay, with room in its map for a disk several times as large."""
    capacity_bytes = _CAPACITY_MIN_BYTES
    while capacity_bytes < size_bytes * _ROOM_TO_GROW:
        capacity_bytes *= 2
    map_bytes = capacity_bytes // MAP_PAGE_COVERS_BYTES * 4096
    durable_at = _MAP_AT + map_bytes
    return CowLayout(
        size_bytes=size_bytes,
        capacity_bytes=capacity_bytes,
        live_at=_MAP_AT,
        durable_at=durable_at,
        data_at=-(-(durable_at + map_bytes) // _DATA_ALIGN_BYTES) * _DATA_ALIGN_BYTES,
        base_bytes=base_bytes,
    )


def file_bytes(layout: CowLayout) -> int:
    """The length of the overlay's file."""
    return layout.data_at + -(-layout.size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def write_head(file: int, head: Head) -> None:
    """Write the head over the older one, and sync it.  Raises `BackendError`, `OSError`."""
    os.pwrite(file, _packed(head), head.sequence % _HEADS * HEAD_BYTES)
    os.fsync(file)


def read_head(file: int, path: Path) -> Head:
    """The newer of the two heads that are whole.  Raises `BackendError` naming what is wrong."""
    raw = [os.pread(file, HEAD_BYTES, at * HEAD_BYTES) for at in range(_HEADS)]
    if not any(each.startswith(MAGIC) for each in raw):
        raise BackendError(
            f"overlay={path}: not an overlay of ublkpool's: it does not begin with {MAGIC.decode()}"
        )
    found = [each for each in raw if _is_whole(each)]
    if not found:
        raise BackendError(f"overlay={path}: damaged: neither copy of its head has the right checksum")
    newest = max(found, key=lambda each: int(_FIELDS.unpack_from(each)[5]))
    return _unpacked(newest, path)


def _packed(head: Head) -> bytes:
    layout, path = head.layout, os.fsencode(head.base)
    if len(path) > _PATH_BYTES_MAX:
        raise BackendError(f"base={head.base}: a path of more than {_PATH_BYTES_MAX} bytes")
    seconds, nanoseconds = divmod(head.base_mtime_ns, 1_000_000_000)
    fields = _FIELDS.pack(
        *(MAGIC, VERSION, HEAD_BYTES, BLOCK_BYTES, 0, head.sequence),
        *(layout.size_bytes, layout.capacity_bytes, layout.live_at, layout.durable_at, layout.data_at),
        *(layout.base_bytes, seconds, nanoseconds, len(path), head.boot),
    )
    body = (fields.ljust(_PATH_AT, b"\0") + path).ljust(HEAD_BYTES - _SUM.size, b"\0")
    return body + _SUM.pack(zlib.crc32(body))


def _is_whole(raw: bytes) -> bool:
    body = raw[: -_SUM.size]
    return (
        len(raw) == HEAD_BYTES and raw.startswith(MAGIC) and raw[len(body) :] == _SUM.pack(zlib.crc32(body))
    )


def _unpacked(raw: bytes, path: Path) -> Head:
    (_, version, head_bytes, block_bytes, features, sequence, size, capacity, live, durable, data, base_bytes,
     seconds, nanoseconds, path_bytes, boot) = _FIELDS.unpack_from(raw)  # fmt: skip
    if (version, head_bytes, block_bytes, features) != (VERSION, HEAD_BYTES, BLOCK_BYTES, 0):
        raise BackendError(
            f"overlay={path}: has version {version} (features {features:#x}), and this ublkpool knows {VERSION}: "
            "use the version that made it"
        )
    layout = CowLayout(
        size_bytes=size,
        capacity_bytes=capacity,
        live_at=live,
        durable_at=durable,
        data_at=data,
        base_bytes=base_bytes,
    )
    if not _is_possible(layout) or path_bytes > _PATH_BYTES_MAX:
        raise BackendError(f"overlay={path}: damaged: its head has places that cannot be")
    return Head(
        sequence=sequence,
        layout=layout,
        base=Path(os.fsdecode(raw[_PATH_AT : _PATH_AT + path_bytes])),
        base_mtime_ns=seconds * 1_000_000_000 + nanoseconds,
        boot=boot,
    )


def _is_possible(layout: CowLayout) -> bool:
    map_bytes = layout.capacity_bytes // MAP_PAGE_COVERS_BYTES * 4096
    return (
        0 < layout.size_bytes <= layout.capacity_bytes
        and layout.capacity_bytes % MAP_PAGE_COVERS_BYTES == 0
        and layout.live_at >= _HEADS * HEAD_BYTES
        and layout.live_at + map_bytes <= layout.durable_at
        and layout.durable_at + map_bytes <= layout.data_at
        and file_bytes(layout) < 1 << 63
    )
