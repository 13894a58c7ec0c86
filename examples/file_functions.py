"""A backend without a class: a file, in functions.

    ublkpool backend examples/file_functions.py --device demo path=/srv/disk.img

A write is answered when `pwrite` returns: then it is in the page cache, where it survives this process.  `open_alone`
ensures that no other server, mount or volume manager writes to the file or block device; because of `identity` the
daemon refuses a successor that opens another file.  A file that is cut while it is served ends the backend before a
write is answered, since that write would grow the file again, with zeros in place of the lost data.
"""

import os
from pathlib import Path

from ublkpool.bufpool.sdk.claim import open_alone
from ublkpool.bufpool.sdk.store_identity import identify
from ublkpool.bufpool.wire import Identity

file, size = -1, 0
store = Path()


def open(path: str) -> None:
    global file, size, store
    store = Path(path)
    file = open_alone(store, os.O_RDWR | os.O_CLOEXEC)
    size = get_size()


def get_size() -> int:
    return os.lseek(file, 0, os.SEEK_END)


def identity() -> Identity:
    return identify(file, store)


def check_is_whole() -> None:
    if get_size() < size:
        raise SystemExit(f"{store} became shorter than its device: bring back what it has lost")


def pread(buf: memoryview, offset: int) -> int:
    return os.preadv(file, [buf], offset)


def pwrite(buf: memoryview, offset: int) -> int:
    check_is_whole()
    written = os.pwrite(file, buf, offset)
    check_is_whole()
    return written


def flush() -> None:
    os.fdatasync(file)


def resize(size_bytes: int) -> None:
    """`ublkpool resize`: answered when the new size is on the disk, and called on a thread of its own."""
    global size
    check_is_whole()
    if get_size() < size_bytes:
        os.ftruncate(file, size_bytes)
    os.fsync(file)
    size = max(size, size_bytes)


def close() -> None:
    os.close(file)
