"""Overlays as files: making one, opening one with its base, growing it, throwing its content away.

Owns the open base, its lock, and the map in memory.
"""

import os
import stat
from pathlib import Path
from typing import NamedTuple

import msgspec

from ublkpool.backends._cow_format import (
    HEAD_BYTES,
    MAGIC,
    Head,
    file_bytes,
    new_layout,
    read_head,
    this_boot,
    write_head,
)
from ublkpool.backends._file_volumes import new_file
from ublkpool.bufpool.engine.cow import CowMap
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.claim import lock, open_alone
from ublkpool.bufpool.sizes import format_size
from ublkpool.bufpool.way_out import explain

_LOGICAL_BLOCK_BYTES = 512


class NewOverlay(NamedTuple):
    """What a new overlay is made of; `size_bytes` 0: the base's size."""

    path: Path
    base: Path
    size_bytes: int = 0


class Overlay:
    """The map of an open overlay, and its base, open and locked against writers.

    The overlay's file and its lock are the caller's.  Raises `BackendError`, which names the file and what is wrong.
    """

    def __init__(self, file: int, path: Path, base: Path | None, *, serves: bool) -> None:
        """`base` None: the one that the overlay was made on.  Without `serves` nothing is written."""
        self.path = path
        self.file = file
        self.base = -1
        try:
            self.head = read_head(file, path)
            self.base_path = base or self.head.base
            self.base = open_base(self.base_path)
            compare_base(os.fstat(self.base), self.base_path, self.head)
            refuse_short(file, path, self.head)
            self.map = self._open_map(serves)
        except OSError as error:
            self.close()
            raise BackendError(f"overlay={path}: {explain(error)}") from error
        except BaseException:
            self.close()
            raise

    def _open_map(self, serves: bool) -> CowMap:
        found = open_map(self.file, self.path, self.head)
        if serves and self.head.boot != this_boot():
            try:
                found.write_live()
                os.fdatasync(self.file)
                self.head = write_next_head(self.file, msgspec.structs.replace(self.head, boot=this_boot()))
            except BaseException:
                found.close()
                raise
        return found

    def grow(self, size_bytes: int) -> None:
        """Make the disk at least so large, also after a power failure.  Raises `BackendError`, `OSError`."""
        self.head = grown(self.file, self.path, self.head, size_bytes)

    def close(self) -> None:
        """Close the base, and with it release its lock, and free the map."""
        if hasattr(self, "map"):
            self.map.close()
        if self.base >= 0:
            os.close(self.base)
            self.base = -1


def open_map(file: int, path: Path, head: Head) -> CowMap:
    """The map that counts: the live copy in the boot that wrote it, else the durable one.  Raises as `CowMap`."""
    try:
        return CowMap(file, head.layout, trusts_live=head.boot == this_boot())
    except BackendError as error:
        raise BackendError(f"overlay={path}: {error}") from error


def refuse_short(file: int, path: Path, head: Head) -> None:
    """Raise `BackendError` if the file has lost its end."""
    if os.fstat(file).st_size < file_bytes(head.layout):
        raise BackendError(
            f"overlay={path}: is shorter than its disk: it was cut, or a reset was interrupted; bring it back, or "
            f"throw its content away with ublkpool volume reset cow overlay={path}"
        )


def write_next_head(file: int, head: Head) -> Head:
    """Write a head that follows the newest one; returns it.  Raises `BackendError`, `OSError`."""
    head = msgspec.structs.replace(head, sequence=head.sequence + 1)
    write_head(file, head)
    return head


def grown(file: int, path: Path, head: Head, size_bytes: int) -> Head:
    """Make the disk at least so large; returns the head.  Raises `BackendError`, `OSError`."""
    layout = head.layout
    if size_bytes <= layout.size_bytes:
        return head
    if size_bytes > layout.capacity_bytes:
        raise BackendError(
            f"overlay={path}: its map has room for {format_size(layout.capacity_bytes)}: commit it into a new base, "
            "and make a larger overlay on that"
        )
    refuse_short(file, path, head)
    larger = msgspec.structs.replace(layout, size_bytes=size_bytes)
    os.ftruncate(file, file_bytes(larger))
    os.fsync(file)
    return write_next_head(file, msgspec.structs.replace(head, layout=larger))


