"""A model in Python of the SDK's native engine: frames become `Request`s, results become frames.

The device simulation runs its backends on it, because it can be killed between any two steps; `test_calls.py` compares
its answers with those of the native engine.

Owns, per queue, the running requests, those that wait for a region, and the lent regions; so it also answers fences: it
drops waiting requests of an old epoch, waits for running ones, and takes back the regions that they named.  A region
stays lent until RELEASE, whatever the answer, because until then the worker may read from it.  Does not know sockets.
Runs on the loop's thread; other threads use only the `Outbox`.

For speed in the simulation, descriptors are tuples in wire order here, and answers are their 64 bytes.
"""

import enum
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import BackendError, WireError
from ublkpool.bufpool.sdk.backend import Backend, Device, Outbox, Request, errno_of
from ublkpool.bufpool.wire import Flag, Kind, Op, RawDescriptor

_REQUEST, _PLACE, _DATA, _RELEASE = int(Kind.REQUEST), int(Kind.PLACE), int(Kind.DATA), int(Kind.RELEASE)
_DONE, _PLACED, _REJECT, _FENCED = int(Kind.DONE), int(Kind.PLACED), int(Kind.REJECT), int(Kind.FENCED)
_READ, _WRITE = int(Op.READ), int(Op.WRITE)
_REGION, _REPLAY = int(Flag.REGION), int(Flag.REPLAY)
_NOTHING = memoryview(b"")
_FRAME_BYTES_MAX = wire.DESCRIPTOR_BYTES * wire.DESCRIPTORS_PER_FRAME_MAX


class DispatchStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of a request engine."""

    requests: int
    answered: int
    failed: int
    replayed: int
    running: int
    waiting: int
    lent: int
    fenced: int
    dropped: int


class Stage(enum.Enum):
    """The state of the request of a named region."""

    NAMED = enum.auto()
    RUNNING = enum.auto()
    ANSWERED = enum.auto()


_NAMED, _RUNNING, _ANSWERED = Stage


class Lent(NamedTuple):
    """A region that the backend named, until RELEASE."""

    raw: RawDescriptor
    region: int
    stage: Stage


class Queue:
    """One queue's share of the engine's state."""

    __slots__ = ("answers", "epoch", "fence", "lent", "number", "running", "running_old")

    def __init__(self, number: int, epoch: int) -> None:
        self.number = number
        self.epoch = epoch
        self.running = 0
        self.running_old = 0
        self.fence: RawDescriptor | None = None
        self.lent: dict[tuple[int, int], Lent] = {}
        self.answers: list[bytes] = []


class RequestEngine:
    """A `FrameEngine` for backends with methods or requests."""

    def __init__(self, backend: Backend, device: Device, outbox: Outbox) -> None:
        self._backend = backend
        self._device = device
        self._memory_of = {wire.SEGMENT_POOL: device.pool, **device.clients}
        self._outbox = outbox
        self._queues = [Queue(number, device.epoch) for number in range(device.queues)]
        self._waiting: list[tuple[Queue, RawDescriptor]] = []
        self._batch: list[Request] = []
        self._requests = self._answered = self._failed = 0
        self._replayed = self._fenced = self._dropped = 0
        self._handlers: dict[int, Callable[[Queue, RawDescriptor], None]] = {
            _REQUEST: self._request,
            _PLACE: self._wants_region,
            _DATA: self._data,
            _RELEASE: self._release,
            int(Kind.WELCOME): self._welcome,
            int(Kind.FENCE): self._fence,
        }

    def fileno(self) -> int:
        """The outbox's eventfd."""
        return self._outbox.descriptor

    def take(self, queue: int, frame: bytes) -> None:
        """Hand a frame's requests to the backend as one batch."""
        state = self._queues[queue]
        handlers = self._handlers
        for raw in wire.iter_raw(frame):
            handler = handlers.get(raw[0])
            if handler is None:
                raise WireError(f"a worker sent a descriptor of kind {raw[0]}")
            handler(state, raw)
        self._submit()

    def _submit(self) -> None:
        batch, self._batch = self._batch, []
        if not batch:
            return
        try:
            self._backend.submit(batch)
        except Exception as error:
            for request in batch:
                if not request.answered:
                    request.fail(error)

    def _request(self, queue: Queue, raw: RawDescriptor) -> None:
        op = raw[1]
        if op > _WRITE:
            self._start(queue, raw, _NOTHING, -1)
        elif op == _READ and raw[11] == wire.SEGMENT_NONE:
            self._wants_region(queue, raw)
        else:
            self._start(queue, raw, self._buffer(raw), -1)

    def _buffer(self, raw: RawDescriptor) -> memoryview:
        start = raw[12]
        end = start + raw[9]
        memory = self._memory_of.get(raw[11], _NOTHING)
        if end > len(memory):
            raise WireError(f"a worker named a buffer outside the pool: {wire.Descriptor._make(raw)}")
        return memory[start:end]

    def _start(self, queue: Queue, raw: RawDescriptor, buffer: memoryview, region: int) -> None:
        if raw[6] < queue.epoch:
            self._dropped += 1
            return
        queue.running += 1
        self._requests += 1
        if raw[2] & _REPLAY:
            self._replayed += 1
        self._batch.append(Request(raw[1], raw[2], raw[8], raw[9], buffer, region, self._outbox, raw))

    def _wants_region(self, queue: Queue, raw: RawDescriptor) -> None:
        if raw[6] < queue.epoch:
            self._dropped += 1
        elif not self._name_region(queue, raw):
            self._waiting.append((queue, raw))

    def _name_region(self, queue: Queue, raw: RawDescriptor) -> bool:
        is_place = raw[0] == _PLACE
        try:
            region = self._ask(raw, is_place)
        except Exception as error:
            refusal = _REJECT if is_place else _DONE
            self._requests += not is_place
            self._answer(queue, raw, refusal, errno_of(error, f"naming a region at {raw[8]}"))
            return True
        if region is None:
            return False
        queue.lent[raw[5], raw[7]] = Lent(raw, region, _NAMED if is_place else _ANSWERED)
        if is_place:
            self._answer_region(queue, raw, _PLACED, 0, 0, region)
        else:
            self._requests += 1
            self._answered += 1
            self._answer_region(queue, raw, _DONE, raw[9], _REGION, region)
        return True

    def _ask(self, raw: RawDescriptor, is_place: bool) -> int | None:
        length = raw[9]
        if is_place:
            region = self._backend.place(raw[8], length, raw[2])
        else:
            region = self._backend.read_in_place(raw[8], length)
        if region is not None and not self._fits(region, length):
            raise BackendError(f"region {region} for {length} bytes is not a place in the own segment")
        return region

    def _fits(self, region: int, length: int) -> bool:
        return (
            region % self._device.logical_block_bytes == 0 and 0 <= region <= len(self._device.own) - length
        )

    def _data(self, queue: Queue, raw: RawDescriptor) -> None:
        key = (raw[5], raw[7])
        lent = queue.lent.get(key)
        if lent is None or lent.stage is not _NAMED or raw[9] > lent.raw[9]:
            self._dropped += 1
            return
        queue.lent[key] = Lent(lent.raw, lent.region, _RUNNING)
        self._start(queue, raw, self._device.own[lent.region : lent.region + raw[9]], lent.region)

    def _release(self, queue: Queue, raw: RawDescriptor) -> None:
        key = (raw[5], raw[7])
        lent = queue.lent.get(key)
        if lent is None:
            self._forget_waiting(lambda each, waiting: each is queue and (waiting[5], waiting[7]) == key)
        elif lent.stage is not _RUNNING:
            self._give_back(queue, lent.raw)

    def _give_back(self, queue: Queue, raw: RawDescriptor) -> None:
        lent = queue.lent.pop((raw[5], raw[7]))
        try:
            self._backend.released(lent.region)
        except Exception as error:
            errno_of(error, "released")

    def _forget_waiting(self, gone: Callable[[Queue, RawDescriptor], bool]) -> None:
        if not self._waiting:
            return
        kept = [each for each in self._waiting if not gone(*each)]
        self._dropped += len(self._waiting) - len(kept)
        self._waiting = kept

    def _welcome(self, queue: Queue, raw: RawDescriptor) -> None:
        """Nothing to do: requests follow."""

    def _fence(self, queue: Queue, raw: RawDescriptor) -> None:
        if raw[6] > queue.epoch:
            queue.epoch = raw[6]
            queue.running_old = queue.running
        epoch = queue.epoch
        self._batch, old = [], self._batch
        for request in old:
            if request.key[6] < epoch and request.key[4] == queue.number:
                request.complete(0)
            else:
                self._batch.append(request)
        self._forget_waiting(lambda each, waiting: each is queue and waiting[6] < epoch)
        for lent in list(queue.lent.values()):
            if lent.raw[6] < epoch and lent.stage is not _RUNNING:
                self._give_back(queue, lent.raw)
        queue.fence = raw

    def answers(self) -> Iterator[tuple[int, bytes]]:
        """All ready answers, one frame per queue."""
        if self._outbox.results:
            self._collect()
        if self._waiting:
            self._retry_waiting()
        for queue in self._queues:
            if queue.fence is not None and queue.running_old == 0:
                self._fenced += 1
                queue.answers.append(wire.pack_answer(queue.fence, _FENCED))
                queue.fence = None
            if queue.answers:
                frame = b"".join(queue.answers)
                queue.answers.clear()
                for start in range(0, len(frame), _FRAME_BYTES_MAX):
                    yield queue.number, frame[start : start + _FRAME_BYTES_MAX]

    def _collect(self) -> None:
        results = self._outbox.results
        for _ in range(len(results)):
            request, result = results.popleft()
            raw = request.key
            queue = self._queues[raw[4]]
            queue.running -= 1
            if raw[6] < queue.epoch:
                queue.running_old -= 1
                if request.region >= 0:
                    self._give_back(queue, raw)
                continue
            if request.region >= 0:
                key = (raw[5], raw[7])
                lent = queue.lent[key]
                queue.lent[key] = Lent(lent.raw, lent.region, _ANSWERED)
            if result > 0:
                result = self._checked(request, result)
            self._answer(queue, raw, _DONE, result)

    def _checked(self, request: Request, result: int) -> int:
        limit = request.length if request.op in (_READ, _WRITE) else 0
        if result <= limit:
            return result
        return errno_of(ValueError(f"{result} is more than was asked for"), repr(request))

    def _answer(self, queue: Queue, raw: RawDescriptor, kind: int, result: int) -> None:
        self._answered += 1
        self._failed += result < 0
        queue.answers.append(wire.pack_answer(raw, kind, result))

    def _answer_region(
        self, queue: Queue, raw: RawDescriptor, kind: int, result: int, flags: int, region: int
    ) -> None:
        own = self._device.own_segment
        queue.answers.append(wire.pack_answer(raw, kind, result, flags, own, region))

    def _retry_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for queue, raw in waiting:
            if not self._name_region(queue, raw):
                self._waiting.append((queue, raw))

    def running(self) -> int:
        """The number of requests that the backend has and has not answered, without those that wait for a region."""
        return sum(queue.running for queue in self._queues)

    def statistics(self) -> DispatchStatistics:
        """Counters since the attach."""
        return DispatchStatistics(
            requests=self._requests,
            answered=self._answered,
            failed=self._failed,
            replayed=self._replayed,
            running=self.running(),
            waiting=len(self._waiting),
            lent=sum(len(queue.lent) for queue in self._queues),
            fenced=self._fenced,
            dropped=self._dropped,
        )

    def close(self) -> None:
        """Nothing to free."""
