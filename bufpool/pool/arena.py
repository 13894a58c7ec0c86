"""A device's pool: two shared memory segments, their names, and one open pool.

Owns names and sizes.  Must not know leases' rules, sockets or the kernel.  The daemon creates and unlinks pools;
workers get the descriptors by fork, the broker maps the control segment alone (`control.py`).

The **data** segment holds the buffers and nothing else: a memfd without a name whose size is sealed (`memory.py`).
The backend gets a descriptor of it, and the holder keeps one for the next daemon.  The **control** segment is a POSIX
shared memory object: workers inherit it, the broker is sent a descriptor, the next daemon finds it by its name; the
backend does not get it.  Both have mode 0600 and are allocated and populated before any process uses them: a missing
page would stall the kernel's copy.  An earlier version gave the data a name as well; such a pool is used as it is until
its data is replaced.

Python's `mmap` duplicates its descriptor (close-on-exec, like the original), so a mapped segment stays allocated until
`close`, even after the original descriptor is closed.
"""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

import posix_ipc

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.huge_pages import HugePages
from ublkpool.bufpool.pool.control import Control, ControlHeader, control_bytes
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.pool.memory import SHM_DIRECTORY, Data, DataPlan, huge_bytes, make_data, make_named
from ublkpool.bufpool.seals import is_sealed


def arena_prefix(instance: str, device_number: int) -> str:
    """The common prefix of the names of a device's segments; `instance` tells daemons on one machine apart.

    Raises `PoolError` for an instance that fits no name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", instance):
        raise PoolError(f"instance {instance!r} must be 1 to 64 letters, digits, dots, dashes or underscores")
    return f"/ublkpool-{instance}-{device_number}"


def list_orphans(instance: str) -> list[str]:
    """The name prefixes of this instance's pools in /dev/shm, whole or in part; `unlink_arena` takes them."""
    stem = re.escape(arena_prefix(instance, 0).removesuffix("0").removeprefix("/"))
    pattern = re.compile(rf"({stem}\d+)-(?:data|ctl)")
    names = (path.name for path in SHM_DIRECTORY.iterdir())
    return sorted({f"/{match[1]}" for name in names if (match := pattern.fullmatch(name))})


def unlink_arena(name_prefix: str) -> None:
    """Remove the names of a pool that exist; a process that has a segment open keeps its memory."""
    for name in (_data_name(name_prefix), _control_name(name_prefix)):
        _unlink(name)


def _unlink(name: str) -> None:
    with suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(name)


