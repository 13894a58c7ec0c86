"""A device's request as the commands that carry it out.  Pure.

A request that is larger than the server's largest becomes several commands; a write with FUA to a server without it is
followed by a FLUSH; zeros that a server refuses are written.
"""

import errno
import itertools
from collections.abc import Iterator

from ublkpool.backends.nbd.connection import FUA, NO_HOLE, Export
from ublkpool.bufpool.sdk.backend import Request
from ublkpool.bufpool.wire import Flag, Op

_ZEROES = bytes(1 << 20)
_numbers = itertools.count()


class Command:
    """One command to the server; `number` is its place in the order in which the device sent the requests."""

    __slots__ = ("flags", "job", "length", "memory", "number", "offset", "op")

    def __init__(
        self, job: "Job | None", op: Op, offset: int, length: int, memory: memoryview | bytes, flags: int = 0
    ) -> None:
        self.number = next(_numbers)
        self.job = job
        self.op, self.offset, self.length = op, offset, length
        self.memory, self.flags = memory, flags

    @property
    def writes(self) -> bool:
        """Whether a server that dies may lose what this command has done."""
        return self.op in (Op.WRITE, Op.WRITE_ZEROES)

    @property
    def data(self) -> memoryview | bytes | None:
        """What a write leaves in the store, None for zeros."""
        return self.memory if self.op == Op.WRITE else None


class Job:
    """A request and how many of its commands have not finished."""

    __slots__ = ("_error", "_left", "_needs_flush", "request")

    def __init__(self, request: Request, export: Export) -> None:
        self.request = request
        self._left, self._error = 0, 0
        self._needs_flush = request.fua and request.op != Op.FLUSH and not export.fua and export.flush

    def commands(self, export: Export) -> list[Command]:
        """The commands to start with."""
        request = self.request
        if request.op == Op.FLUSH:
            return self._counted([Command(self, Op.FLUSH, 0, 0, b"")])
        flags = FUA if request.fua and export.fua and request.op != Op.DISCARD else 0
        if request.op == Op.WRITE_ZEROES and request.flags & Flag.NOUNMAP:
            flags |= NO_HOLE
        return self._counted(
            Command(
                self, Op(request.op), request.offset + at, length, request.buffer[at : at + length], flags
            )
            for at, length in _pieces(request.length, export.request_bytes_max)
        )

    def _counted(self, commands: "list[Command] | Iterator[Command]") -> list[Command]:
        counted = list(commands)
        self._left += len(counted)
        return counted

    def finished(self, command: Command, error: int) -> list[Command]:
        """Note that a command has finished with 0 or an errno; returns the commands that follow."""
        self._left -= 1
        if error in (errno.EOPNOTSUPP, errno.ENOTSUP) and command.op == Op.WRITE_ZEROES:
            return self._counted(
                Command(self, Op.WRITE, command.offset + at, length, _ZEROES[:length], command.flags & FUA)
                for at, length in _pieces(command.length, len(_ZEROES))
            )
        self._error = self._error or error
        if self._left:
            return []
        if self._needs_flush and not self._error:
            self._needs_flush = False
            return self._counted([Command(self, Op.FLUSH, 0, 0, b"")])
        self.request.complete(-self._error if self._error else None)
        return []


def _pieces(length: int, bytes_max: int) -> Iterator[tuple[int, int]]:
    for at in range(0, length, bytes_max):
        yield at, min(bytes_max, length - at)
