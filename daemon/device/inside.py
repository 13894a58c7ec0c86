"""The store of a device whose workers run its engine themselves (`isolation = "none"`): opened, handed over, kept.

Owns what this daemon holds of it.  A file is opened and locked in a process of its own, since storage may keep that
waiting, inherited by all workers of an epoch and closed here, so that its lock ends with these workers and their I/O.
The next epoch's workers get a file that was opened anew: opening it waits until nothing of the dead can still write.  A
memory disk's memory stays with this daemon and its holder.  Runs on the supervisor's asyncio loop.
"""

import logging
import os
import socket
from collections.abc import Mapping
from functools import partial

import msgspec

from ublkpool.bufpool import wire
from ublkpool.bufpool.engine.native import FileStorage, MemoryStorage, NullStorage, Storage
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.packets import receive_packet, send_packet
from ublkpool.bufpool.sdk import claim
from ublkpool.bufpool.sdk.backend import log
from ublkpool.bufpool.sdk.inside import open_for_workers
from ublkpool.bufpool.sdk.loader import preload
from ublkpool.bufpool.sdk.properties import Hint
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.errors import DaemonError, one_line
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.processes.held_names import disk_memory_name
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig
from ublkpool.workers.engine_inside import EngineSpec

OPEN_DEADLINE_S = 30.0
"""Of one attempt: longer than the opener's own patience with a living process that has the store."""
DEAD_PATIENCE_S = 2.0
"""How long one attempt waits for the I/O of the last epoch's workers; the next attempt follows."""
_PACKET = b"store"


class StoreAway(DaemonError):
    """The store of a device that has served cannot be opened now: requests wait until it can."""

    may_pass = True


class _Opened(msgspec.Struct):
    """The answer of the process that opens."""

    problem: str = ""
    attach: wire.Attach | None = None
    is_block_device: bool = False


class InsideStore:
    """One device's store."""

    def __init__(self, config: DeviceConfig, runner: ControlRunner, holder: Holder) -> None:
        """Nothing is open yet."""
        assert config.backend is not None
        preload(config.backend.kind)
        self._name = config.name
        self._backend: BackendConfig = config.backend
        self._runner = runner
        self._holder = holder
        self._file: int | None = None
        self._memory: int | None = None
        self._is_block_device = False

    async def open(self, hint: Hint) -> wire.Attach:
        """Open the store, or the kept memory disk; what a backend would attach with.  Raises `DaemonError`."""
        kept = self._kept_memory()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        with ours:
            with theirs:
                opened = await self._runner.look(
                    self._name,
                    f"{self._name}: opening its store",
                    partial(_open, theirs, self._backend, hint, kept),
                    _Opened,
                    OPEN_DEADLINE_S,
                    [theirs.fileno(), *([] if kept is None else [kept])],
                )
            if opened.problem or opened.attach is None:
                raise DaemonError(f"{self._name}: {opened.problem}")
            if kept is None:
                self._take(ours, opened)
        return opened.attach

    def _take(self, ours: socket.socket, opened: _Opened) -> None:
        """Take the descriptor that the process has sent, if the kind has one.  Raises `DaemonError`."""
        self._is_block_device = opened.is_block_device
        if self._backend.kind == "null":
            return
        try:
            _, fd = receive_packet(ours, len(_PACKET))
        except OSError:
            fd = None
        if fd is None:
            raise StoreAway(
                f"{self._name}: its store could not be taken: this process has no descriptor left"
            )
        if self._backend.kind == "memory":
            self._memory = fd
            self._holder.hold(disk_memory_name(self._name), fd)
        else:
            self._close_file()
            self._file = fd

    def _kept_memory(self) -> int | None:
        """The memory disk; also that of a failed device of this name, which left it to its successor."""
        held = self._holder.descriptor(disk_memory_name(self._name))
        if self._memory is None and self._backend.kind == "memory" and held is not None:
            self._memory = os.dup(held)
        return self._memory

    def resume(self, held: Mapping[str, int]) -> None:
        """Take the memory disk that an earlier daemon left with the holder, if there is one."""
        fd = held.get(disk_memory_name(self._name))
        if fd is not None and self._memory is None:
            self._memory = os.dup(fd)
            self._holder.hold(disk_memory_name(self._name), self._memory)

    def engine(self, disk: Disk) -> EngineSpec:
        """What each worker opens its engine with, after `open`."""
        memory = self._memory
        return EngineSpec(
            storage=self._storage(),
            size_bytes=disk.size_bytes,
            read_only=disk.read_only,
            own_fd=memory,
            own_bytes=os.fstat(memory).st_size if memory is not None else 0,
        )

    def _storage(self) -> Storage:
        if self._backend.kind == "null":
            return NullStorage()
        if self._backend.kind == "memory":
            return MemoryStorage(names_reads=True)
        assert self._file is not None
        return FileStorage(self._file, self._is_block_device)

    def forked(self) -> None:
        """The workers have inherited what they need: a file, and with it its lock, is theirs alone from now on."""
        self._close_file()

    def close(self) -> None:
        """Close everything here; workers, and the holder's copy, stay as they are."""
        self._close_file()
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

    def end(self, keep: bool) -> None:
        """The device is gone, and so is a memory disk, unless the holder is to `keep` it for a successor."""
        name = disk_memory_name(self._name)
        if self._memory is not None and keep:
            self._holder.hold(name, self._memory)
        elif self._memory is not None:
            self._holder.drop(name)
        self.close()

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _open(to: socket.socket, backend: BackendConfig, hint: Hint, kept: int | None) -> _Opened:
    """In the process that opens: the store's description, after its descriptor was sent."""
    claim.Patience.with_the_dead_s = DEAD_PATIENCE_S
    if hint.node is not None:
        # Tried again and again while the store is away: the device's own line names the reason once.
        log.setLevel(logging.ERROR)
    try:
        if backend.cwd is not None:
            os.chdir(backend.cwd)
        found = open_for_workers(backend.kind, backend.options, hint, kept)
    except (PoolError, OSError) as error:
        return _Opened(problem=one_line(error))
    if found.descriptor is not None and kept is None:
        send_packet(to, _PACKET, found.descriptor)
    is_block_device = isinstance(found.storage, FileStorage) and found.storage.is_block_device
    return _Opened(attach=found.attach, is_block_device=is_block_device)
