"""A regular file or a block device, served by the native engine straight between the pool's memory and the file.

Owns the open file and its lock (`bufpool/sdk/claim.py`).  For a device that was never served it creates a missing file,
sparse, or gives an empty one its size; later a missing or empty file is an error, since a new one would read as zeros.
A write is answered when it is in the page cache or, with direct I/O, on the disk: either way outside this process.
Opening waits for the lock, which the kernel keeps until a dead predecessor's last I/O has ended.
"""

import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path
from typing import Literal

import msgspec

from ublkpool.bufpool.engine.file_facts import block_device, direct_alignment
from ublkpool.bufpool.engine.native import FileStorage, NativeEngine, slot_bytes
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Device, FrameEngine, Hint, Properties, log
from ublkpool.bufpool.sdk.claim import lock, open_exclusively, refuse_own_disk
from ublkpool.bufpool.sdk.inside import Growth, refuse_another
from ublkpool.bufpool.sdk.properties import Inside
from ublkpool.bufpool.sdk.store_identity import identify
from ublkpool.bufpool.sizes import ByteSize, format_size
from ublkpool.bufpool.way_out import explain
from ublkpool.bufpool.wire import Identity

_DEV, _DEV_SHM = Path("/dev"), Path("/dev/shm")
_BLOCK_BYTES_MIN = 512
_BLOCK_BYTES_MAX = 4096
_DISCARD_GRANULARITY_BYTES = 4096


class FileOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`size` (default: the device's) creates a missing file, sparse; of a larger one the first `size` bytes are served.

    `placement` auto takes the device's placement, `direct` auto uses O_DIRECT where the file system supports it.
    """

    path: Path
    size: ByteSize = 0
    direct: Literal["auto", "on", "off"] = "auto"
    readonly: bool = False
    placement: Literal["auto", "pool", "backend", "any"] = "auto"
    segment: ByteSize = 64 << 20


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """An open file and its block sizes, in bytes."""

    file: int
    size_bytes: int
    logical_block_bytes: int
    physical_block_bytes: int
    is_block_device: bool
    direct: bool
    identity: Identity


class FileBackend(Backend):
    """A regular file or a block device."""

    Options = FileOptions
    volumes = "ublkpool.backends._file_volumes:FileVolumes"

    def __init__(self, options: FileOptions) -> None:
        self.options: FileOptions = options
        self._opened: Opened | None = None
        self._device: Device | None = None

    def open(self, hint: Hint) -> Properties:
        """Open, lock and measure the file."""
        options = self.options
        refuse_own_disk(options.path, hint.node)
        accepted_bytes = (options.size or hint.size_bytes) if hint.takes_next else None
        options = msgspec.structs.replace(options, size=hint.asked_bytes(options.size))
        self._opened = opened = open_file(options, hint.may_create, accepted_bytes)
        placement = hint.placement if options.placement == "auto" else options.placement
        return Properties(
            size_bytes=opened.size_bytes,
            logical_block_bytes=opened.logical_block_bytes,
            physical_block_bytes=opened.physical_block_bytes,
            volatile_cache=True,
            read_only=options.readonly,
            discard_granularity_bytes=max(_DISCARD_GRANULARITY_BYTES, opened.logical_block_bytes),
            discard_max_bytes=0 if options.readonly else opened.size_bytes,
            write_zeroes_max_bytes=0 if options.readonly else opened.size_bytes,
            placement=placement,
            segment_bytes=options.segment if placement != "pool" else 0,
            identity=opened.identity,
        )

    def engine(self, device: Device) -> FrameEngine:
        """The native engine on the open file."""
        opened, self._device = self._opened, device
        assert opened is not None
        needed_bytes = slot_bytes(device.max_io_bytes)
        if device.placement == "backend" and len(device.own) < needed_bytes:
            raise BackendError(
                f"segment={format_size(len(device.own))} is less than one write of {format_size(needed_bytes)}"
            )
        if device.size_bytes > opened.size_bytes:
            raise BackendError(
                f"{self.options.path} has {format_size(opened.size_bytes)}, "
                f"device {device.name} {format_size(device.size_bytes)}"
            )
        log.info("%s: %s I/O", self.options.path, "direct" if opened.direct else "buffered")
        storage = FileStorage(opened.file, opened.is_block_device)
        return NativeEngine(device, storage, read_only=self.options.readonly)

    def open_inside(self, hint: Hint, kept: int | None) -> Inside:
        """Open, lock and measure the file for a device's workers; see `bufpool/sdk/inside.py`."""
        properties, opened = self.open(hint), self._opened
        assert opened is not None
        return Inside(properties, FileStorage(opened.file, opened.is_block_device), (opened.file,))

    def grow_inside(self, growth: Growth) -> None:
        """Grow the file that a device's workers have open; see `bufpool/sdk/inside.py`."""
        options = self.options
        file = os.open(options.path, (os.O_RDONLY if options.readonly else os.O_RDWR) | os.O_CLOEXEC)
        try:
            refuse_another(growth, identify(file, options.path), f"path={options.path}")
            opened = _measure(file, False, msgspec.structs.replace(options, size=0), False, None)
            grow(opened, options, growth.served_bytes, growth.wanted_bytes)
        finally:
            os.close(file)

    def resize(self, size_bytes: int) -> None:
        """Grow the file, allocated or sparse as it was made; a block device must have grown already."""
        assert self._opened is not None and self._device is not None
        grow(self._opened, self.options, self._device.size_bytes, size_bytes)

    def close(self) -> None:
        """Close the file, and with it release its lock."""
        if self._opened is not None:
            os.close(self._opened.file)
            self._opened = None


def open_file(options: FileOptions, may_create: bool = True, accepted_bytes: int | None = None) -> Opened:
    """Open as the options say; with `may_create` and a size, make the file if there is none.

    With `accepted_bytes` a file with less than the options' size is served up to this size (0: as a whole): the
    operator accepted it.

    Raises `BackendError` naming the path and what is wrong.
    """
    try:
        file, direct = _open_descriptor(options, may_create)
    except OSError as error:
        raise BackendError(f"path={options.path}: {explain(error)}") from error
    try:
        lock(file, options.path, shared=options.readonly)
        return _measure(file, direct, options, may_create, accepted_bytes)
    except OSError as error:
        os.close(file)
        raise BackendError(f"path={options.path}: {explain(error)}") from error
    except BaseException:
        os.close(file)
        raise


def _open_descriptor(options: FileOptions, may_create: bool) -> tuple[int, bool]:
    flags = (os.O_RDONLY if options.readonly else os.O_RDWR) | os.O_CLOEXEC
    if not options.path.exists():
        flags |= _create_flags(options, may_create)
    else:
        # Before it is opened: opening a FIFO waits for a writer, opening a watchdog starts it.
        _check_type(options.path.stat(), options)
    if options.direct != "off":
        try:
            return open_exclusively(options.path, flags | os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL or options.direct == "on":
                raise
    return open_exclusively(options.path, flags), False


def _create_flags(options: FileOptions, may_create: bool) -> int:
    if not may_create:
        raise BackendError(
            f"path={options.path}: no such file, and this device has been served before: no empty one is made; "
            "bring the file back (ublkpool rebind accepts another in its place)"
        )
    if not options.size or options.readonly:
        raise BackendError(f"path={options.path}: no such file; with size=SIZE it is created")
    refuse_below_dev(options.path)
    return os.O_CREAT


def refuse_below_dev(path: Path) -> None:
    """Raise `BackendError` for a missing node of a block device: as a file in devtmpfs it would end with the boot."""
    place = path.resolve()
    if place.is_relative_to(_DEV) and not place.is_relative_to(_DEV_SHM):
        raise BackendError(
            f"path={path}: no such block device, and no file is made below {_DEV}: its content would be in "
            "memory and end with the boot; correct the path, or attach the disk"
        )


def _check_type(status: os.stat_result, options: FileOptions) -> None:
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        raise BackendError(f"path={options.path}: neither a regular file nor a block device")


def _measure(
    file: int, direct: bool, options: FileOptions, may_create: bool, accepted_bytes: int | None
) -> Opened:
    status = os.fstat(file)
    if stat.S_ISBLK(status.st_mode):
        options = _accepting(options, block_device(file).size_bytes, accepted_bytes)
        return _measure_block_device(file, direct, options)
    _check_type(status, options)
    size_bytes = status.st_size
    if size_bytes == 0 and not may_create:
        raise BackendError(
            f"path={options.path}: the file is empty, and this device has been served before: it is not grown; "
            "bring the content back"
        )
    if size_bytes:
        options = _accepting(options, size_bytes, accepted_bytes)
    if size_bytes == 0 and options.size and not options.readonly:
        refuse_below_dev(options.path)
        _give_size(file, options)
        size_bytes = options.size
    block_bytes = _direct_block_bytes(file, options) if direct else _BLOCK_BYTES_MIN
    if block_bytes == 0:
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)
        direct, block_bytes = False, _BLOCK_BYTES_MIN
    return Opened(
        file=file,
        size_bytes=_agreed_size(size_bytes, block_bytes, options),
        logical_block_bytes=block_bytes,
        physical_block_bytes=max(4096, block_bytes),
        is_block_device=False,
        direct=direct,
        identity=identify(file, options.path),
    )


def _accepting(options: FileOptions, found_bytes: int, accepted_bytes: int | None) -> FileOptions:
    """The options, with the accepted size if the store has less than they ask for."""
    if accepted_bytes is None or found_bytes >= options.size:
        return options
    log.warning(
        "%s: has %d bytes, fewer than the %d to which the device was grown: served as it is, since the operator "
        "accepted this store with rebind",
        options.path,
        found_bytes,
        options.size,
    )
    return msgspec.structs.replace(options, size=accepted_bytes)


def _give_size(file: int, options: FileOptions) -> None:
    """Give a new file its size and sync file and directory, before the device counts as served."""
    os.ftruncate(file, options.size)
    os.fsync(file)
    directory = os.open(options.path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def grow(opened: Opened, options: FileOptions, served_bytes: int, wanted_bytes: int) -> None:
    """Make the store at least `wanted_bytes` large, of which `served_bytes` are served now, and sync it.

    Raises `BackendError`, `OSError`.
    """
    if opened.is_block_device:
        found_bytes = block_device(opened.file).size_bytes
        if found_bytes < wanted_bytes:
            raise BackendError(
                f"path={options.path}: the block device has {format_size(found_bytes)} ({found_bytes}): "
                "grow it first (lvextend, for example), then try again"
            )
        return
    status = os.fstat(opened.file)
    if status.st_size < served_bytes:
        raise BackendError(
            f"path={options.path}: has {status.st_size} bytes, fewer than the device: growing it would hide the loss"
        )
    if status.st_size < wanted_bytes:
        if options.readonly:
            raise BackendError(f"path={options.path}: has {status.st_size} bytes, and readonly keeps it so")
        if status.st_blocks * 512 >= status.st_size:
            _allocate(opened.file, status.st_size, wanted_bytes, options)
        else:
            os.ftruncate(opened.file, wanted_bytes)
    if not options.readonly:
        os.fsync(opened.file)


def _allocate(file: int, before_bytes: int, wanted_bytes: int, options: FileOptions) -> None:
    """Grow the file by allocated blocks, or leave it as it was.  Raises `BackendError`, `OSError`."""
    room = os.fstatvfs(file)
    free_bytes = room.f_bavail * room.f_frsize
    if wanted_bytes - before_bytes > free_bytes:
        raise BackendError(
            f"path={options.path}: its file system has {format_size(free_bytes)} ({free_bytes} bytes) left, and "
            f"growing needs {wanted_bytes - before_bytes} bytes: make room first"
        )
    try:
        os.posix_fallocate(file, before_bytes, wanted_bytes - before_bytes)
    except OSError:
        # What was allocated before the error would be missing to every other store on that file system.
        os.ftruncate(file, before_bytes)
        raise


def _measure_block_device(file: int, direct: bool, options: FileOptions) -> Opened:
    found = block_device(file)
    if found.logical_block_bytes > _BLOCK_BYTES_MAX:
        raise BackendError(
            f"path={options.path}: its logical block of {found.logical_block_bytes} is too large"
        )
    return Opened(
        file=file,
        size_bytes=_agreed_size(found.size_bytes, found.logical_block_bytes, options),
        logical_block_bytes=found.logical_block_bytes,
        physical_block_bytes=max(found.physical_block_bytes, found.logical_block_bytes),
        is_block_device=True,
        direct=direct,
        identity=identify(file, options.path),
    )


def _agreed_size(found_bytes: int, block_bytes: int, options: FileOptions) -> int:
    """The bytes to serve: the `size` option, or the whole store, in whole blocks.  Raises `BackendError`."""
    asked_bytes = options.size
    if asked_bytes > found_bytes:
        raise BackendError(
            f"path={options.path}: has {found_bytes} bytes, fewer than size={format_size(asked_bytes)} "
            f"({asked_bytes}): make it as large again, or correct the path"
        )
    served_bytes = (asked_bytes or found_bytes) // block_bytes * block_bytes
    if served_bytes == 0:
        raise BackendError(f"path={options.path}: has {found_bytes} bytes, not one block; give size=SIZE")
    if served_bytes < found_bytes:
        _log_what_is_not_served(found_bytes, served_bytes, options)
    return served_bytes


def _log_what_is_not_served(found_bytes: int, served_bytes: int, options: FileOptions) -> None:
    if options.size:
        log.warning("%s: has %d bytes; the first %d are served", options.path, found_bytes, served_bytes)
    else:
        unserved_bytes = found_bytes - served_bytes
        log.warning("%s: the last %d bytes are not a block and not served", options.path, unserved_bytes)


def _direct_block_bytes(file: int, options: FileOptions) -> int:
    """The smallest block, in bytes, that direct I/O on a file accepts; 0 without any: I/O is then buffered."""
    announced = direct_alignment(file)
    block_bytes = max(announced, _BLOCK_BYTES_MIN) if announced else _smallest_direct_read(file)
    if 0 < block_bytes <= _BLOCK_BYTES_MAX:
        return block_bytes
    if options.direct == "on":
        raise BackendError(
            f"path={options.path}: direct=on, but this file system cannot; direct=auto or off can"
        )
    return 0


def _smallest_direct_read(file: int) -> int:
    with mmap.mmap(-1, _BLOCK_BYTES_MAX) as page, memoryview(page) as memory:
        for block_bytes in (_BLOCK_BYTES_MIN, _BLOCK_BYTES_MAX):
            try:
                os.preadv(file, [memory[:block_bytes]], 0)
                return block_bytes
            except OSError:
                continue
    return 0
