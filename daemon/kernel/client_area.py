"""A device's client area: memory whose slices clients use as their I/O buffers, so that no data is copied.

Owns the slices' files, one sealed memfd each, so that a client sees its own slice only.  They are registered with the
driver once (`ublk/control.py`); `device/clients.py` lends them.
"""

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import msgspec

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.memory_room import check_room
from ublkpool.bufpool.packets import receive_packet, send_packet
from ublkpool.bufpool.seals import is_sealed
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel.allocation import AT_ONCE_BYTES_MAX, allocate_beside
from ublkpool.daemon.kernel.control_process import ControlFailed, ControlRunner
from ublkpool.daemon.processes.held_names import slice_name
from ublkpool.daemon.processes.open_files import FileId, file_id, open_memfds
from ublkpool.daemon.settings.config import CLIENT_SLICES
from ublkpool.ublk import mappings

_log = logging.getLogger("ublkpool.device")
NAME = "ublkpool-clients"
"""Of the slices' files, by which a daemon finds its predecessor's: it never changes."""
FIND_DEADLINE_S = 600.0
"""Requests in slices that were not found fail.  Nothing in the search waits for a file system."""
USER_UNKNOWN = -1
"""In place of a user: an earlier user may still have the slice, so it is lent to no client any more."""


class AreaRecord(msgspec.Struct, frozen=True):
    """What the next daemon needs to find the slices again."""

    slice_bytes: int
    files: tuple[FileId | None, ...]
    users: tuple[int | None, ...] = ()
    """The user whose clients had each slice, None if no client had it; an earlier version wrote an empty tuple."""


