"""A backend process of the simulation: the SDK's real `Loop` and `RequestEngine` on links in memory.

Owns one process's life, its own segment and the requests that it was given.  `Witness` is told what it does to the
store and to the pool's buffers, which is where a stale write or a shared buffer shows.
"""

import asyncio
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Protocol, cast

from support.fakes.backend import Store
from support.fakes.posting_engine import PostingEngine
from support.fakes.queue_rig import DEVICE, POISON, new_area
from support.fakes.request_engine import RequestEngine
from support.sim.defects import CUT_OFF_LIVES
from support.sim.loop import Clock
from support.sim.rings import SimRingLinks
from support.sim.wire import Killed, Life
from ublkpool.bufpool import wire
from ublkpool.bufpool.engine.ring_driver import nothing_to_serve
from ublkpool.bufpool.sdk.backend import Backend, Device, FrameEngine, Request
from ublkpool.bufpool.sdk.client import DeviceConnection, OwnSegment, PollResult
from ublkpool.bufpool.sdk.links import (
    Handshakes,
    LinkStatistics,
    Polled,
    epoch_after,
    hello,
)
from ublkpool.bufpool.sdk.serving import Loop
from ublkpool.bufpool.wire import Descriptor, Kind, Op
from ublkpool.daemon.backends.session import Session

FRAMES_PER_TURN_MAX = 3
LATE_S = (1.0, 2.0, 4.0, 8.0, 40.0)


class Witness(Protocol):
    """Told of each thing that a backend does."""

    def attached(self, generation: int) -> None: ...
    def backend_begins(self, descriptor: Descriptor) -> None: ...
    def backend_stores(self, descriptor: Descriptor, data: bytes) -> None: ...
    def backend_ends(self, descriptor: Descriptor) -> None: ...
    def pool_view(self) -> memoryview: ...


class SimSession(Session):
    """The supervisor's real view of an attached backend, without a socket."""

    def __init__(self, backend: "SimBackend", attach: wire.Attach) -> None:
        self.attach = attach
        self.segment_fd = None
        self.segment = wire.SEGMENT_NONE
        self.pid, self.uid = backend.pid, os.getuid()
        self.token = backend.token
        self.backend = backend
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._gone, self._left = self._loop.create_future(), self._loop.create_future()
        self._has_memory = self._hung_up = self._detaching = False
        self._is_cut_off = False

    def fileno(self) -> int:
        """A number that stands for the backend when its connection is held."""
        return self.pid

    def _is_dead(self) -> bool:
        # A message that it is sent then is lost.
        return False

    def say(self, message: wire.DaemonMessage, fds: list[int] | None = None) -> None:
        self.backend.control.append(message)

    async def cut_off(self) -> None:
        self.backend.was_cut_off = True
        self.backend.kill_now()
        await self.gone()

    def close(self, is_kept: bool = False) -> None:
        """Nothing is open."""

    def ended(self) -> None:
        """The process is dead; the supervisor sees it in a later turn."""
        if not self._loop.is_closed():
            self._loop.call_soon(self._end)

    def _end(self) -> None:
        for future in (self._gone, self._left):
            if not future.done():
                future.set_result(None)


class SimLinks:
    """The SDK's links in memory: the simulation connects the queues and carries their frames."""

    def __init__(self, backend: "SimBackend", attached: wire.Attached) -> None:
        self._attached, self._backend = attached, backend
        self._epoch = attached.epoch
        self._handshakes = Handshakes(attached.queues)
        self.receiving = True
        for queue in range(attached.queues):
            self._greet(queue)

    def _greet(self, queue: int) -> None:
        self.send_frame(queue, hello(self._attached, queue, self._epoch))

    def watch(self, descriptor: int, events: int = 0) -> None:
        """The simulation turns the loop at any time."""

    def unwatch(self, descriptor: int) -> None:
        """See `watch`."""

    def poll(self, timeout_ms: int | None = None) -> Polled:
        raise NotImplementedError("the simulation says what is ready")

    def drive(self, engine: Any, serve: Callable[[], None] = nothing_to_serve) -> bool:
        """See `Links`: its frames need Python."""
        return False

    @property
    def linked(self) -> int:
        return self._handshakes.linked

    def link_changed(self, queue: int, up: bool) -> None:
        """A link came up or went down, as ZeroMQ's monitor reports it."""
        if self._handshakes.changed(queue, up):
            self._greet(queue)

    def frames(self, queue: int) -> Iterator[bytes]:
        inbox = self._backend.inbox[queue]
        for _ in range(self._backend.rng.randint(1, FRAMES_PER_TURN_MAX)):
            if not inbox:
                return
            frame = inbox.popleft()
            self._epoch = epoch_after(frame, self._epoch)
            yield frame

    def send_frame(self, queue: int, frame: bytes) -> None:
        self._backend.send(queue, frame)

    def stop_receiving(self) -> None:
        self.receiving = False

    def statistics(self) -> LinkStatistics:
        raise NotImplementedError("the simulation counts for itself")

    def close(self) -> None:
        """Nothing is open."""


