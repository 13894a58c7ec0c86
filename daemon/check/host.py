"""The daemon's part in a check: the device's pool and queues, its epochs, and one backend process after the other.

Owns the order of who is told what, as `daemon/device` does it for a real device: a backend is introduced to every queue
before it is answered; its requests wait after its death; an epoch ends for all queues together, and the next one serves
after the fence.  Runs on the check's asyncio loop.
"""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.wire.same_store import is_same_store
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.check.door import Door
from ublkpool.daemon.check.process import BackendProcess, Command
from ublkpool.daemon.check.promises import Broken
from ublkpool.daemon.check.queue import KernelQueue, Shape, frame_path, ring_path
from ublkpool.daemon.check.requests import Request
from ublkpool.daemon.device.disk import Disk, check_fits, disk_of
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.ublk import _native, mappings

DEVICE = "check"
DEVICE_NUMBER = 7
LOG = "backend.log"
Placement = Literal["pool", "backend"]
_SMALL_BYTES = 4096
_NAP_S = 0.02
_ffi = _native.ffi


class NotStarted(Exception):
    """The backend did not attach at its first start: its options, its file or its store are not usable."""

    def __init__(self, words: str, status: int | None) -> None:
        super().__init__(words)
        self.status = status


class OtherPlacement(Exception):
    """The backend does not serve this round's placement."""


class Setting(NamedTuple):
    """How a round runs; sizes in bytes."""

    transport: str
    placement: Placement
    queues: int
    depth: int
    max_io_bytes: int
    size_bytes: int
    """The size that the device is created with; 0: the backend's."""
    deadline_s: float
    start_s: float
    """How long a start may take, in seconds."""


