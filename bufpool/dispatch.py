"""The engine below methods and requests: frames of the wire become `Request`s, their results become frames.

Owns, per queue, what runs, what waits for a region, and which regions are lent; so it also answers fences: a request
of an old epoch that waits is dropped, one that runs is waited for, regions it named come back.  A region stays lent
until RELEASE, whatever was answered: until then the worker may take the data from it.  Knows nothing of sockets.
Runs on the loop's thread; only the `Outbox` is touched by others.
"""

import enum
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from ublkpool.bufpool import wire
from ublkpool.bufpool.backend import Backend, Device, Outbox, Request, errno_of
from ublkpool.bufpool.errors import BackendError, WireError
from ublkpool.bufpool.wire import Descriptor, Flag, Kind, Op

_REQUEST, _PLACE, _DATA, _RELEASE = int(Kind.REQUEST), int(Kind.PLACE), int(Kind.DATA), int(Kind.RELEASE)
_DONE, _PLACED, _REJECT, _FENCED = int(Kind.DONE), int(Kind.PLACED), int(Kind.REJECT), int(Kind.FENCED)
_READ, _WRITE = int(Op.READ), int(Op.WRITE)
_REGION = int(Flag.REGION)
_NOTHING = memoryview(b"")


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
    """How far the request is that a region was named for."""

    NAMED = enum.auto()
    RUNNING = enum.auto()
    ANSWERED = enum.auto()


class Lent(NamedTuple):
    """A region that the backend named, until it comes back."""

    descriptor: Descriptor
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
        self.fence: Descriptor | None = None
        self.lent: dict[tuple[int, int], Lent] = {}
        self.answers: list[Descriptor] = []