def reset(file: int, path: Path, base_path: Path | None) -> None:
    """Throw the content away; `base_path` gives the overlay another base.  Raises `BackendError`, `OSError`.

    The file is short until the end, and a short one is refused: no half of the content is ever served.
    """
    head = read_head(file, path)
    base = open_base(base_path or head.base)
    try:
        empty = empty_head(base, base_path or head.base, head.layout.size_bytes)
        os.ftruncate(file, empty.layout.live_at)
        os.fsync(file)
        write_next_head(file, msgspec.structs.replace(empty, sequence=head.sequence))
        os.ftruncate(file, file_bytes(empty.layout))
        os.fsync(file)
    finally:
        os.close(base)


def open_overlay(path: Path) -> int:
    """Open an overlay and lock it alone, waiting for a dead predecessor.  Raises `BackendError`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BackendError(f"overlay={path}: not a regular file")
        return open_alone(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise BackendError(f"overlay={path}: {explain(error)}") from error


def open_base(path: Path) -> int:
    """Open a base, locked against writers; an overlay is refused.  Raises `BackendError`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BackendError(f"base={path}: not a regular file")
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise BackendError(f"base={path}: {explain(error)}") from error
    try:
        lock(file, path, shared=True)
        if os.pread(file, len(MAGIC), 0) == MAGIC or os.pread(file, len(MAGIC), HEAD_BYTES) == MAGIC:
            raise BackendError(
                f"base={path}: is an overlay itself: commit it into a new base first (ublkpool volume commit)"
            )
    except BaseException:
        os.close(file)
        raise
    return file


def compare_base(status: os.stat_result, path: Path, head: Head) -> None:
    """Raise `BackendError` for a base that is not as it was when the overlay was made."""
    if (status.st_size, status.st_mtime_ns) == (head.layout.base_bytes, head.base_mtime_ns):
        return
    when = f"{head.base_mtime_ns // 10**9}.{head.base_mtime_ns % 10**9:09d}"
    way_out = "bring the base back"
    if status.st_size == head.layout.base_bytes:
        way_out += f", or if its content is the same: touch -d @{when} {path}"
    raise BackendError(
        f"base={path}: has changed since the overlay was made, whose blocks fit only the base of then "
        f"({head.layout.base_bytes} bytes, written at @{when}): {way_out}"
    )


def empty_head(base: int, path: Path, size_bytes: int) -> Head:
    """The head of a new overlay on an open base."""
    status = os.fstat(base)
    size_bytes = size_bytes or -(-status.st_size // _LOGICAL_BLOCK_BYTES) * _LOGICAL_BLOCK_BYTES
    if size_bytes < status.st_size:
        raise BackendError(
            f"base={path}: has {status.st_size} bytes, more than size={format_size(size_bytes)}"
        )
    if size_bytes == 0 or size_bytes % _LOGICAL_BLOCK_BYTES:
        raise BackendError(
            f"size={size_bytes}: must be a multiple of {_LOGICAL_BLOCK_BYTES} bytes, and not 0"
        )
    layout = new_layout(size_bytes, status.st_size)
    return Head(
        sequence=1, layout=layout, base=path.resolve(), base_mtime_ns=status.st_mtime_ns, boot=this_boot()
    )


def make_overlay(new: NewOverlay) -> None:
    """Make an empty overlay, which gets its name when it is complete and on the disk.  Raises `BackendError`."""
    base = open_base(new.base)
    try:
        head = empty_head(base, new.base, new.size_bytes)
        with new_file(new.path) as file:
            os.ftruncate(file, file_bytes(head.layout))
            write_head(file, head)
    except OSError as error:
        raise BackendError(f"overlay={new.path}: {explain(error)}") from error
    finally:
        os.close(base)
