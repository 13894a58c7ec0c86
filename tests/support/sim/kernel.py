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


class TagOwner(enum.Enum):
    """The side that acts next on a tag."""

    NO_ONE = "not fetched"
    DRIVER = "a command is outstanding and no request"
    ASKED = "completed with 1: only NEED_GET_DATA is accepted"
    COPYING = "NEED_GET_DATA is outstanding"
    SERVER = "completed with a request: only COMMIT is accepted"


_STARTED = (TagOwner.ASKED, TagOwner.COPYING, TagOwner.SERVER)


class Task:
    """A process as the driver sees it: it may have /dev/ublkcN open, and has a ring."""

    def __init__(self, queue: int, epoch: int) -> None:
        self.queue, self.epoch = queue, epoch
        self.completions: deque[tuple[int, int]] = deque()

    def __repr__(self) -> str:
        return f"worker {self.queue} of epoch {self.epoch}"


class Tag:
    """One tag of a queue; `active`: the driver has a command of it, perhaps a cancelled one."""

    def __init__(self) -> None:
        self.owner = TagOwner.NO_ONE
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
        """Tags whose data could not be copied; the worker learns of it with the tag's next request only."""

    @property
    def is_torn(self) -> bool:
        """Whether commands that the driver still counts were cancelled."""
        return any(each.active and each.owner is TagOwner.NO_ONE for each in self.tags)

    def held_by(self, *owners: TagOwner) -> list[int]:
        return [number for number, each in enumerate(self.tags) if each.owner in owners]


class Ending:
    """An END_USER_RECOVERY that waits until every tag is fetched."""

    def __init__(self) -> None:
        self.is_over = self.given_up = False
        self._error: UblkError | None = None

    def give_up(self) -> None:
        """The command's process was killed."""
        self.given_up = True

    def over(self, error: UblkError | None) -> None:
        self.is_over, self._error = True, error

    def result(self) -> None:
        """Raises `UblkError` if the driver refused."""
        if self._error is not None:
            raise self._error


