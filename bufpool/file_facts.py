"""What the kernel says about an open file: the block that direct I/O demands, a block device's sizes."""

import os

import msgspec

from ublkpool.bufpool._fileio import ffi, lib


def direct_alignment(file: int) -> int:
    """The logical block that O_DIRECT on this file demands, 0 if the file system does not say or cannot."""
    memory, offset = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    if lib.file_direct_alignment(file, memory, offset):
        return 0
    return max(int(memory[0]), int(offset[0])) if offset[0] else 0


class BlockDevice(msgspec.Struct, frozen=True):
    """What the kernel says about a block device, in bytes."""

    size_bytes: int
    logical_block_bytes: int
    physical_block_bytes: int


def block_device(file: int) -> BlockDevice:
    """Ask a block device for its sizes."""
    size, logical, physical = ffi.new("uint64_t *"), ffi.new("uint32_t *"), ffi.new("uint32_t *")
    error = lib.file_block_device(file, size, logical, physical)
    if error:
        raise OSError(-error, os.strerror(-error))
    return BlockDevice(int(size[0]), int(logical[0]), int(physical[0]))
