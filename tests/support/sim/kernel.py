"""One ublk device in the kernel, after drivers/block/ublk_drv.c of 6.12 and 7.3: the block layer's requests, the tags,
the tasks that fetched them, and what the control commands do.

Owns what the driver owns.  A command that the driver would refuse, or that would crash it, is an `AssertionError`.
When something happens is the simulation's choice: each method is one event.  Data moves between requests and the
addresses that the worker named, at once.
"""

import enum
import errno
from collections import deque
from collections.abc import Callable
from typing import Literal

from support.fakes.driver import ERRNO_MAX, NEED_GET_DATA, SECTOR_BYTES, Request
from ublkpool.bufpool.wire import Op
from ublkpool.ublk import _native
from ublkpool.ublk.abi import DeviceState
from ublkpool.ublk.errors import UblkError
from ublkpool.ublk.queue import Command

_ffi = _native.ffi
FETCH, GET_DATA, COMMIT = range(3)
Model = Literal["6.12", "7.3"]


class Holder(enum.Enum):
    """Who is to speak next about a tag."""

    NOBODY = "not fetched"
    DRIVER = "a command is outstanding and no request"
    ASKED = "completed with 1: only NEED_GET_DATA is accepted"
    COPYING = "NEED_GET_DATA is outstanding"
    SERVER = "completed with a request: only COMMIT is accepted"


_STARTED = (Holder.ASKED, Holder.COPYING, Holder.SERVER)


class Task:
    """A process as the driver sees it: it may hold /dev/ublkcN and has a ring."""

    def __init__(self, queue: int, epoch: int) -> None:
        self.queue, self.epoch = queue, epoch
        self.completions: deque[tuple[int, int]] = deque()

    def __repr__(self) -> str:
        return f"worker {self.queue} of epoch {self.epoch}"


class Tag:
    """One tag of a queue; `active` says that the driver has a command of it, be it cancelled."""

    def __init__(self) -> None:
        self.holder = Holder.NOBODY
        self.task: Task | None = None
        self.request: Request | None = None
        self.address = 0
        self.active = False


class HardwareQueue:
    """A queue: its tags, its task, and the requests that have no tag yet."""

    def __init__(self, depth: int) -> None:
        self.descriptors = _ffi.new("struct uq_iod[]", depth)
        self.tags = [Tag() for _ in range(depth)]
        self.waiting: deque[Request] = deque()
        self.ready = 0
        self.task: Task | None = None
        self.cancelling = False
        self.sent_back: set[int] = set()
        """Tags whose data could not be copied: their worker learns of it only from their next request."""

    @property
    def is_torn(self) -> bool:
        """Whether commands that the driver believes to have were cancelled."""
        return any(each.active and each.holder is Holder.NOBODY for each in self.tags)

    def with_holder(self, *holders: Holder) -> list[int]:
        return [number for number, each in enumerate(self.tags) if each.holder in holders]


class Ending:
    """An END_USER_RECOVERY that waits until every tag is fetched."""

    def __init__(self) -> None:
        self.is_over = self.given_up = False
        self._error: UblkError | None = None

    def give_up(self) -> None:
        """Its process was killed."""
        self.given_up = True

    def over(self, error: UblkError | None) -> None:
        self.is_over, self._error = True, error

    def result(self) -> None:
        """Raises `UblkError` if the driver said no."""
        if self._error is not None:
            raise self._error


class Memory:
    """What the simulation knows of the addresses that workers name; overridden by the world."""

    def accept(self, task: Task, tag: int, address: int, length: int, use: str) -> None:
        """A worker names an address for a tag: for the kernel to fill, or to read from at once."""

    def filled(self, task: Task, tag: int) -> None:
        """A write's data is where it was to go."""

    def release(self, task: Task, tag: int) -> None:
        """The kernel touches no memory of the tag any more."""