class ClientArea:
    """The slices by number."""

    def __init__(self, slice_bytes: int, files: Mapping[int, int]) -> None:
        """Takes the descriptors over."""
        self.slice_bytes = slice_bytes
        self.files = dict(files)
        self.users: dict[int, int] = {}
        """The user whose clients have had a slice; `USER_UNKNOWN` if it is not known which."""

    @classmethod
    async def create(cls, runner: ControlRunner, device: str, size_bytes: int) -> Self:
        """New slices, zeroed and fully allocated, by another process if they are large.  Raises `DaemonError`."""
        area = cls(size_bytes // CLIENT_SLICES, {})
        try:
            check_room("client_buffers", size_bytes, "lower client_buffers, or set it to 0")
            for number in range(CLIENT_SLICES):
                area.files[number] = mappings.sealable_memory(NAME)
            await area._allocate(runner, device)
        except PoolError as error:
            raise DaemonError(str(error)) from error
        except (OSError, ControlFailed) as error:
            area.close()
            code = error.errno
            reason = os.strerror(code) if code else str(error)
            raise DaemonError(
                f"no memory for client_buffers of {size_bytes} bytes ({reason}): lower it, or set it to 0"
            ) from error
        except BaseException:
            area.close()
            raise
        return area

    async def _allocate(self, runner: ControlRunner, device: str) -> None:
        """Raises `OSError`, `ControlFailed`."""
        if self.slice_bytes * CLIENT_SLICES <= AT_ONCE_BYTES_MAX:
            self._fill()
            return
        what = f"{device}: its client buffers cannot be allocated"
        await allocate_beside(runner, device, what, self._fill, self.descriptors())

    def _fill(self) -> str:
        """Allocate and seal every slice; an empty text.  Raises `OSError`."""
        for fd in self.descriptors():
            mappings.allocate_sealed(fd, self.slice_bytes)
        return ""

    @classmethod
    async def find(
        cls, runner: ControlRunner, record: AreaRecord, device: str, held: Mapping[str, int]
    ) -> Self:
        """An earlier daemon's slices: from the holder, else from a process that still has them open.

        A slice that no process has is lost: the driver keeps its pages, and no process can map them.  Requests that a
        dead client had in flight there fail.  A slice that was found at a process is never lent again: its open file
        here is one that the kernel counts, so the kernel's count cannot tell it from a client's
        (`open_files.is_open_elsewhere`).
        """
        area = cls(record.slice_bytes, {})
        known = record.users or (USER_UNKNOWN,) * CLIENT_SLICES
        area.users = {number: user for number, user in enumerate(known) if user is not None}
        missing: dict[int, FileId] = {}
        for number, wanted in enumerate(record.files):
            fd = held.get(slice_name(device, number))
            if fd is not None:
                area.files[number] = os.dup(fd)
            elif wanted is not None:
                missing[number] = wanted
        if missing:
            found = await _find_elsewhere(runner, device, missing, record.slice_bytes)
            # `segments` and `descriptors` are in the order of the numbers.
            area.files = dict(sorted({**area.files, **found}.items()))
            area.users.update(dict.fromkeys(found, USER_UNKNOWN))
        return area

    def record(self) -> AreaRecord:
        """The record by which `find` finds the slices."""
        numbers = range(CLIENT_SLICES)
        return AreaRecord(
            self.slice_bytes, tuple(map(self._id_of, numbers)), tuple(map(self.users.get, numbers))
        )

    def _id_of(self, number: int) -> FileId | None:
        return file_id(os.fstat(self.files[number])) if number in self.files else None

    @property
    def bits(self) -> int:
        """The numbers of the slices, as a bit mask."""
        return sum(1 << number for number in self.files)

    def segments(self) -> tuple[wire.Segment, ...]:
        """The slices as a backend is told of them."""
        return tuple(
            wire.Segment(number=wire.SEGMENT_CLIENTS + number, size_bytes=self.slice_bytes)
            for number in self.files
        )

    def descriptors(self) -> list[int]:
        """The slices' descriptors, in the order of `segments`."""
        return list(self.files.values())

    @contextmanager
    def mapped(self) -> Iterator[Sequence[Any]]:
        """All slices, mapped in this process, and in a child that it forks meanwhile."""
        memory: list[Any] = []
        try:
            memory.extend(mappings.map_segment(fd, self.slice_bytes) for fd in self.files.values())
            yield memory
        finally:
            for each in memory:
                mappings.unmap_segment(each, self.slice_bytes)

    def close(self) -> None:
        """Close the slices' descriptors."""
        for fd in self.files.values():
            os.close(fd)
        self.files = {}


async def _find_elsewhere(
    runner: ControlRunner, device: str, missing: Mapping[int, FileId], size_bytes: int
) -> dict[int, int]:
    """The slices that other processes have open; another process searches, since a machine may have many processes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    spared = os.getpid()
    with ours, theirs:
        try:
            count = await runner.look(
                device,
                f"{device}: looking for its client buffers",
                lambda: _send_open(theirs, missing, size_bytes, spared),
                int,
                FIND_DEADLINE_S,
                keep_fds=[theirs.fileno()],
            )
        except ControlFailed as error:
            _log.error("%s", error)
            return {}
        return dict(_receive_slice(ours) for _ in range(count))


def _receive_slice(ours: socket.socket) -> tuple[int, int]:
    packet, fd = receive_packet(ours, 1)
    assert fd is not None
    return packet[0], fd


def _send_open(theirs: socket.socket, missing: Mapping[int, FileId], size_bytes: int, spared: int) -> int:
    """Runs in the disposable process: send each slice that was found with its number; the count."""
    found = _open_elsewhere(missing, size_bytes, spared)
    for number, fd in found.items():
        send_packet(theirs, bytes([number]), fd)
    return len(found)


def _open_elsewhere(missing: Mapping[int, FileId], size_bytes: int, spared: int) -> dict[int, int]:
    """A descriptor of each slice that another process has open and whose size and seals are unchanged."""
    numbers = {file: number for number, file in missing.items()}
    found: dict[int, int] = {}
    for path in open_memfds(NAME, [spared]):
        if len(found) == len(missing):
            break
        with suppress(OSError):
            number = numbers.get(file_id(path.stat()))
            if (
                number is not None
                and number not in found
                and (fd := _open_slice(path, size_bytes)) is not None
            ):
                found[number] = fd
    return found


def _open_slice(path: Path, size_bytes: int) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    with suppress(OSError):
        if is_sealed(fd) and os.fstat(fd).st_size == size_bytes:
            return fd
    os.close(fd)
    return None