class Memory:
    """What the simulation knows of the addresses that workers name; overridden by the world."""

    def accept(self, task: Task, tag: int, address: int, length: int, use: str) -> None:
        """A worker names an address for a tag: for the kernel to fill, or to read from at once."""

    def filled(self, task: Task, tag: int) -> None:
        """A write's data was copied to its address."""

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
        self.openers: set[Task] = set()
        """The tasks that have /dev/ublkcN open."""
        self.quiescing = self.cancelling = self.all_fetched = self.gone = False
        self._tears = False
        """6.12's quiesce work is due on a device that does not serve: it cancels the dead worker's siblings."""
        self.size_bytes = 0
        self.finished: list[Request] = []
        self._endings: list[Ending] = []
        self._memory = memory

    # The block layer

    @property
    def outstanding(self) -> int:
        """The requests without an answer."""
        return sum(len(queue.waiting) + len(queue.held_by(*_STARTED)) for queue in self.queues)

    def submit(self, queue: int, request: Request) -> None:
        """A client's request."""
        self.queues[queue].waiting.append(request)

    def dispatch(self, number: int, choose: Callable[[list[int]], int], copied: int | None = None) -> bool:
        """Hand the queue's oldest request, if it has one, to a fetched tag, if it has one."""
        queue = self.queues[number]
        idle = queue.held_by(TagOwner.DRIVER)
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
            self._complete(tag, number_of_tag, TagOwner.ASKED, NEED_GET_DATA)
            return True
        if tag.request.op == Op.WRITE:
            self._copy_in(queue, number_of_tag, copied)
        self._complete(tag, number_of_tag, TagOwner.SERVER, 0)
        return True

    def copy(self, number: int, number_of_tag: int, sectors: int | None = None) -> None:
        """Copy a write's data, all or `sectors` of it; 0 requeues the request."""
        queue = self.queues[number]
        tag = queue.tags[number_of_tag]
        assert tag.owner is TagOwner.COPYING
        if sectors == 0:
            self._requeue(queue, number_of_tag)
            assert tag.task is not None
            self._memory.release(tag.task, number_of_tag)
            tag.owner = TagOwner.DRIVER
            queue.sent_back.add(number_of_tag)
            return
        self._copy_in(queue, number_of_tag, sectors)
        assert tag.task is not None
        self._memory.filled(tag.task, number_of_tag)
        self._complete(tag, number_of_tag, TagOwner.SERVER, 0)

    # The rings

    def consume(self, task: Task, command: Command) -> None:
        """A worker's command; the driver refuses a wrong one with an errno in its completion."""
        queue, tag = self.queues[task.queue], self.queues[task.queue].tags[command.tag]
        if command.op == FETCH:
            self._fetch(queue, task, command)
            return
        expected = TagOwner.ASKED if command.op == GET_DATA else TagOwner.SERVER
        assert tag.task is task, f"{task}: {command} on a tag of {tag.task}"
        assert tag.owner is expected, f"{task}: {command} while {tag.owner.value}"
        if command.op == GET_DATA:
            assert tag.request is not None
            self._accept(task, tag, command, tag.request.left * SECTOR_BYTES, "fill")
            tag.owner, tag.active = TagOwner.COPYING, True
            return
        self._commit(queue, task, tag, command)
        if not self.need_get_data:
            self._accept(task, tag, command, self.max_io_bytes, "keep")
        else:
            self._memory.release(task, command.tag)
        tag.request, tag.owner, tag.active = None, TagOwner.DRIVER, True

    def _fetch(self, queue: HardwareQueue, task: Task, command: Command) -> None:
        tag = queue.tags[command.tag]
        if tag.active or queue.ready == self.depth:
            task.completions.append((command.tag, -errno.EBUSY))
            return
        assert queue.task in (None, task), f"{task} fetches a tag of {queue.task}"
        if not self.need_get_data and command.address:
            self._accept(task, tag, command, self.max_io_bytes, "keep")
        tag.task, tag.active, tag.owner = task, True, TagOwner.DRIVER
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
        """The process has ended: its commands are cancelled, its descriptor is closed, its mapping is removed."""
        queue = self.queues[task.queue]
        self.openers.discard(task)
        task.completions.clear()
        mine = [number for number, tag in enumerate(queue.tags) if tag.task is task]
        cancellable = [
            number for number in mine if queue.tags[number].owner in (TagOwner.DRIVER, TagOwner.COPYING)
        ]
        for number in cancellable:
            if queue.tags[number].owner is TagOwner.COPYING:
                self._requeue(queue, number)
            queue.tags[number].owner = TagOwner.NO_ONE
        if cancellable and self.model == "6.12":
            self._cancel_queue(queue)
        elif cancellable:
            self.cancelling = True
        if self.model == "7.3" and not self.openers:
            self._released()

    def notice(self, number: int) -> bool:
        """6.12's request timer: notice a worker that died while it held every tag; whether one did."""
        queue = self.queues[number]
        held = [tag for tag in queue.tags if tag.owner in _STARTED]
        if self.model == "7.3" or not held or any(tag.task in self.openers for tag in held):
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
        for number in reversed(queue.held_by(*_STARTED)):
            self._requeue(queue, number)

    def _released(self) -> None:
        """7.3: the last process that had /dev/ublkcN open has closed it."""
        for queue in self.queues:
            self._abort(queue)
        if self.state is DeviceState.LIVE:
            self.state = DeviceState.QUIESCED
        self._reset()

    def quiesce(self) -> bool:
        """6.12's quiesce work: the device is QUIESCED once no worker has a request."""
        busy = any(queue.held_by(*_STARTED) for queue in self.queues)
        if not self.quiescing or busy:
            return False
        self.quiescing = False
        self.state = DeviceState.QUIESCED
        self._cancel_all()
        return True

    def tear(self) -> bool:
        """6.12's quiesce work on a device that does not serve; whether it was due."""
        if not self._tears:
            return False
        self._tears = False
        self._cancel_all()
        return True

    def _cancel_all(self) -> None:
        for queue in self.queues:
            for number in queue.held_by(TagOwner.DRIVER):
                tag = queue.tags[number]
                tag.owner = TagOwner.NO_ONE
                assert tag.task is not None
                self._memory.release(tag.task, number)
                if tag.task in self.openers:
                    tag.task.completions.append((number, -errno.ENODEV))

    # Control commands

    def open(self, tasks: list[Task]) -> None:
        """The supervisor opens, maps, forks these, unmaps and closes.  Raises `OSError` while a process has it open."""
        if self.openers:
            raise OSError(errno.EBUSY, "/dev/ublkcN is open")
        self.openers.update(tasks)

    def start(self) -> None:
        """START_DEV, once every tag is fetched."""
        assert self.all_fetched
        self.state = DeviceState.LIVE

    def update_size(self, size_bytes: int) -> None:
        """UPDATE_SIZE; the driver takes any size, and crashes without a disk."""
        assert self.model != "6.12" and self.state is not DeviceState.DEAD, (
            "UPDATE_SIZE without a disk: a crash"
        )
        self.size_bytes = size_bytes

    def start_recovery(self) -> None:
        """START_USER_RECOVERY."""
        if self.openers or self.state is not DeviceState.QUIESCED:
            raise UblkError("START_USER_RECOVERY", errno.EBUSY)
        if self.model == "6.12":
            # Long over if no process has the device open.
            self.tear()
            assert all(queue.task for queue in self.queues), (
                "START_USER_RECOVERY of a queue without a task: a panic"
            )
        self._reset()

    def complete_fetch_round(self) -> None:
        """A process that opens the device, fetches what can be fetched and ends; before START_USER_RECOVERY."""
        if self.openers:
            raise UblkError("/dev/ublkcN", errno.EBUSY)
        for number in range(len(self.queues)):
            task = Task(number, 0)
            self.openers.add(task)
            for tag in range(self.depth):
                self._fetch(self.queues[number], task, Command(tag, FETCH, 0, 0))
            self.exit(task)

    def wait_to_end_recovery(self) -> Ending:
        """END_USER_RECOVERY: ends when every tag is fetched, or was since the last START_USER_RECOVERY."""
        ending = Ending()
        self._endings.append(ending)
        self._end_recovery()
        return ending

    def _end_recovery(self) -> None:
        # The command sleeps on this very event, so that hardly any other process runs in between.
        while self.all_fetched and self._endings:
            ending = self._endings.pop(0)
            if ending.given_up:
                continue
            refused = self.state is not DeviceState.QUIESCED
            ending.over(UblkError("END_USER_RECOVERY", errno.EBUSY) if refused else None)
            self.state = DeviceState.LIVE

    def stop(self) -> bool:
        """STOP_DEV, which waits for the disk's requests, then cancels every fetched tag; whether the disk is gone."""
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
                tag.owner, tag.task, tag.active = TagOwner.NO_ONE, None, False

    # Parts

    def _describe(self, queue: HardwareQueue, number: int, sectors: int) -> None:
        request = queue.tags[number].request
        assert request is not None
        each = queue.descriptors[number]
        each.op_flags = request.op | request.flags
        each.start_sector, each.sectors = request.sector + request.done, sectors

    def _complete(self, tag: Tag, number: int, owner: TagOwner, result: int) -> None:
        tag.owner, tag.active = owner, False
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
        tag.request, tag.owner = None, TagOwner.NO_ONE

    def _answer(self, request: Request, result: int) -> None:
        assert request.result is None, f"{request} is answered again, with {result}"
        request.result = result
        self.finished.append(request)