class Host:
    """One device of the check, in one transport and placement."""

    def __init__(
        self,
        directory: Path,
        command: Command,
        setting: Setting,
        state: "State",
        answered: Callable[[Request], None],
    ) -> None:
        self.setting = setting
        self._directory, self._command, self._state = directory, command, state
        self._answered = answered
        self._config = DeviceConfig(
            name=DEVICE,
            size_bytes=setting.size_bytes or None,
            placement=setting.placement,
        )
        self.epoch = 1
        self.queues: list[KernelQueue] = []
        self.session: Session | None = None
        self.process: BackendProcess | None = None
        self.disk: Disk | None = None
        self._first_epoch = 1
        self._stale = [0] * setting.queues
        self._segments = wire.SEGMENT_POOL
        self._is_expected_to_end = self._is_other_placement = False
        self._again: list[Request] = []
        self._news = asyncio.Event()
        self._watched: set[int] = set()
        self._pool_fd = -1
        self._door = Door(directory, self._describe, self._check)

    # What the attach socket says

    def _describe(self, device: str) -> wire.Described:
        setting = self.setting
        return wire.Described(
            v=wire.PROTOCOL_VERSION,
            device=device,
            size_bytes=setting.size_bytes,
            max_io_bytes=setting.max_io_bytes,
            need_get_data=True,
            placement=self._config.placement,
            read_only=False,
            may_create=self._state.attach is None,
            knows_survival=True,
            is_check=True,
            knows_optimal_io=True,
            former_owner=self._state.owner,
        )

    def _check(self, attach: wire.Attach) -> None:
        placement = self.setting.placement
        has_memory = placement == "pool" or bool(attach.segment_bytes)
        self._is_other_placement = attach.placement not in (placement, "any") or not has_memory
        check_fits(self._config, self.disk, attach)
        before = self._state.attach
        if before is None:
            return
        bound, brought = before.identity or wire.Identity(), attach.identity or wire.Identity()
        if (bound.value or bound.in_boot) and not is_same_store(bound, brought, is_same_boot=True):
            raise AttachRefused(
                f"its store is another one: {brought.store or brought.value or 'without an identity'}"
            )

    # A backend's life

    async def start_backend(self, again: bool = False) -> None:
        """Start the process, take its attach and wait until it has greeted every queue.

        Raises `NotStarted` if it has never attached, `Broken` if it does not come `again`.
        """
        line = self._command.line(DEVICE, self._directory, self.setting.transport)
        self._is_expected_to_end = False
        self.process = BackendProcess(line, self._directory / LOG)
        session = await self._attached(again)
        try:
            await self._introduce(session)
        except OSError as error:
            raise Broken("attach", f"its memory cannot be used: {error}") from error
        finally:
            if self.session is not session:
                session.close()

    async def _attached(self, again: bool) -> Session:
        assert self.process is not None
        give_up_s = time.monotonic() + self.setting.start_s
        while time.monotonic() < give_up_s:
            with suppress(TimeoutError):
                return await asyncio.wait_for(self._door.sessions.get(), 0.05)
            if self.process.status is not None and self._door.sessions.empty():
                break
        why = self._door.refusal or self.process.obituary()
        status = self.process.status
        if self._is_other_placement:
            raise OtherPlacement(why)
        if not again:
            raise NotStarted(why, status)
        promise = "identity" if "store is another" in why else "attach"
        if status is None:
            raise Broken(promise, f"it has not attached again after {self.setting.start_s:g} s: {why}")
        raise Broken(promise, f"it does not attach again: {why}")

    async def _introduce(self, session: Session) -> None:
        attach = session.attach
        if attach.segment_bytes:
            self._segments += 1
            session.segment = self._segments
        if self.disk is None:
            self.disk = disk_of(self._config, attach)
            self._make_pool()
            self._make_queues()
        self._state.attached(attach)
        session.generation = self._state.next_generation(attach)
        # A backend that served an earlier epoch may answer that epoch's requests late; a new one has none of them.
        self._first_epoch = self.epoch
        self._stale = [queue.stale_answers for queue in self.queues]
        self.session = session
        await self._expect(session, fence=False)
        session.entrust(self._attached_message(session), [self._pool_fd])
        await self._until_linked("HELLO", self.setting.start_s)
        self._send_again()

    async def _expect(self, session: Session, fence: bool) -> None:
        attach = session.attach
        for queue in self.queues:
            while not queue.expect(
                session.token,
                session.segment,
                session.segment_fd,
                attach.segment_bytes,
                attach.read_buffers == "own",
                fence,
            ):
                await self.turn()

    async def _until_linked(self, what: str, within_s: float) -> None:
        give_up_s = time.monotonic() + within_s
        while not all(queue.is_linked for queue in self.queues):
            await self.turn()
            if time.monotonic() > give_up_s:
                mute = [str(queue.number) for queue in self.queues if not queue.is_linked]
                promise = "fence" if what == "FENCED" else "attach"
                raise Broken(promise, f"no {what} on queue {', '.join(mute)} after {within_s:g} s")

    def _attached_message(self, session: Session) -> wire.Attached:
        setting, disk = self.setting, self.disk
        assert disk is not None
        numbers = range(setting.queues)
        return wire.Attached(
            v=wire.PROTOCOL_VERSION,
            device=DEVICE,
            device_number=DEVICE_NUMBER,
            size_bytes=disk.size_bytes,
            logical_block_bytes=disk.block_bytes,
            queues=setting.queues,
            depth=setting.depth,
            max_io_bytes=setting.max_io_bytes,
            need_get_data=True,
            placement=self._config.placement,
            read_only=disk.read_only,
            epoch=self.epoch,
            token=session.token.hex(),
            endpoints=tuple(f"ipc://{frame_path(self._directory, n)}" for n in numbers),
            rings=tuple(str(ring_path(self._directory, n)) for n in numbers if setting.transport == "ring"),
            segments=(wire.Segment(number=wire.SEGMENT_POOL, size_bytes=self._geometry.total_bytes),),
            own_segment=session.segment,
            post_bytes=(
                tuple(each.buffer_bytes for each in self._geometry.classes)
                if self._config.placement == "backend"
                else ()
            ),
            generation=session.generation,
        )

    async def kill(self) -> None:
        """SIGKILL, and the farewell."""
        self._is_expected_to_end = True
        if self.session is not None:
            await self.session.cut_off()
        self._bury()

    async def stop(self) -> None:
        """SIGTERM, and the farewell.  Raises `Broken` unless the process ends with status 0 and in time."""
        assert self.process is not None
        self.process.terminate()
        await self._until_ended("SIGTERM")

    async def detach(self, keep: bool) -> None:
        """Tell it to end, as the daemon does at the device's end; raises as `stop`."""
        assert self.session is not None
        self.session.say(wire.Detach(reason="the check is over", keep=keep))
        await self._until_ended("detach")

    async def _until_ended(self, how: str) -> None:
        assert self.process is not None and self.session is not None
        self._is_expected_to_end = True
        give_up_s = time.monotonic() + self.setting.deadline_s
        while not self.session.is_gone:
            await self.turn()
            if time.monotonic() > give_up_s:
                raise Broken("stop", f"its process still runs {self.setting.deadline_s:g} s after {how}")
        process = self.process
        while process.status is None:
            await asyncio.sleep(0)
        status = process.status
        self._bury()
        if status:
            raise Broken("stop", f"after {how} it ended with {process.obituary()}")

    def _bury(self) -> None:
        """The process is dead: take back what it had.  Answers that it sent before count."""
        for queue in self.queues:
            queue.turn()
            queue.lost()
        if self.session is not None:
            self.session.close()
            self.session = None
        if self.process is not None:
            self.process.end()

    # Epochs

    def _make_pool(self) -> None:
        setting = self.setting
        sizes = sorted({_SMALL_BYTES, max(_SMALL_BYTES, setting.max_io_bytes)})
        self._geometry = Geometry.build([(size, setting.queues * setting.depth) for size in sizes])
        self._pool_fd = mappings.sealed_memory(self._geometry.total_bytes, "ublkpool-check")
        self._pool = mappings.map_segment(self._pool_fd, self._geometry.total_bytes)

    def _make_queues(self) -> None:
        setting, disk = self.setting, self.disk
        assert disk is not None
        shape = Shape(
            DEVICE_NUMBER,
            setting.queues,
            setting.depth,
            setting.max_io_bytes,
            disk.block_bytes,
            self._config.placement == "backend",
            self._geometry,
            setting.transport == "ring",
        )
        self.queues = [
            KernelQueue(
                shape, number, self.epoch, self._pool, self._directory, self._answered, self._unwatch_one
            )
            for number in range(setting.queues)
        ]

    def worker_death(self) -> None:
        """The workers of this epoch die, with requests in hand."""
        self._again = [request for queue in self.queues for request in queue.unanswered()]
        self._unwatch()
        for queue in self.queues:
            queue.close()
        self.epoch += 1
        self._make_queues()

    async def fence(self) -> None:
        """The next epoch's workers expect the backend, which must confirm the fence."""
        assert self.session is not None
        await self._expect(self.session, fence=True)
        await self._until_linked("FENCED", self.setting.deadline_s)

    def mark_pool(self, mark: bytes) -> None:
        """Fill the pool, of which no request uses a buffer, with this mark."""
        size = self._geometry.total_bytes
        _ffi.memmove(_ffi.cast("uint8_t *", self._pool), mark * (size // len(mark)), size)

    def pool_differs(self, mark: bytes) -> int | None:
        """Where the pool differs from the mark, in bytes; None if it does not."""
        size = self._geometry.total_bytes
        held, whole = bytes(_ffi.buffer(_ffi.cast("uint8_t *", self._pool), size)), mark * (size // len(mark))
        if held == whole:
            return None
        return next(at for at in range(size) if held[at] != whole[at])

    def resume(self) -> None:
        """The requests of the dead workers are sent again, in order."""
        self._send_again()

    def _send_again(self) -> None:
        for queue in self.queues:
            queue.start_once()
        again, self._again = self._again, []
        for request in sorted(again, key=lambda each: each.sent_s):
            request.done = 0
            self.submit(request)

    def submit(self, request: Request) -> None:
        """Send a request over the queue that it belongs to."""
        self.queues[request.queue % len(self.queues)].submit(request)

    # Turns

    async def turn(self) -> bool:
        """One turn of every queue; waits a moment if nothing moved.  Raises `Broken`; whether anything moved."""
        moved = [queue.turn() for queue in self.queues]
        self._judge()
        if any(moved):
            await asyncio.sleep(0)
            return True
        await self._nap()
        return False

    async def _nap(self) -> None:
        self._news.clear()
        self._watch()
        if all([queue.doze() for queue in self.queues]):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), _NAP_S)
        else:
            await asyncio.sleep(0)
        for queue in self.queues:
            queue.wake()

    def _watch(self) -> None:
        wanted = {fd for queue in self.queues for fd in queue.filenos()}
        loop = asyncio.get_running_loop()
        for fd in wanted - self._watched:
            loop.add_reader(fd, self._news.set)
        for fd in self._watched - wanted:
            loop.remove_reader(fd)
        self._watched = wanted

    def _unwatch(self) -> None:
        for fd in [*self._watched]:
            self._unwatch_one(fd)

    def _unwatch_one(self, fd: int) -> None:
        """Not later than its end: asyncio would take another descriptor of this number for the one that it watches."""
        if fd in self._watched:
            asyncio.get_running_loop().remove_reader(fd)
            self._watched.discard(fd)

    def _judge(self) -> None:
        for queue in self.queues:
            if words := queue.violation():
                raise Broken("protocol", f"it is cut off on queue {queue.number}: {words}")
            is_late = queue.stale_answers > self._stale[queue.number]
            if is_late and self._first_epoch == self.epoch:
                raise Broken("answers", f"it answered a request on queue {queue.number} that was over")
        if self.session is not None and self.session.is_gone and not self._is_expected_to_end:
            assert self.process is not None
            with suppress(Exception):
                self.process.end()
            raise Broken("alive", f"its process ended by itself: {self.process.obituary()}")

    def begin_anew(self) -> None:
        """The device has ended; the next backend makes another one."""
        self._unwatch()
        for queue in self.queues:
            queue.close()
        self.queues, self._again, self.disk, self.epoch = [], [], None, 1
        if self._pool_fd >= 0:
            mappings.unmap_segment(self._pool, self._geometry.total_bytes)
            os.close(self._pool_fd)
            self._pool_fd = -1

    def close(self) -> None:
        """End everything."""
        if self.process is not None:
            self.process.end()
        if self.session is not None:
            self.session.close()
        self.begin_anew()
        self._door.close()


class State:
    """What the daemon's state directory remembers of the device's store, over all rounds."""

    def __init__(self) -> None:
        self.attach: wire.Attach | None = None
        """The last one; None before the first and after the store's end."""
        self._generation = 0
        self._size_bytes = 0

    @property
    def owner(self) -> str:
        """The owner of the store's lock at the last attach."""
        return self.attach.owner if self.attach is not None else ""

    def attached(self, attach: wire.Attach) -> None:
        """A backend attached.  Raises `Broken` if its size is another than before."""
        if self.attach is not None and attach.size_bytes != self._size_bytes:
            raise Broken(
                "size",
                f"its size was {self._size_bytes} bytes and is {attach.size_bytes}, though no request lies beyond it",
            )
        self.attach, self._size_bytes = attach, attach.size_bytes

    def next_generation(self, attach: wire.Attach) -> int:
        """A number that no attach has had."""
        self._generation = max(self._generation, attach.generation_seen) + 1
        return self._generation

    def forget(self) -> None:
        """The store has ended with its backend."""
        self.attach = None
