"""Facts of the kernel about an open file: the block that direct I/O needs, a block device's sizes, its handle."""

import os

import msgspec

from ublkpool.bufpool.engine._engine import ffi, lib


def direct_alignment(file: int) -> int:
    """The logical block, in bytes, that O_DIRECT on this file needs; 0 if the file system does not say or has none."""
    memory, offset = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    if lib.file_direct_alignment(file, memory, offset):
        return 0
    return max(int(memory[0]), int(offset[0])) if offset[0] else 0


class BlockDevice(msgspec.Struct, frozen=True):
    """Sizes of a block device, in bytes."""

    size_bytes: int
    logical_block_bytes: int
    physical_block_bytes: int


def block_device(file: int) -> BlockDevice:
    """Ask an open block device for its sizes.  Raises `OSError`."""
    size, logical, physical = ffi.new("uint64_t *"), ffi.new("uint32_t *"), ffi.new("uint32_t *")
    error = lib.file_block_device(file, size, logical, physical)
    if error:
        raise OSError(-error, os.strerror(-error))
    return BlockDevice(int(size[0]), int(logical[0]), int(physical[0]))


_HANDLE_BYTES_MAX = 128


def file_handle(file: int) -> str:
    """The file's handle in hexadecimal, with its type; empty if its file system has none.

    It names the inode and, on most file systems, its generation: a new file that gets the inode number of a removed one
    has another handle (name_to_handle_at(2), `i_generation`).
    """
    memory, size, kind = (
        ffi.new("uint8_t[]", _HANDLE_BYTES_MAX),
        ffi.new("uint32_t *", _HANDLE_BYTES_MAX),
        ffi.new("int32_t *"),
    )
    if lib.file_handle(file, memory, size, kind):
        return ""
    return f"{int(kind[0]):x}-{bytes(ffi.buffer(memory, int(size[0]))).hex()}"


def file_system_magic(file: int) -> int:
    """Which file system a file is in (statfs(2), `f_type`).  Raises `OSError`."""
    magic = ffi.new("uint64_t *")
    if error := lib.file_system_magic(file, magic):
        raise OSError(-error, os.strerror(-error))
    return int(magic[0])


def file_birth_ns(file: int) -> int:
    """When the file was made, in nanoseconds since 1970; 0 if the file system does not say."""
    seconds, nanoseconds = ffi.new("int64_t *"), ffi.new("uint32_t *")
    if lib.file_birth(file, seconds, nanoseconds):
        return 0
    return int(seconds[0]) * 1_000_000_000 + int(nanoseconds[0])
