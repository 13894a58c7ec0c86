"""For programs that use a disk: I/O buffers that its backend shares, so that what is read and written is not copied.

    with ClientBuffer.open("vol0") as buffer:
        disk = os.open(buffer.path, os.O_RDWR | os.O_DIRECT)
        buffer.view[:4096] = b"x" * 4096
        os.pwritev(disk, [buffer.view[:4096]], 0)

Owns the connection to the daemon, which is the lease, and the memory.  Where there is no such memory (a kernel without
SHMEM_ZC, `client_buffers` not set, all of it lent) it is ordinary memory, and everything works as it does with any
other.
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
    """Memory for I/O with one disk, page by page aligned, until `close`."""

    def __init__(self, path: str, descriptor: int, size_bytes: int, lease: socket.socket | None) -> None:
        """Takes over descriptor and connection; see `open`."""
        self.path = path
        """The disk."""
        self.descriptor = descriptor
        """The memory's file, for whoever wants to map it again: other processes of yours, or a program that maps a
        file, as `/proc/PID/fd/N`."""
        self.size_bytes = size_bytes
        self.is_shared = lease is not None
        """Whether its backend shares it, so that direct I/O of whole blocks is not copied."""
        self._lease = lease
        self._map = mmap.mmap(descriptor, size_bytes)
        self.view = memoryview(self._map)
        """All of it.  A client that had it before may have left something."""

    @classmethod
    def open(cls, device: str, size_bytes: int = DEFAULT_BYTES, *, run_dir: Path = RUN_DIR_DEFAULT) -> Self:
        """A buffer for the device of this name.

        Shared memory comes in the size that the daemon has it, ordinary memory in `size_bytes`.  Raises `AttachRefused`
        with the daemon's reason, `BackendError` without a daemon, `WireError` for an answer that makes no sense.
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
        """For a program that replaces this one: it inherits memory and lease, and has them until it ends."""
        os.set_inheritable(self.descriptor, True)
        if self._lease is not None:
            self._lease.set_inheritable(True)

    def close(self) -> None:
        """Give it back.  No I/O may be under way with it, and no view of it left; a process's end does the same."""
        with suppress(BufferError):
            self.view.release()
            self._map.close()
        os.close(self.descriptor)
        # Last: what still has the memory when the lease ends is a reason not to lend it again.
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