class SimAttachment(DeviceConnection):
    """The SDK's real lower half, without sockets."""

    def __init__(self, backend: "SimBackend", attached: wire.Attached, own: OwnSegment | None) -> None:
        self.attached = attached
        self.own_segment = own
        self.segments = {wire.SEGMENT_POOL: backend.witness.pool_view()}
        self.links: SimLinks | SimRingLinks = (
            SimRingLinks(backend, attached) if attached.rings else SimLinks(backend, attached)
        )
        self._backend = backend

    def message(self) -> wire.DaemonMessage | None:
        return self._backend.control.popleft()

    def tell(self, message: wire.SessionMessage) -> None:
        self._backend.tells(wire.encode_message(message))

    def forget_connection(self) -> None:
        """The end of the daemon is reported once."""


class SlowBackend(Backend):
    """Takes requests and does them when the simulation says so, in any order; a write may be stored long before it is
    answered."""

    def __init__(self, process: "SimBackend") -> None:
        super().__init__()
        self._process = process
        self.given: list[Request] = []
        self.stored: list[Request] = []
        self._due_s: dict[Request, float] = {}
        self._free: list[int] = []

    def make_cells(self, count: int, cell_bytes: int) -> None:
        self._cell_bytes = cell_bytes
        self._free = [index * cell_bytes for index in range(count)]

    def engine(self, device: Device) -> FrameEngine | None:
        process = self._process
        assert process.loop is not None
        if not process.posts or not device.post_bytes:
            return RequestEngine(self, device, process.loop._outbox)
        process.posting = PostingEngine(self, device, process.loop._outbox, len(self._free) // 2, process.rng)
        return process.posting

    def submit(self, batch: Sequence[Request]) -> None:
        for request in batch:
            self._process.begins(Descriptor._make(request.key))
            self.given.append(request)
            self._due_s[request] = self._process.due_s()

    def place(self, offset: int, length: int, flags: int) -> int | None:
        return self._free.pop(0) if self._free else None

    def read_in_place(self, offset: int, length: int) -> int | None:
        if not self._free:
            return None
        cell = self._free.pop(0)
        self._process.own.view[cell : cell + length] = self._process.store.read(offset, length)
        return cell

    def released(self, region: int) -> None:
        size = self._cell_bytes
        self._process.own.view[region : region + size] = bytes([POISON]) * size
        self._free.append(region)

    def execute(self, rng: random.Random, now_s: float) -> None:
        """Do one of the requests that are due, without answering it."""
        due = [each for each in self.given if self._due_s[each] <= now_s]
        if not due:
            return
        self._process.life.effect()
        request = due[rng.randrange(len(due))]
        self.given.remove(request)
        if request.op == Op.READ:
            request.buffer[:] = self._process.store.read(request.offset, request.length)
        elif request.op == Op.WRITE:
            self._change(request, bytes(request.buffer))
        elif request.op in (Op.DISCARD, Op.WRITE_ZEROES):
            self._change(request, bytes(request.length))
        self.stored.append(request)

    def _change(self, request: Request, data: bytes) -> None:
        self._process.witness.backend_stores(Descriptor._make(request.key), data)
        self._process.store.write(request.offset, data)

    def complete(self, rng: random.Random) -> None:
        """Answer one of the requests that are done."""
        request = self.stored.pop(rng.randrange(len(self.stored)))
        self._process.witness.backend_ends(Descriptor._make(request.key))
        request.complete()


class SimBackend:
    """One backend process: attaches, serves, is killed or told to go."""

    def __init__(
        self,
        pid: int,
        witness: Witness,
        store: Store,
        attach: wire.Attach,
        cells: int,
        rng: random.Random,
        clock: Clock,
        lies: bool,
        defect: str,
        posts: bool = False,
    ) -> None:
        self.pid = pid
        self.witness, self.store, self.attach, self.rng, self.lies = witness, store, attach, rng, lies
        self._clock, self.defect = clock, defect
        self.posts, self.posting = posts, cast(PostingEngine | None, None)
        self._late_rate = rng.choice((0.0, 0.05, 0.3))
        self.token = b"\x01" + self.pid.to_bytes(wire.TOKEN_BYTES - 1, "little")
        self.life = Life()
        self.own = new_area(0, max(attach.segment_bytes, 1))
        self.control: deque[wire.DaemonMessage | None] = deque()
        self.inbox: list[deque[bytes]] = []
        self.outbox: list[deque[bytes]] = []
        self.session: SimSession | None = None
        self.attachment: SimAttachment | None = None
        self.loop: Loop | None = None
        self.app = SlowBackend(self)
        if attach.segment_bytes:
            self.app.make_cells(cells, attach.segment_bytes // cells)
        self.complaint: AssertionError | None = None
        self.link_events: deque[tuple[int, bool]] = deque()
        self.ended = self.kill_pending = self.is_zombie = self.was_cut_off = False
        self.is_held = False
        """Whether its connection outlives the supervisor."""

    def kill_now(self) -> None:
        """SIGKILL: the process does nothing more, and its end is seen soon."""
        if self.defect == CUT_OFF_LIVES:
            self.is_zombie = True
            return
        self.life.alive = False
        self.kill_pending = True

    def begins(self, descriptor: Descriptor) -> None:
        """Tell the witness; the SDK would take its complaint for a bug of the backend's."""
        try:
            self.witness.backend_begins(descriptor)
        except AssertionError as error:
            self.complaint = error

    def due_s(self) -> float:
        """The time at which a request that comes now is executed; some are later than the fence's deadline."""
        if self.rng.random() >= self._late_rate:
            return 0.0
        return self._clock.now_s + self.rng.choice(LATE_S)

    def turn(self) -> None:
        """One turn of its loop, or of its waiting for the daemon's answer.  Raises `Killed`."""
        if self.loop is None:
            self._await_answer()
            return
        attachment = self.attachment
        assert attachment is not None
        links = attachment.links
        if isinstance(links, SimRingLinks):
            self._turn_over_rings(links)
        else:
            self._turn_over_frames(links)
        if self.loop._stopping:
            links.stop_receiving()
            assert self.loop._engine is not None
            if not self.loop._engine.running():
                self.loop._send_answers(self.loop._engine)
                raise Killed

    def _turn_over_frames(self, links: SimLinks) -> None:
        assert self.loop is not None
        while self.link_events:
            links.link_changed(*self.link_events.popleft())
        ready = PollResult([], [], bool(self.control))
        if links.receiving:
            ready.queues.extend(number for number, inbox in enumerate(self.inbox) if inbox)
        self.loop.turn(ready)

    def _turn_over_rings(self, links: SimRingLinks) -> None:
        assert self.loop is not None
        links.doze()
        if links.is_awake():
            self.loop.turn(PollResult(*links.look(), bool(self.control)))

    def has_work(self) -> bool:
        """An event for its loop that comes neither through a link nor through a file descriptor."""
        return bool(self.control or (self.loop and self.loop._outbox.results))

    def waits_for_region(self) -> bool:
        engine = self.loop._engine if self.loop else None
        return isinstance(engine, RequestEngine) and engine.statistics().waiting > 0

    def check(self) -> None:
        """Raises `AssertionError` if the backend sleeps although something for it has arrived."""
        if self.attachment is not None and isinstance(self.attachment.links, SimRingLinks):
            self.attachment.links.assert_no_wakeup_lost()

    def _await_answer(self) -> None:
        while self.control:
            message = self.control.popleft()
            if message is None or isinstance(message, wire.Refused | wire.Detach):
                raise Killed
            if isinstance(message, wire.Attached):
                self._attached(message)
                return

    def _attached(self, attached: wire.Attached) -> None:
        self.witness.attached(attached.generation)
        self.inbox = [deque() for _ in range(attached.queues)]
        self.outbox = [deque() for _ in range(attached.queues)]
        own = SimpleNamespace(view=memoryview(self.own.view).cast("B")) if attached.own_segment else None
        self.attachment = SimAttachment(self, attached, cast(OwnSegment | None, own))
        self.loop = Loop(self.app, self.attachment)
        self.loop.__enter__()

    def execute(self) -> None:
        """A request that is being executed is done, or answered."""
        if self.app.stored and (not self.app.given or self.rng.random() < 0.5):
            self.app.complete(self.rng)
        elif self.app.given:
            self.app.execute(self.rng, self._clock.now_s)

    def tells(self, packet: bytes) -> None:
        """Send a packet on the attach connection; the supervisor reads it in a later turn."""
        session = self.session
        if session is not None and not session._loop.is_closed():
            session._loop.call_soon(session._take, packet)

    def send(self, queue: int, frame: bytes) -> None:
        self.life.effect()
        if self.lies and self.rng.random() < 0.02:
            frame = self.rng.choice((b"", frame[:-1], self._lie(frame)))
        self.outbox[queue].append(frame)

    def says(self, frame: bytes) -> bytes:
        """Send into a ring, where no frame is cut short."""
        return self._lie(frame) if self.lies and self.rng.random() < 0.02 else frame

    def lies_about_index(self) -> bool:
        return self.lies and self.rng.random() < 0.01

    def _lie(self, frame: bytes) -> bytes:
        first = next(wire.iter_frame(frame))
        return self.rng.choice(
            (
                first._replace(kind=77).pack(),
                first._replace(device=DEVICE + 1).pack(),
                first._replace(epoch=first.epoch + 1).pack(),
                first._replace(kind=Kind.DONE, sequence=first.sequence + 99).pack(),
            )
        )

    def forget(self) -> None:
        """The process has ended: close what the simulation opened for it."""
        if self.loop is not None:
            self.loop.__exit__()
        if self.attachment is not None and isinstance(self.attachment.links, SimRingLinks):
            self.attachment.links.die()
        for request in (*self.app.given, *self.app.stored):
            self.witness.backend_ends(Descriptor._make(request.key))
        self.app.given.clear()
        self.app.stored.clear()
