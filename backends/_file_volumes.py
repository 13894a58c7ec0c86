"""Files as volumes: sparse, locked by the process that serves them, cloned where the file system can share blocks.

A new file gets its name when it is complete and on the disk, so that an interrupted clone leaves no volume.
"""

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from ublkpool.backends.file import refuse_below_dev
from ublkpool.bufpool.sdk import store_users
from ublkpool.bufpool.sdk.volumes import Progress, Volume, VolumeError, Volumes, whole_blocks
from ublkpool.bufpool.sizes import format_size

_FICLONE = 0x40049409
_STEP_BYTES = 16 << 20
_NO_COPY_IN_THE_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class FileVolumeOptions(msgspec.Struct, frozen=True):
    """The file; for `list` the directory."""

    path: Path


class FileVolumes(Volumes):
    """Regular files."""

    kind = "file"
    Options = FileVolumeOptions

    def __init__(self, options: FileVolumeOptions) -> None:
        self.path = options.path

    def create(self, size_bytes: int) -> str:
        """See `Volumes`: a sparse file that only its owner may read."""
        with new_file(self.path) as file:
            os.ftruncate(file, whole_blocks(size_bytes))
        return f"path={self.path}"

    def list(self) -> list[Volume]:
        """See `Volumes`: the regular files of the directory, not of those below it."""
        if not self.path.is_dir():
            raise VolumeError(f"path={self.path}: no directory: list shows the files of one")
        found = []
        for each in sorted(self.path.iterdir()):
            # A file may be deleted meanwhile.
            with suppress(FileNotFoundError):
                status = each.stat()
                if stat.S_ISREG(status.st_mode) and not each.name.startswith("."):
                    found.append(described(each, status))
        return found

    def resize(self, size_bytes: int) -> int:
        """See `Volumes`: sparse."""
        with alone(self.path, os.O_RDWR) as file:
            before_bytes = os.fstat(file).st_size
            if whole_blocks(size_bytes) < before_bytes:
                raise VolumeError(
                    f"path={self.path}: has {format_size(before_bytes)} ({before_bytes} bytes), and a volume never "
                    "shrinks: its end would be lost"
                )
            os.ftruncate(file, size_bytes)
            os.fsync(file)
        return before_bytes

    def snapshot(self, name: str) -> str:
        """See `Volumes`."""
        raise VolumeError(
            f"path={self.path}: a file has no snapshots; `ublkpool volume clone file path={self.path} --to PATH` "
            "copies it, at once on btrfs and XFS"
        )

    def clone(self, target: str, progress: Progress) -> str:
        """See `Volumes`: the blocks are shared where the file system can, else copied, and holes stay holes."""
        with alone(self.path, os.O_RDONLY) as source, new_file(Path(target)) as file:
            try:
                fcntl.ioctl(file, _FICLONE, source)
            except OSError:
                _copy(source, file, progress)
        return f"path={target}"

    def delete(self) -> None:
        """See `Volumes`."""
        with alone(self.path, os.O_RDWR) as file:
            # Another command may have replaced it before the lock was there.
            if not os.path.samestat(self.path.stat(), os.fstat(file)):
                raise VolumeError(f"path={self.path}: was replaced by another file just now: try again")
            self.path.unlink()
        sync_directory(self.path)


def described(path: Path, status: os.stat_result) -> Volume:
    users = [store_users.name_process(pid) for pid in store_users.lockers(path)]
    users += store_users.users_without_a_claim(path)
    return Volume(
        name=path.name, size_bytes=status.st_size, used_bytes=status.st_blocks * 512, users=tuple(users)
    )


@contextmanager
def alone(path: Path, flags: int, option: str = "path") -> Iterator[int]:
    """The open file, locked: alone if it is opened for writing, else with other readers.  Raises `VolumeError`."""
    try:
        # Opening a FIFO would wait for its other end.
        file = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise VolumeError(f"{option}={path}: no such volume") from None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise VolumeError(f"{option}={path}: not a regular file: only files are volumes")
        shared = flags & os.O_ACCMODE == os.O_RDONLY
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(
                f"{option}={path}", map(store_users.name_process, store_users.lockers(path))
            ) from None
        if users := store_users.users_without_a_claim(path):
            raise _in_use(f"{option}={path}", users)
        yield file
    finally:
        os.close(file)


def _in_use(what: str, users: Iterator[str] | list[str]) -> VolumeError:
    who = ", ".join(users) or "a process that cannot be seen from here"
    return VolumeError(
        f"{what}: in use by {who}: end that first (`ublkpool del` if it serves a device; `ublkpool resize` grows "
        "a live one)"
    )


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A file that gets this name, which must be free, once the block has filled it and it is synced."""
    refuse_below_dev(path)
    _refuse_existing(path)
    directory = path.resolve().parent
    if not directory.is_dir():
        raise VolumeError(f"path={path}: no directory {directory}: make it first")
    file, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=directory)
    try:
        yield file
        os.fsync(file)
        try:
            # Unlike a rename, this replaces nothing.
            Path(path).hardlink_to(partial)
        except FileExistsError:
            _refuse_existing(path)
    finally:
        os.close(file)
        Path(partial).unlink()
    sync_directory(path)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise VolumeError(f"path={path}: exists already: choose another name, or delete that one first")


def sync_directory(path: Path) -> None:
    directory = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _copy(source: int, target: int, progress: Progress) -> None:
    """Copy everything but the holes."""
    size_bytes = os.fstat(source).st_size
    os.ftruncate(target, size_bytes)
    at = 0
    while at < size_bytes and (data := next_data(source, at)) is not None:
        at, end = data
        while at < end:
            copied = copy_part(source, target, at, at, min(_STEP_BYTES, end - at))
            if copied == 0:
                raise VolumeError("the file that is cloned became shorter meanwhile: try again")
            at += copied
            progress(at, size_bytes)


def next_data(file: int, at: int) -> tuple[int, int] | None:
    """Where the next data begins and ends; None if only a hole follows."""
    try:
        start = os.lseek(file, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
    return start, os.lseek(file, start, os.SEEK_HOLE)


def copy_part(source: int, target: int, source_at: int, target_at: int, length: int) -> int:
    """Copy some of the bytes, shared where the file system can; returns how many, 0 at the source's end."""
    try:
        return os.copy_file_range(source, target, length, source_at, target_at)
    except OSError as error:
        if error.errno not in _NO_COPY_IN_THE_KERNEL:
            raise
    data = os.pread(source, min(length, 1 << 20), source_at)
    return os.pwrite(target, data, target_at)
