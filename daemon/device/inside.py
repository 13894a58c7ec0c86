"""The store of a device whose workers run its engine themselves (`isolation = "none"`): opened, handed over, kept.

Owns what this daemon holds of it.  Files are opened and locked in a process of their own, since storage may keep that
waiting, inherited by all workers of an epoch and closed here, so that its lock ends with these workers and their I/O.
The next epoch's workers get files that were opened anew: opening it waits until nothing of the dead can still write.  A
memory disk's memory stays with this daemon and its holder.  A store in a cluster is only looked at here: the worker
connects to it.  Runs on the supervisor's asyncio loop.
"""

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec

from ublkpool.bufpool import wire
from ublkpool.bufpool.engine.cow import CowFiles, CowLayout
from ublkpool.bufpool.engine.native import FileStorage, MemoryStorage, NullStorage, Storage
from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.packets import receive_packet, send_packet
from ublkpool.bufpool.sdk import claim
from ublkpool.bufpool.sdk.backend import log
from ublkpool.bufpool.sdk.inside import Connect, Growth, OpenStore, grow_store, open_for_workers, settle_store
from ublkpool.bufpool.sdk.loader import preload
from ublkpool.bufpool.sdk.properties import Hint
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.errors import DaemonError, one_line
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.plain_call import Call
from ublkpool.daemon.processes.held_names import disk_memory_name
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.settings.config import CONNECTED_KINDS, BackendConfig, DeviceConfig
from ublkpool.workers.engine_inside import EngineSpec

OPEN_DEADLINE_S = 30.0
"""Of one attempt: longer than the opener's own patience with a living process that has the store."""
DEAD_PATIENCE_S = 2.0
"""How long one attempt waits for the I/O of the last epoch's workers; the next attempt follows."""
SETTLED_KINDS = ("cow",)
"""Kinds of which a power failure loses what no FLUSH covered, even if it comes long after."""
_WITHOUT_STORE = ("null",)
"""Kinds that open nothing, so that the daemon may call them itself."""
_OPENED_PLAINLY = ("memory",)
"""Kinds of which opening a store leaves nothing in the process but descriptors, and locks no file: a lock names the
process that took it, and only if that has ended does a recovery see that it waits for a dead worker's I/O."""
_PACKET = b"store"


class StoreAway(DaemonError):
    """The store of a device that has served cannot be opened now: requests wait until it can."""

    may_pass = True


class _Opened(msgspec.Struct):
    """The answer of the process that opens."""

    problem: str = ""
    attach: wire.Attach | None = None
    descriptors: int = 0
    """How many it has sent."""
    is_block_device: bool = False
    cow: CowLayout | None = None