class Arena:
    """A device's pool: both segments open, the control segment mapped."""

    def __init__(
        self,
        data_fd: int,
        control_fd: int,
        name_prefix: str,
        huge: HugePages,
        known_huge_bytes: int | None = None,
    ) -> None:
        """Take over two open descriptors, which `close` closes.  `known_huge_bytes`: see `Data`; None: unknown.

        Raises `PoolError` if they are not a whole pool, `OSError` if one cannot be used; both are closed then.
        """
        self.data_fd = data_fd
        self.control_fd = control_fd
        self.name_prefix = name_prefix
        self.huge = huge
        try:
            for fd in (data_fd, control_fd):
                os.set_inheritable(fd, False)
            self.control = Control(control_fd)
        except (PoolError, OSError):
            self._close_fds()
            raise
        header = self.control.header
        self.device_number, self.queues = header.device_number, header.queues
        self.geometry, self.reserve = header.geometry, header.reserve
        try:
            size_bytes = self._check_data(data_fd)
            if known_huge_bytes is None:
                known_huge_bytes = 0 if huge == "off" else huge_bytes(data_fd, size_bytes)
            self.huge_bytes = known_huge_bytes
            """Bytes of the data in huge pages when the pool was made or opened here, or its data was replaced.

            0 where none were asked for.
            """
        except PoolError:
            self.close()
            raise

    def _check_data(self, fd: int) -> int:
        """Its size.  Raises `PoolError` if that is not the header's."""
        size_bytes = os.fstat(fd).st_size
        if size_bytes != self.geometry.total_bytes:
            raise PoolError(
                f"data segment has {size_bytes} bytes and its header says {self.geometry.total_bytes}"
            )
        return size_bytes

    @classmethod
    def create(
        cls,
        name_prefix: str,
        geometry: Geometry,
        queues: int,
        device_number: int,
        reserve: Sequence[int],
        huge: HugePages = "off",
        data: Data | None = None,
    ) -> Self:
        """Make, allocate and populate both segments.  `reserve`: buffers per queue, for each size of `geometry`.

        `data` was made already (`memory.make_data`); it is taken over.  Raises `PoolError` and leaves
        nothing behind.
        """
        header = ControlHeader(device_number, queues, geometry, tuple(reserve))
        page = header.pack()
        name = _control_name(name_prefix)
        if data is None:
            data = make_data(data_name(device_number), geometry.total_bytes, huge)
        try:
            control_fd = make_named(name, control_bytes(queues, geometry.slot_count))
        except BaseException:
            os.close(data.fd)
            raise
        try:
            os.pwrite(control_fd, page, 0)
        except BaseException:
            os.close(control_fd)
            os.close(data.fd)
            posix_ipc.unlink_shared_memory(name)
            raise
        return cls(data.fd, control_fd, name_prefix, huge, data.huge_bytes)

    @classmethod
    def open(cls, name_prefix: str, data_fd: int | None = None, huge: HugePages = "off") -> Self:
        """Open an existing pool: the control segment by its name, the data by a descriptor that stays the caller's.

        Without a descriptor the data is opened by the name that earlier versions gave it.  Raises `PoolError` if the
        pool does not exist or is not whole.
        """
        fds = []
        try:
            if data_fd is None:
                fds.append(posix_ipc.SharedMemory(_data_name(name_prefix)).fd)
            else:
                fds.append(os.dup(data_fd))
            fds.append(posix_ipc.SharedMemory(_control_name(name_prefix)).fd)
        except (posix_ipc.Error, OSError) as error:
            for fd in fds:
                os.close(fd)
            raise PoolError(f"pool {name_prefix} cannot be opened: {error}") from error
        return cls(fds[0], fds[1], name_prefix, huge)

    @property
    def is_sealed(self) -> bool:
        """Whether the size of the data is sealed; an earlier version did not seal it."""
        return is_sealed(self.data_fd)

    @property
    def next_data(self) -> DataPlan:
        """Memory of the data's size, to be made for `replace_data`."""
        # The device exists: with huge_pages = "require" it is better served from small pages than not at all.
        huge: HugePages = "off" if self.huge == "off" else "auto"
        return DataPlan(data_name(self.device_number), self.geometry.total_bytes, huge)

    def replace_data(self, data: Data) -> None:
        """Use this memory, which becomes the arena's, as the data and close the old descriptor.

        Raises `PoolError` if its size is not the header's; its descriptor is closed then.
        """
        try:
            self._check_data(data.fd)
        except PoolError:
            os.close(data.fd)
            raise
        os.close(self.data_fd)
        self.data_fd, self.huge_bytes = data

    def forget_old_data(self) -> None:
        """Remove the name that an earlier version gave the data: the name keeps replaced memory allocated."""
        _unlink(_data_name(self.name_prefix))

    def unlink(self) -> None:
        """Remove the names.  The memory lives until every process has closed it."""
        unlink_arena(self.name_prefix)

    def close(self) -> None:
        """Unmap and close in this process.  Harmless twice."""
        self.control.close()
        self._close_fds()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_fds(self) -> None:
        for fd in (self.data_fd, self.control_fd):
            if fd >= 0:
                os.close(fd)
        self.data_fd = self.control_fd = -1


def data_name(device_number: int) -> str:
    """The pool's memory in errors."""
    return f"the pool of device {device_number}"


def _data_name(name_prefix: str) -> str:
    return f"{name_prefix}-data"


def _control_name(name_prefix: str) -> str:
    return f"{name_prefix}-ctl"