class RequestEngine:
    """A `FrameEngine` for backends with methods or requests."""

    def __init__(self, backend: Backend, device: Device, outbox: Outbox) -> None:
        self._backend = backend
        self._device = device
        self._outbox = outbox
        self._queues = [Queue(number, device.epoch) for number in range(device.queues)]
        self._waiting: list[tuple[Queue, Descriptor]] = []
        self._batch: list[Request] = []
        self._requests = self._answered = self._failed = 0
        self._replayed = self._fenced = self._dropped = 0
        self._handlers: dict[int, Callable[[Queue, Descriptor], None]] = {
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
        for descriptor in wire.iter_frame(frame):
            handler = handlers.get(descriptor.kind)
            if handler is None:
                raise WireError(f"a worker sent a descriptor of kind {descriptor.kind}")
            handler(state, descriptor)
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

    def _request(self, queue: Queue, descriptor: Descriptor) -> None:
        if descriptor.op == _READ and descriptor.segment == wire.SEGMENT_NONE:
            self._wants_region(queue, descriptor)
        elif descriptor.op in (_READ, _WRITE):
            self._start(queue, descriptor, self._pool_buffer(descriptor), -1)
        else:
            self._start(queue, descriptor, _NOTHING, -1)

    def _pool_buffer(self, descriptor: Descriptor) -> memoryview:
        end = descriptor.buffer + descriptor.length
        pool = self._device.pool
        if descriptor.segment != wire.SEGMENT_POOL or end > len(pool):
            raise WireError(f"a worker named a buffer outside the pool: {descriptor}")
        return pool[descriptor.buffer : end]

    def _start(self, queue: Queue, descriptor: Descriptor, buffer: memoryview, region: int) -> None:
        if descriptor.epoch < queue.epoch:
            self._dropped += 1
            return
        queue.running += 1
        self._requests += 1
        if descriptor.flags & Flag.REPLAY:
            self._replayed += 1
        self._batch.append(Request(descriptor, buffer, region, self._outbox))

    def _wants_region(self, queue: Queue, descriptor: Descriptor) -> None:
        if descriptor.epoch < queue.epoch:
            self._dropped += 1
        elif not self._name_region(queue, descriptor):
            self._waiting.append((queue, descriptor))

    def _name_region(self, queue: Queue, descriptor: Descriptor) -> bool:
        try:
            region = self._ask(descriptor)
        except Exception as error:
            refusal = _DONE if descriptor.kind == _REQUEST else _REJECT
            self._answer(
                queue, descriptor, refusal, errno_of(error, f"naming a region at {descriptor.offset}")
            )
            return True
        if region is None:
            return False
        placing = descriptor.kind == _PLACE
        stage = Stage.NAMED if placing else Stage.ANSWERED
        queue.lent[descriptor.tag, descriptor.sequence] = Lent(descriptor, region, stage)
        if placing:
            self._answer(queue, descriptor, _PLACED, 0, 0, region)
        else:
            self._requests += 1
            self._answer(queue, descriptor, _DONE, descriptor.length, _REGION, region)
        return True

    def _ask(self, descriptor: Descriptor) -> int | None:
        if descriptor.kind == _PLACE:
            region = self._backend.place(descriptor.offset, descriptor.length, descriptor.flags)
        else:
            region = self._backend.read_in_place(descriptor.offset, descriptor.length)
        if region is not None and not self._fits(region, descriptor.length):
            raise BackendError(
                f"region {region} for {descriptor.length} bytes is not a place in the own segment"
            )
        return region

    def _fits(self, region: int, length: int) -> bool:
        return (
            region % self._device.logical_block_bytes == 0 and 0 <= region <= len(self._device.own) - length
        )

    def _data(self, queue: Queue, descriptor: Descriptor) -> None:
        key = (descriptor.tag, descriptor.sequence)
        lent = queue.lent.get(key)
        if lent is None or lent.stage is not Stage.NAMED or descriptor.length > lent.descriptor.length:
            self._dropped += 1
            return
        queue.lent[key] = lent._replace(stage=Stage.RUNNING)
        buffer = self._device.own[lent.region : lent.region + descriptor.length]
        self._start(queue, descriptor, buffer, lent.region)

    def _release(self, queue: Queue, descriptor: Descriptor) -> None:
        lent = queue.lent.get((descriptor.tag, descriptor.sequence))
        if lent is not None and lent.stage is not Stage.RUNNING:
            self._give_back(queue, lent.descriptor)
        elif lent is None:
            self._forget_waiting(
                lambda each, waiting: (
                    each is queue
                    and waiting.tag == descriptor.tag
                    and waiting.sequence == descriptor.sequence
                )
            )

    def _give_back(self, queue: Queue, descriptor: Descriptor) -> None:
        lent = queue.lent.pop((descriptor.tag, descriptor.sequence))
        try:
            self._backend.released(lent.region)
        except Exception as error:
            errno_of(error, "released")

    def _forget_waiting(self, gone: Callable[[Queue, Descriptor], bool]) -> None:
        kept = [each for each in self._waiting if not gone(*each)]
        self._dropped += len(self._waiting) - len(kept)
        self._waiting = kept

    def _welcome(self, queue: Queue, descriptor: Descriptor) -> None:
        """Nothing to do: requests follow."""

    def _fence(self, queue: Queue, descriptor: Descriptor) -> None:
        if descriptor.epoch > queue.epoch:
            queue.epoch = descriptor.epoch
            queue.running_old = queue.running
        epoch = queue.epoch
        self._batch, old = [], self._batch
        for request in old:
            if request.descriptor.epoch < epoch and request.descriptor.queue == queue.number:
                request.complete(0)
            else:
                self._batch.append(request)
        self._forget_waiting(lambda each, waiting: each is queue and waiting.epoch < epoch)
        for lent in list(queue.lent.values()):
            if lent.descriptor.epoch < epoch and lent.stage is not Stage.RUNNING:
                self._give_back(queue, lent.descriptor)
        queue.fence = descriptor

    def answers(self) -> Iterator[tuple[int, bytes]]:
        """Everything that is ready, one frame a queue."""
        self._collect()
        self._retry_waiting()
        for queue in self._queues:
            if queue.fence is not None and queue.running_old == 0:
                self._fenced += 1
                queue.answers.append(_answer_to(queue.fence, _FENCED))
                queue.fence = None
            if queue.answers:
                answers, queue.answers = queue.answers, []
                for start in range(0, len(answers), wire.DESCRIPTORS_PER_FRAME_MAX):
                    piece = answers[start : start + wire.DESCRIPTORS_PER_FRAME_MAX]
                    yield queue.number, wire.pack_frame(piece)

    def _collect(self) -> None:
        results = self._outbox.results
        for _ in range(len(results)):
            request, result = results.popleft()
            descriptor = request.descriptor
            queue = self._queues[descriptor.queue]
            queue.running -= 1
            if descriptor.epoch < queue.epoch:
                queue.running_old -= 1
                if request.region >= 0:
                    self._give_back(queue, descriptor)
            else:
                if request.region >= 0:
                    key = (descriptor.tag, descriptor.sequence)
                    queue.lent[key] = queue.lent[key]._replace(stage=Stage.ANSWERED)
                self._answer(queue, descriptor, _DONE, self._checked(request, result))

    def _checked(self, request: Request, result: int) -> int:
        limit = request.length if request.op in (_READ, _WRITE) else 0
        if result <= limit:
            return result
        return errno_of(ValueError(f"{result} is more than was asked for"), repr(request))

    def _answer(
        self, queue: Queue, descriptor: Descriptor, kind: int, result: int, flags: int = 0, region: int = -1
    ) -> None:
        if kind != _PLACED:
            self._answered += 1
            self._failed += result < 0
        queue.answers.append(_answer_to(descriptor, kind, result, flags, self._device.own_segment, region))

    def _retry_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for queue, descriptor in waiting:
            if not self._name_region(queue, descriptor):
                self._waiting.append((queue, descriptor))

    def running(self) -> int:
        """Requests that the backend has not answered; those that wait for a region run nowhere."""
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
        """Nothing of its own to free."""


def _answer_to(
    descriptor: Descriptor, kind: int, result: int = 0, flags: int = 0, segment: int = 0, region: int = -1
) -> Descriptor:
    return Descriptor(
        kind,
        descriptor.op,
        flags,
        descriptor.device,
        descriptor.queue,
        descriptor.tag,
        descriptor.epoch,
        descriptor.sequence,
        descriptor.offset,
        descriptor.length,
        result,
        segment if region >= 0 else wire.SEGMENT_NONE,
        max(region, 0),
    )
