"""For programs that use a disk: I/O buffers that its backend shares, so that direct I/O is not copied.

    with ClientBuffer.open("vol0") as buffer:
        disk = os.open(buffer.path, os.O_RDWR | os.O_DIRECT)
        buffer.view[:4096] = b"x" * 4096
        os.pwritev(disk, [buffer.view[:4096]], 0)

Owns the connection to the daemon, which is the lease, and the memory.  Without shared memory (a kernel without
SHMEM_ZC, a device without `client_buffers`, all slices lent) the buffer is ordinary memory, and the same program works
with a copy.
"""

import mmap
import os
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from ublkpool import RUN_DIR_DEFAULT
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import WireError
from ublkpool.bufpool.sdk.client import connect_and_ask

DEFAULT_BYTES = 4 << 20


class ClientBuffer:
    """Page-aligned memory for I/O with one disk, until `close`."""

    def __init__(self, path: str, descriptor: int, size_bytes: int, lease: socket.socket | None) -> None:
        """Takes over descriptor and connection; see `open`."""
        self.path = path
        """The disk."""
        self.descriptor = descriptor
        """The memory's file, to map it again: in other processes of yours, or in a program that maps files, as
        `/proc/PID/fd/N`."""
        self.size_bytes = size_bytes
        self.is_shared = lease is not None
        """Whether the backend shares it, so that direct I/O of whole blocks is not copied."""
        self._lease = lease
        self._map = mmap.mmap(descriptor, size_bytes)
        self.view = memoryview(self._map)
        """The whole memory.  It may still hold data of an earlier client of the same user."""

    @classmethod
    def open(cls, device: str, size_bytes: int = DEFAULT_BYTES, *, run_dir: Path = RUN_DIR_DEFAULT) -> Self:
        """A buffer for the device of this name.

        Shared memory has the size of the daemon's slices, ordinary memory `size_bytes`.  Raises `AttachRefused` with
        the daemon's reason, `BackendError` without a daemon, `WireError` for an answer that is not valid.
        """
        question = wire.LeaseBuffer(v=wire.PROTOCOL_VERSION, device=device)
        connection, answer, descriptors = connect_and_ask(run_dir, question)
        if not isinstance(answer, wire.BufferLeased) or len(descriptors) != (answer.size_bytes > 0):
            connection.close()
            for each in descriptors:
                os.close(each)
            raise WireError(f"lease: an answer that makes no sense: {answer}")
        if descriptors:
            return cls(answer.path, descriptors[0], answer.size_bytes, connection)
        connection.close()
        return cls(answer.path, _ordinary(size_bytes), size_bytes, None)

    def leave_open(self) -> None:
        """Let a program that this process executes inherit memory and lease, until it ends."""
        os.set_inheritable(self.descriptor, True)
        if self._lease is not None:
            self._lease.set_inheritable(True)

    def close(self) -> None:
        """Give the memory back, when no I/O uses it and no view of it is left; the process's end does the same."""
        with suppress(BufferError):
            self.view.release()
            self._map.close()
        os.close(self.descriptor)
        # Last: the daemon does not lend a slice again while a process has it open after the end of its lease.
        if self._lease is not None:
            self._lease.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def _ordinary(size_bytes: int) -> int:
    descriptor = os.memfd_create("ublkpool-buffer", os.MFD_CLOEXEC)
    os.truncate(descriptor, size_bytes)
    return descriptor