class _Done(msgspec.Struct):
    """The answer of a process that works on a store."""

    problem: str = ""


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
        self._files: list[int] = []
        self._opened = _Opened()
        self._was_served = False
        self._memory: int | None = None
        self._hint: Hint | None = None
        """Of the last `open`."""

    @property
    def connects(self) -> bool:
        """Whether the store is a connection, which the worker makes itself."""
        return self._backend.kind in CONNECTED_KINDS

    async def open(self, hint: Hint) -> wire.Attach:
        """Open the store, or the kept memory disk; what a backend would attach with.  Raises `DaemonError`."""
        self._hint = hint
        if self._backend.kind in _WITHOUT_STORE:
            return self._attach_of(_open_here(self._backend, hint))
        kept = self._kept_memory()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        with ours:
            with theirs:
                fds = [theirs.fileno(), *([] if kept is None else [kept])]
                opening = Call(_open if kept is None else _open_kept, self._backend, hint, fds=fds)
                opened = await self._runner.look(
                    self._name,
                    f"{self._name}: opening its store",
                    opening if self._backend.kind in _OPENED_PLAINLY else partial(opening),
                    _Opened,
                    OPEN_DEADLINE_S,
                    fds,
                )
            attach = self._attach_of(opened)
            if kept is None:
                self._take(ours, opened)
        return attach

    def _attach_of(self, opened: _Opened) -> wire.Attach:
        """Raises `DaemonError` if the store is not open."""
        if opened.problem or opened.attach is None:
            raise DaemonError(f"{self._name}: {opened.problem}")
        return opened.attach

    def _take(self, ours: socket.socket, opened: _Opened) -> None:
        """Take the descriptors that the process has sent.  Raises `DaemonError`."""
        self.forked()
        self._opened = opened
        for _ in range(opened.descriptors):
            try:
                _, fd = receive_packet(ours, len(_PACKET))
            except OSError:
                fd = None
            if fd is None:
                self.forked()
                raise StoreAway(
                    f"{self._name}: its store could not be taken: this process has no descriptor left"
                )
            self._files.append(fd)
        if self._backend.kind == "memory":
            self._memory = self._files.pop()
            self._holder.hold(disk_memory_name(self._name), self._memory)

    def _kept_memory(self) -> int | None:
        """The memory disk; also that of a failed device of this name, which left it to its successor."""
        held = self._holder.descriptor(disk_memory_name(self._name))
        if self._memory is None and self._backend.kind == "memory" and held is not None:
            self._memory = os.dup(held)
        return self._memory

    def resume(self, held: Mapping[str, int]) -> None:
        """Take the memory disk that an earlier daemon left with the holder, if there is one."""
        self._was_served = True
        fd = held.get(disk_memory_name(self._name))
        if fd is not None and self._memory is None:
            self._memory = os.dup(fd)
            self._holder.hold(disk_memory_name(self._name), self._memory)

    def engine(self, disk: Disk, generation: int) -> EngineSpec:
        """What each worker opens its engine with, after `open`; `generation` is the attach's."""
        self._was_served = True
        memory = self._memory
        return EngineSpec(
            storage=self._connect(generation) if self.connects else self._storage(),
            size_bytes=disk.size_bytes,
            read_only=disk.read_only,
            own_fd=memory,
            own_bytes=os.fstat(memory).st_size if memory is not None else 0,
        )

    def _connect(self, generation: int) -> Connect:
        assert self._hint is not None
        backend = self._backend
        return Connect(backend.kind, backend.options, backend.cwd, self._hint, generation)

    def _storage(self) -> Storage:
        if self._backend.kind == "null":
            return NullStorage()
        if self._backend.kind == "memory":
            return MemoryStorage(names_reads=True)
        if self._opened.cow is not None:
            overlay, base = self._files
            return CowFiles(overlay, base, self._opened.cow)
        (file,) = self._files
        return FileStorage(file, self._opened.is_block_device)

    def forked(self) -> None:
        """The workers have inherited what they need: files, and with them their locks, are theirs alone from now on."""
        while self._files:
            os.close(self._files.pop())

    async def settle(self) -> None:
        """The workers have ended for good: make durable what they wrote, where that takes more than a write-back.

        Raises `DaemonError`.
        """
        self.forked()
        if self._backend.kind not in SETTLED_KINDS or not self._was_served:
            return
        work = partial(settle_store, self._backend.kind, self._backend.options)
        await self._work("making its store durable", work)

    async def grow(self, bound: wire.Identity, served_bytes: int, wanted_bytes: int) -> None:
        """Make the store that the workers serve at least so large.  Raises `DaemonError`."""
        growth = Growth(bound, served_bytes, wanted_bytes, self._memory)
        work = partial(grow_store, self._backend.kind, self._backend.options, growth)
        await self._work("growing its store", work, [] if self._memory is None else [self._memory])

    async def _work(self, what: str, work: Callable[[], None], keep_fds: Sequence[int] = ()) -> None:
        done = await self._runner.look(
            self._name,
            f"{self._name}: {what}",
            partial(_do, self._backend, work),
            _Done,
            OPEN_DEADLINE_S,
            keep_fds,
        )
        if done.problem:
            raise DaemonError(f"{self._name}: {what}: {done.problem}")

    def close(self) -> None:
        """Close everything here; workers, and the holder's copy, stay as they are."""
        self.forked()
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


def _open(to: int, backend: BackendConfig, hint: Hint) -> _Opened:
    """In the process that opens: the store's description, after its descriptors were sent over the socket `to`."""
    try:
        found = _found(backend, hint, None)
    except (PoolError, OSError) as error:
        return _Opened(problem=one_line(error))
    with socket.socket(fileno=to) as sock:
        for each in found.descriptors:
            send_packet(sock, _PACKET, each)
    return _description(found)


def _open_here(backend: BackendConfig, hint: Hint) -> _Opened:
    """In the daemon: the description of what has no store to be opened."""
    try:
        return _description(open_for_workers(backend.kind, backend.options, hint, None))
    except PoolError as error:
        return _Opened(problem=one_line(error))


def _open_kept(_to: int, kept: int, backend: BackendConfig, hint: Hint) -> _Opened:
    """The same of the memory disk `kept`, whose descriptor the daemon has."""
    try:
        return _description(_found(backend, hint, kept))
    except (PoolError, OSError) as error:
        return _Opened(problem=one_line(error))


def _found(backend: BackendConfig, hint: Hint, kept: int | None) -> OpenStore:
    """The store, opened.  Raises `PoolError`, `OSError`."""
    # Tried again and again while the store of a disk is away: the device's own line names the reason once.
    log.setLevel(logging.NOTSET if hint.node is None else logging.ERROR)
    _enter(backend)
    return open_for_workers(backend.kind, backend.options, hint, kept)


def _description(found: OpenStore) -> _Opened:
    opened = _Opened(attach=found.attach, descriptors=len(found.descriptors))
    match found.storage:
        case FileStorage(_, is_block_device):
            opened.is_block_device = is_block_device
        case CowFiles(_, _, layout):
            opened.cow = layout
    return opened


def _do(backend: BackendConfig, work: Callable[[], None]) -> _Done:
    """In a process of its own, since storage may keep it waiting."""
    try:
        _enter(backend)
        work()
    except (PoolError, OSError) as error:
        return _Done(problem=one_line(error))
    return _Done()


def _enter(backend: BackendConfig) -> None:
    claim.Patience.with_the_dead_s = DEAD_PATIENCE_S
    if backend.cwd is not None:
        os.chdir(backend.cwd)
