"""The trace of a device's requests: its format, and the replay that brings a store to the same content.

A trace is a file of JSON lines in the order in which the requests were done.  The first line of each process describes
the device; every other line is a request with its result and, for a write, its data.  A read has a checksum of what it
returned.
"""

import base64
import ctypes
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from ublkpool.bufpool.errors import BackendError

Operation = Literal["read", "write", "flush", "trim", "zero"]
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_ZEROES = bytes(1 << 20)


class Start(msgspec.Struct, frozen=True, tag="start", tag_field="kind"):
    """A process that began to serve the device; `size_bytes` is the disk's."""

    device: str
    size_bytes: int


class Traced(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="request", tag_field="kind"):
    """One request; `at` is in seconds since the process began to serve, `result` bytes or a negative errno."""

    at: float
    op: Operation
    offset: int = 0
    length: int = 0
    fua: bool = False
    result: int = 0
    data: str = ""
    """A write's data, in base64."""
    checksum: int = 0
    """CRC-32 of what a read returned."""


_decoder = msgspec.json.Decoder(Start | Traced)


def encode(record: Start | Traced) -> bytes:
    """The record's line."""
    return msgspec.json.encode(record) + b"\n"


def with_data(data: memoryview) -> str:
    """A write's data, as a record has it."""
    return base64.b64encode(data).decode()


def read_trace(path: Path) -> Iterator[Start | Traced]:
    """The records of a trace; a last line that a death cut short is left out.  Raises `BackendError`, `OSError`."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield _decoder.decode(line)
            except msgspec.DecodeError as error:
                if line.endswith(b"\n"):
                    raise BackendError(f"{path}:{number}: not a line of a trace: {error}") from error


class Replayed(NamedTuple):
    """What a replay did; `different` counts reads that found other content than the traced ones."""

    writes: int
    reads: int
    different: int


def replay(trace: Path, target: Path) -> Replayed:
    """Execute what a trace did with success on a file, made if it is missing, or a disk.

    Raises `BackendError` for a trace that cannot be read, `OSError` for a target that cannot be written.
    """
    counts = [0, 0, 0]
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        for record in read_trace(trace):
            if isinstance(record, Start):
                _grow(fd, record.size_bytes)
            elif record.result >= 0:
                _redo(fd, record, counts)
        os.fsync(fd)
    finally:
        os.close(fd)
    return Replayed(*counts)


def _grow(fd: int, size_bytes: int) -> None:
    """Give a file the disk's size; a block device has its own."""
    if os.lseek(fd, 0, os.SEEK_END) < size_bytes:
        os.ftruncate(fd, size_bytes)


def _redo(fd: int, record: Traced, counts: list[int]) -> None:
    if record.op == "write":
        counts[0] += 1
        _write(fd, base64.b64decode(record.data), record.offset)
    elif record.op == "zero":
        counts[0] += 1
        for start in range(record.offset, record.offset + record.length, len(_ZEROES)):
            _write(fd, _ZEROES[: record.offset + record.length - start], start)
    elif record.op == "read":
        counts[1] += 1
        found = os.pread(fd, record.result, record.offset)
        counts[2] += zlib.crc32(found) != record.checksum
    elif record.op == "trim":
        _punch(fd, record)
    else:
        os.fdatasync(fd)


def _write(fd: int, data: bytes, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(fd, data[written:], offset + written)


def _punch(fd: int, record: Traced) -> None:
    """Make a hole where the target can; what a trim leaves may be anything."""
    call = ctypes.CDLL(None).fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    call(fd, _PUNCH_HOLE | _KEEP_SIZE, record.offset, record.length)