class SimKernel:
    """A device with one disk."""

    def __init__(
        self,
        model: Model,
        queues: int,
        depth: int,
        block_bytes: int,
        max_io_bytes: int,
        need_get_data: bool,
        memory: Memory,
    ) -> None:
        self.model = model
        self.depth, self.block_bytes, self.max_io_bytes = depth, block_bytes, max_io_bytes
        self.need_get_data = need_get_data
        self.queues = [HardwareQueue(depth) for _ in range(queues)]
        self.state = DeviceState.DEAD
        self.holders: set[Task] = set()
        """Who has /dev/ublkcN open."""
        self.quiescing = self.cancelling = self.all_fetched = self.gone = False
        self._tears = False
        """6.12's quiesce work is due on a device that does not serve: it cancels what the dead one's siblings have."""
        self.finished: list[Request] = []
        self._endings: list[Ending] = []
        self._memory = memory

    # The block layer

    @property
    def outstanding(self) -> int:
        """Requests without an answer."""
        return sum(len(queue.waiting) + len(queue.with_holder(*_STARTED)) for queue in self.queues)

    def submit(self, queue: int, request: Request) -> None:
        """A client's request."""
        self.queues[queue].waiting.append(request)

    def dispatch(self, number: int, choose: Callable[[list[int]], int], copied: int | None = None) -> bool:
        """Hand the queue's oldest request to a fetched tag, if any of that is possible."""
        queue = self.queues[number]
        idle = queue.with_holder(Holder.DRIVER)
        held = self.quiescing or self.cancelling or queue.cancelling or self.state is not DeviceState.LIVE
        if held or not queue.waiting:
            return False
        assert not queue.is_torn, "a request goes to a command that was cancelled: a panic"
        if not idle:
            return False
        # A worker keeps the buffer of a tag that was sent back until that tag's next request: one comes soon.
        number_of_tag = choose(sorted(queue.sent_back.intersection(idle)) or idle)
        queue.sent_back.discard(number_of_tag)
        tag = queue.tags[number_of_tag]
        tag.request = queue.waiting.popleft()
        self._describe(queue, number_of_tag, tag.request.left)
        if tag.request.op == Op.WRITE and self.need_get_data:
            self._complete(tag, number_of_tag, Holder.ASKED, NEED_GET_DATA)
            return True
        if tag.request.op == Op.WRITE:
            self._copy_in(queue, number_of_tag, copied)
        self._complete(tag, number_of_tag, Holder.SERVER, 0)
        return True

    def copy(self, number: int, number_of_tag: int, sectors: int | None = None) -> None:
        """Copy a write's data, all or so many sectors; 0 puts the request back to be sent again."""
        queue = self.queues[number]
        tag = queue.tags[number_of_tag]
        assert tag.holder is Holder.COPYING
        if sectors == 0:
            self._requeue(queue, number_of_tag)
            assert tag.task is not None
            self._memory.release(tag.task, number_of_tag)
            tag.holder = Holder.DRIVER
            queue.sent_back.add(number_of_tag)
            return
        self._copy_in(queue, number_of_tag, sectors)
        assert tag.task is not None
        self._memory.filled(tag.task, number_of_tag)
        self._complete(tag, number_of_tag, Holder.SERVER, 0)

    # The rings

    def consume(self, task: Task, command: Command) -> None:
        """A worker's command; a completion with an errno is how the driver says no without harm."""
        queue, tag = self.queues[task.queue], self.queues[task.queue].tags[command.tag]
        if command.op == FETCH:
            self._fetch(queue, task, command)
            return
        expected = Holder.ASKED if command.op == GET_DATA else Holder.SERVER
        assert tag.task is task, f"{task}: {command} on a tag of {tag.task}"
        assert tag.holder is expected, f"{task}: {command} while {tag.holder.value}"
        if command.op == GET_DATA:
            assert tag.request is not None
            self._accept(task, tag, command, tag.request.left * SECTOR_BYTES, "fill")
            tag.holder, tag.active = Holder.COPYING, True
            return
        self._commit(queue, task, tag, command)
        if not self.need_get_data:
            self._accept(task, tag, command, self.max_io_bytes, "keep")
        else:
            self._memory.release(task, command.tag)
        tag.request, tag.holder, tag.active = None, Holder.DRIVER, True

    def _fetch(self, queue: HardwareQueue, task: Task, command: Command) -> None:
        tag = queue.tags[command.tag]
        if tag.active or queue.ready == self.depth:
            task.completions.append((command.tag, -errno.EBUSY))
            return
        assert queue.task in (None, task), f"{task} fetches a tag of {queue.task}"
        if not self.need_get_data and command.address:
            self._accept(task, tag, command, self.max_io_bytes, "keep")
        tag.task, tag.active, tag.holder = task, True, Holder.DRIVER
        queue.ready += 1
        if queue.ready == self.depth:
            queue.task = task
        self.all_fetched |= all(each.ready == self.depth for each in self.queues)
        self._end_recovery()

    def _accept(self, task: Task, tag: Tag, command: Command, length: int, use: str) -> None:
        self._memory.accept(task, command.tag, command.address, length, use)
        tag.address = command.address

    def _commit(self, queue: HardwareQueue, task: Task, tag: Tag, command: Command) -> None:
        request = tag.request
        assert request is not None and command.result >= -ERRNO_MAX
        if command.result < 0:
            self._answer(request, command.result)
        elif request.op not in (Op.READ, Op.WRITE):
            self._answer(request, 0)
        else:
            self._moved(queue, task, command, request)

    def _moved(self, queue: HardwareQueue, task: Task, command: Command, request: Request) -> None:
        limit = queue.descriptors[command.tag].sectors * SECTOR_BYTES
        assert 0 < command.result <= limit, f"{command}: the driver answers EIO or sends it again for ever"
        assert command.result % self.block_bytes == 0
        if request.op == Op.READ:
            self._memory.accept(task, command.tag, command.address, command.result, "drain")
            start = request.done * SECTOR_BYTES
            found = _ffi.buffer(_ffi.cast("uint8_t *", command.address), command.result)
            request.received[start : start + command.result] = found[:]
        request.done += command.result // SECTOR_BYTES
        if request.left and (self.model == "6.12" or request.op == Op.READ):
            queue.waiting.appendleft(request)
        else:
            # 7.3 tells the client that a short write was done whole.
            self._answer(request, request.sectors * SECTOR_BYTES)

    # The end of a process

    def exit(self, task: Task) -> None:
        """The process is gone: its commands are cancelled, its descriptor and mapping go."""
        queue = self.queues[task.queue]
        self.holders.discard(task)
        task.completions.clear()
        mine = [number for number, tag in enumerate(queue.tags) if tag.task is task]
        cancellable = [
            number for number in mine if queue.tags[number].holder in (Holder.DRIVER, Holder.COPYING)
        ]
        for number in cancellable:
            if queue.tags[number].holder is Holder.COPYING:
                self._requeue(queue, number)
            queue.tags[number].holder = Holder.NOBODY
        if cancellable and self.model == "6.12":
            self._cancel_queue(queue)
        elif cancellable:
            self.cancelling = True
        if self.model == "7.3" and not self.holders:
            self._released()

    def notice(self, number: int) -> bool:
        """6.12's request timer: a worker that died while it held every tag is noticed; whether there was one."""
        queue = self.queues[number]
        held = [tag for tag in queue.tags if tag.holder in _STARTED]
        if self.model == "7.3" or not held or any(tag.task in self.holders for tag in held):
            return False
        self._cancel_queue(queue)
        return True

    def _cancel_queue(self, queue: HardwareQueue) -> None:
        if not queue.cancelling:
            queue.cancelling = True
            self.quiescing |= self.state is DeviceState.LIVE
            self._tears |= self.state is DeviceState.QUIESCED
            self._abort(queue)

    def _abort(self, queue: HardwareQueue) -> None:
        for number in reversed(queue.with_holder(*_STARTED)):
            self._requeue(queue, number)

    def _released(self) -> None:
        """7.3: the last holder of /dev/ublkcN has closed it."""
        for queue in self.queues:
            self._abort(queue)
        if self.state is DeviceState.LIVE:
            self.state = DeviceState.QUIESCED
        self._reset()

    def quiesce(self) -> bool:
        """6.12's quiesce work: when no request is with a server any more the device stands still."""
        busy = any(queue.with_holder(*_STARTED) for queue in self.queues)
        if not self.quiescing or busy:
            return False
        self.quiescing = False
        self.state = DeviceState.QUIESCED
        self._cancel_all()
        return True

    def tear(self) -> bool:
        """6.12's quiesce work where nothing is left to quiesce; whether it was due."""
        if not self._tears:
            return False
        self._tears = False
        self._cancel_all()
        return True

    def _cancel_all(self) -> None:
        for queue in self.queues:
            for number in queue.with_holder(Holder.DRIVER):
                tag = queue.tags[number]
                tag.holder = Holder.NOBODY
                assert tag.task is not None
                self._memory.release(tag.task, number)
                if tag.task in self.holders:
                    tag.task.completions.append((number, -errno.ENODEV))

    # Control commands

    def open(self, tasks: list[Task]) -> None:
        """The supervisor opens, maps, forks these, unmaps and closes.  Raises `OSError` while somebody holds it."""
        if self.holders:
            raise OSError(errno.EBUSY, "/dev/ublkcN is open")
        self.holders.update(tasks)

    def start(self) -> None:
        """START_DEV, once every tag is fetched."""
        assert self.all_fetched
        self.state = DeviceState.LIVE

    def start_recovery(self) -> None:
        """START_USER_RECOVERY."""
        if self.holders or self.state is not DeviceState.QUIESCED:
            raise UblkError("START_USER_RECOVERY", errno.EBUSY)
        if self.model == "6.12":
            # Long over, if nobody holds the device any more.
            self.tear()
            assert all(queue.task for queue in self.queues), (
                "START_USER_RECOVERY of a queue without a task: a panic"
            )
        self._reset()

    def complete_fetch_round(self) -> None:
        """A process that opens the device, fetches what can be fetched and ends; before START_USER_RECOVERY."""
        if self.holders:
            raise UblkError("/dev/ublkcN", errno.EBUSY)
        for number in range(len(self.queues)):
            task = Task(number, 0)
            self.holders.add(task)
            for tag in range(self.depth):
                self._fetch(self.queues[number], task, Command(tag, FETCH, 0, 0))
            self.exit(task)

    def wait_to_end_recovery(self) -> Ending:
        """END_USER_RECOVERY: it is over when every tag is fetched, or was since the last START_USER_RECOVERY."""
        ending = Ending()
        self._endings.append(ending)
        self._end_recovery()
        return ending

    def _end_recovery(self) -> None:
        # The command sleeps on this very event: nobody else gets a turn in between, or hardly.
        while self.all_fetched and self._endings:
            ending = self._endings.pop(0)
            if ending.given_up:
                continue
            refused = self.state is not DeviceState.QUIESCED
            ending.over(UblkError("END_USER_RECOVERY", errno.EBUSY) if refused else None)
            self.state = DeviceState.LIVE

    def stop(self) -> bool:
        """STOP_DEV: whether the disk is gone, which waits for its requests; then every fetched tag is cancelled."""
        if self.outstanding:
            return False
        if not self.gone:
            self.gone = True
            self._cancel_all()
        return True

    def _reset(self) -> None:
        self.cancelling = self.all_fetched = False
        for queue in self.queues:
            queue.ready, queue.task, queue.cancelling = 0, None, False
            queue.sent_back.clear()
            for tag in queue.tags:
                tag.holder, tag.task, tag.active = Holder.NOBODY, None, False

    # Parts

    def _describe(self, queue: HardwareQueue, number: int, sectors: int) -> None:
        request = queue.tags[number].request
        assert request is not None
        each = queue.descriptors[number]
        each.op_flags = request.op | request.flags
        each.start_sector, each.sectors = request.sector + request.done, sectors

    def _complete(self, tag: Tag, number: int, holder: Holder, result: int) -> None:
        tag.holder, tag.active = holder, False
        assert tag.task is not None
        tag.task.completions.append((number, result))

    def _copy_in(self, queue: HardwareQueue, number: int, sectors: int | None) -> None:
        tag = queue.tags[number]
        request = tag.request
        assert request is not None
        count = request.left if sectors is None else min(sectors, request.left)
        start = request.done * SECTOR_BYTES
        data = request.data[start : start + count * SECTOR_BYTES]
        _ffi.memmove(_ffi.cast("uint8_t *", tag.address), data, len(data))
        self._describe(queue, number, count)

    def _requeue(self, queue: HardwareQueue, number: int) -> None:
        tag = queue.tags[number]
        assert tag.request is not None
        queue.waiting.appendleft(tag.request)
        tag.request, tag.holder = None, Holder.NOBODY

    def _answer(self, request: Request, result: int) -> None:
        assert request.result is None, f"{request} is answered again, with {result}"
        request.result = result
        self.finished.append(request)
