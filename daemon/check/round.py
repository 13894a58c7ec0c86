"""One round of a check: seeded requests in one transport and placement, with the ends that a backend must survive.

Owns the order of what happens to the backend, and what the shadow is told.  Runs on the check's asyncio loop.
"""

import asyncio
import errno
import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ublkpool.bufpool.wire import Op
from ublkpool.daemon.check.host import Host, Setting, State
from ublkpool.daemon.check.process import Command
from ublkpool.daemon.check.promises import Broken
from ublkpool.daemon.check.requests import Offer, Request, Requests
from ublkpool.daemon.check.shadow import FENCE_MARK, Change, Shadow, Wrong
from ublkpool.daemon.check.verdict import Event, EventKind, broken_by
from ublkpool.workers.tag_state import State as TagState

_BURST_REQUESTS = 60
_BURST_S = 0.6
_SERIAL_SHARE = 4
"""A burst's last answers must come within this part of the deadline."""
_STARVED_DEADLINES = 3
_FENCE_WATCH_S = 0.02
_EVENTS_KEPT = 200
_LAST_REQUESTS_MAX = 4
_SLOW_S = 0.05
_KEEP_SHARE = 0.75
_LOOK_AROUND_S = 5.0
KILL_POINTS = (
    *("answered", "executing", "slow", "placing", "copying", "without-data", "idle", "fencing", "at-once"),
)
"""When a backend is killed: after an answer, while it executes a change, while a change takes long, before it names a
place, before the data is there, with a request without data, with none, while it confirms a fence, at once."""


class Memory:
    """What all rounds of a check share."""

    def __init__(self, seed: int, nonce: int, power_loss: str, allows_errors: bool) -> None:
        """`power_loss` is a command that loses what the store has not flushed; empty: there is none."""
        self.rng = random.Random(seed)
        self.nonce = nonce
        self.power_loss, self.allows_errors = power_loss, allows_errors
        self.state = State()
        self.shadow: Shadow | None = None
        self.events: list[Event] = []
        self.counts: Counter[str] = Counter()
        self.number = 0
        self._ends: list[str] = []

    def next_end(self, places: bool, due: str) -> str:
        """What happens next to the backend: each way in turn, in a seeded order; `due` chooses among them."""
        while True:
            for end in self._ends:
                is_kill = end in KILL_POINTS
                if (places or end != "placing") and (not due or due == ("kill" if is_kill else end)):
                    self._ends.remove(end)
                    return end
            more = [*KILL_POINTS, "slow", "slow", "stop", "fence", "fence", "stop"]
            self.rng.shuffle(more)
            self._ends += more

    def note(self, kind: EventKind, words: str, hit: Sequence[Request] = ()) -> None:
        """Something was done to the backend, while the requests `hit` were running."""
        assert self.shadow is not None
        self.counts[kind] += 1
        blocks = tuple((each.change.first, each.change.count) for each in hit if each.change is not None)
        self.events = [*self.events[-_EVENTS_KEPT:], Event(kind, self.shadow.tick(), words, blocks)]


class Round:
    """The device of one round."""

    def __init__(
        self, directory: Path, command: Command, setting: Setting, memory: Memory, beat: Callable[[str], None]
    ) -> None:
        """`beat` hears where the round is, now and then."""
        self._memory, self._beat = memory, beat
        self._setting = setting
        self._rng = random.Random(memory.rng.getrandbits(64))
        self.host = Host(directory, command, setting, memory.state, self._answered)
        self._open: dict[int, Request] = {}
        self._width = 8
        self._progress_s = time.monotonic()
        self._hit: list[Request] = []
        """Requests that ran when the backend or an epoch ended."""
        self._wrong: list[Wrong] = []
        self._looks_around = False
        self._failed: Broken | None = None
        self._changes_answered = 0

    @property
    def name(self) -> str:
        return f"transport {self._setting.transport}, placement {self._setting.placement}"

    # The round

    async def run(self, until_s: float, due: tuple[str, ...]) -> None:
        """Check until then, with the ends that are `due` at least: `kill`, `fence` or `stop`.

        Raises `Broken`, `NotStarted`, `OtherPlacement`.
        """
        try:
            await self.host.start_backend(again=self._memory.state.attach is not None)
            await self._begin()
            while due or time.monotonic() < until_s:
                await self._burst(_BURST_REQUESTS)
                await self._read_all()
                await self._end_somehow(due[0] if due else "")
                await self._overwrite_hit()
                await self._read_all()
                due = due[1:]
                self._beat(self.name)
            await self._burst(_BURST_REQUESTS // 2)
            await self._read_all()
            await self._detach()
        except Broken:
            if not self._wrong:
                raise
            await self._look_around()
            raise broken_by(self._wrong, self._memory.events, self._shadow.block_bytes) from None
        finally:
            self.host.close()

    async def _detach(self) -> None:
        """The device fails, or is deleted: then a store may end with it."""
        keeps = self._rng.random() < _KEEP_SHARE
        await self.host.detach(keep=keeps)
        self._memory.note("stop", "detach")
        identity = self._attach.identity
        ends = not keeps and identity is not None and identity.ends_with_device
        if ends or not self._attach.survives_death:
            self._memory.state.forget()
            self._shadow.forget()

    async def _look_around(self) -> None:
        """Read the other blocks as well: one wrong block alone does not tell what happened to it."""
        with suppress(Broken, TimeoutError):
            async with asyncio.timeout(_LOOK_AROUND_S):
                self._looks_around, self._failed = True, None
                await self._read_all()

    async def _begin(self) -> None:
        """Learn what the disk holds; write and read its first and last blocks."""
        memory, session, disk = self._memory, self.host.session, self.host.disk
        assert session is not None and disk is not None
        self._attach = session.attach
        offer = Offer.of(session.attach, disk.size_bytes, self._setting.max_io_bytes)
        if memory.shadow is None:
            memory.shadow = Shadow(offer.block_bytes, memory.nonce)
        self._shadow = memory.shadow
        self._shadow.is_volatile = offer.volatile_cache
        self._requests = Requests(self._rng, offer)
        await self._learn()

    async def _learn(self) -> None:
        offer = self._requests.offer
        await self._try_last_block()
        for start, size in self._requests.zones:
            for at in range(start, start + size, offer.max_io_bytes):
                await self._alone(Request(Op.READ, at, min(offer.max_io_bytes, start + size - at)))

    async def _try_last_block(self) -> None:
        """Raises `Broken` with `size` if the first block can be read and written, and the last cannot."""
        offer = self._requests.offer
        await self._try_block(0)
        try:
            await self._try_block(offer.size_bytes - offer.block_bytes)
        except Broken as broken:
            self._wrong = []
            if broken.promise in ("errors", "whole", "last-write"):
                raise Broken("size", f"it told {offer.size_bytes} bytes, but {broken.what}") from broken
            raise

    async def _try_block(self, offset: int) -> None:
        offer = self._requests.offer
        read = Request(Op.READ, offset, offer.block_bytes)
        await self._alone(read)
        if not offer.read_only:
            await self._alone(self._requests.again(read))
            await self._alone(Request(Op.READ, offset, offer.block_bytes))

    async def _alone(self, request: Request) -> None:
        self._submit(request)
        await self._until_answered()

    # Requests

    def _submit(self, request: Request) -> None:
        memory, shadow, block = self._memory, self._shadow, self._requests.offer.block_bytes
        first, count = request.offset // block, request.length // block
        if request.op == Op.READ:
            request.reading = shadow.begin_read(first, count)
        elif request.op == Op.FLUSH:
            request.start = shadow.tick()
        else:
            memory.number += 1
            kinds = {Op.WRITE: "data", Op.WRITE_ZEROES: "zeros", Op.DISCARD: "anything"}
            change = Change(memory.number, kinds[request.op], first, count, bool(request.flags & 1))  # type: ignore[arg-type]
            request.change = change
            if request.op == Op.WRITE:
                request.data = shadow.data(change)
            shadow.begin(change)
        request.sent_s = time.monotonic()
        request.queue = self._rng.randrange(self._setting.queues)
        self._open[id(request)] = request
        self.host.submit(request)

    def _answered(self, request: Request) -> None:
        """The backend's answer has reached the kernel."""
        self._open.pop(id(request), None)
        self._memory.counts[request.op.name] += 1
        self._progress_s = time.monotonic()
        try:
            self._judge(request)
        except Broken as broken:
            # Called from the queue's turn, which is to be left whole.
            if not self._looks_around:
                self._failed = self._failed or broken

    def _judge(self, request: Request) -> None:
        shadow = self._shadow
        failed = bool(request.error)
        if request.change is not None:
            shadow.end(request.change, failed)
            self._changes_answered += 1
        if failed and request.reading is not None:
            shadow.give_up_read(request.reading)
        if failed:
            if not self._memory.allows_errors:
                name = errno.errorcode.get(request.error, str(request.error))
                raise Broken("errors", f"{request} failed with {name}")
            return
        if request.is_short:
            raise Broken("whole", f"{request} was answered with fewer bytes than it has")
        if request.op == Op.FLUSH:
            shadow.flushed(request.start)
        if request.reading is not None:
            wrong = shadow.end_read(request.reading, request.received)
            if wrong and self._attach.stores_data:
                self._wrong += wrong
                raise broken_by(self._wrong, self._memory.events, shadow.block_bytes)

    async def _turn(self) -> None:
        await self.host.turn()
        if self._failed is not None:
            raise self._failed
        self._judge_time()

    def _judge_time(self) -> None:
        if not self._open or self.host.session is None:
            return
        now_s, deadline_s = time.monotonic(), self._setting.deadline_s
        oldest = min(self._open.values(), key=lambda each: each.sent_s)
        waited_s = now_s - oldest.sent_s
        is_stuck = waited_s > deadline_s and now_s - self._progress_s > deadline_s
        if is_stuck or waited_s > _STARVED_DEADLINES * deadline_s:
            raise Broken("answers", f"{oldest} was not answered within {waited_s:.1f} s")

    async def _until_answered(self) -> None:
        self._progress_s = time.monotonic()
        while self._open:
            await self._turn()

    async def _burst(self, count: int, until: Callable[[], bool] | None = None) -> bool:
        """Send requests, several at a time, and wait for their answers; True as soon as `until` says so."""
        begun_s = time.monotonic()
        self._progress_s = begun_s
        self._width = self._rng.choice((1, 2, 4, 8, 16, 32))
        sent = 0
        slow = False
        while sent < count and not slow:
            while len(self._open) < self._fitting(sent - len(self._open), begun_s) and sent < count:
                self._submit(self._requests.next())
                sent += 1
            await self._turn()
            if until is not None and until():
                return True
            slow = time.monotonic() - begun_s > _BURST_S
        while self._open:
            await self._turn()
            if until is not None and until():
                return True
        return False

    def _fitting(self, answered: int, begun_s: float) -> int:
        """How many requests may run at once, so that a slow store answers all of them in time."""
        spent_s = time.monotonic() - begun_s
        if answered <= 0:
            return self._width if spent_s < 0.1 else min(self._width, 4)
        return max(
            1, min(self._width, int(self._setting.deadline_s / _SERIAL_SHARE / max(spent_s / answered, 1e-6)))
        )

    async def _read_all(self) -> None:
        """Read every block that the check has touched."""
        offer = self._requests.offer
        for first, count in self._shadow.touched():
            for at in range(first, first + count, most := offer.max_io_bytes // offer.block_bytes):
                blocks = min(most, first + count - at)
                self._submit(Request(Op.READ, at * offer.block_bytes, blocks * offer.block_bytes))
                while len(self._open) >= 4:
                    await self._turn()
        await self._until_answered()

    async def _overwrite_hit(self) -> None:
        """Write where requests ran when the backend ended: a late execution of these would undo that."""
        hit, self._hit = self._hit[:16], []
        for request in hit:
            if request.length and not self._requests.offer.read_only:
                self._submit(self._requests.again(request))
        await self._until_answered()

    # Ends

    async def _end_somehow(self, due: str) -> None:
        """End the backend or an epoch in the next way of all, or of those that are due."""
        end = self._memory.next_end(self._setting.placement == "backend", due)
        if end == "fence":
            await self._fence(kill=False)
        elif end == "fencing":
            await self._fence(kill=True)
        elif end == "stop":
            await self._stop()
        else:
            await self._kill(end)

    async def _kill(self, point: str) -> None:
        for queue in self.host.queues:
            queue.holds_copies = point == "copying"
        if point == "idle":
            await self._until_answered()
        else:
            await self._until(point)
            if self._rng.random() < 0.5:
                await asyncio.sleep(self._rng.random() * 0.002)
            elif point != "placing":
                await self._send_some()
        self._hit = [*self._open.values()]
        await self.host.kill()
        for queue in self.host.queues:
            queue.holds_copies = False
        self._memory.note("kill", f"kill -9 ({point})", self._hit)
        await self._restart()

    async def _until(self, point: str) -> None:
        """Send requests until this has come."""
        if not await self._burst(_BURST_REQUESTS, self._condition(point)) and point == "slow":
            await self._burst(_BURST_REQUESTS, self._condition("executing"))

    def _condition(self, point: str) -> Callable[[], bool]:
        """What to wait for before the backend's end."""
        queues, answered = self.host.queues, self._changes_answered
        skip = self._rng.randint(1, 20)
        conditions: dict[str, Callable[[], bool]] = {
            "answered": lambda: self._changes_answered >= answered + skip,
            "executing": lambda: any(each.is_executing(changes=True) for each in queues),
            "placing": lambda: any(each.is_any(TagState.PLACING) for each in queues),
            "copying": lambda: any(each.is_any(TagState.COPYING) for each in queues),
            "without-data": lambda: any(each.op not in (Op.READ, Op.WRITE) for each in self._open.values()),
            "slow": self._is_slow,
            "at-once": lambda: True,
        }
        found = conditions[point]
        if point in ("answered", "slow", "at-once"):
            return found
        passed = 0

        def after_some() -> bool:
            nonlocal passed
            passed += found()
            return passed >= skip

        return after_some

    def _is_slow(self) -> bool:
        """Whether a change takes long, and nothing else moves."""
        now_s = time.monotonic()
        changes = [each.sent_s for each in self._open.values() if each.change is not None]
        return bool(changes) and now_s - min(changes) > _SLOW_S and now_s - self._progress_s > _SLOW_S / 2

    async def _send_some(self) -> None:
        """Send requests that even a fast backend has not answered when it is killed: its successor executes them."""
        for _ in range(self._rng.randint(1, _LAST_REQUESTS_MAX)):
            self._submit(self._requests.next())
        await self._turn()

    async def _stop(self) -> None:
        await self._until("executing")
        self._hit = [*self._open.values()]
        await self.host.stop()
        self._memory.note("stop", "SIGTERM")
        await self._restart()

    async def _restart(self) -> None:
        memory = self._memory
        if not self._attach.survives_death:
            await self._begin_anew()
            return
        if memory.power_loss:
            await self._lose_power(memory.power_loss)
        await self.host.start_backend(again=True)
        self._progress_s = time.monotonic()
        for request in self._open.values():
            request.sent_s = self._progress_s
        await self._until_answered()

    async def _begin_anew(self) -> None:
        """The device has failed with its backend, as the backend declares: the next one is another disk."""
        memory = self._memory
        self._open.clear()
        self._hit = []
        memory.state.forget()
        self._shadow.forget()
        self.host.begin_anew()
        await self.host.start_backend(again=True)
        await self._learn()

    async def _lose_power(self, command: str) -> None:
        process = await asyncio.create_subprocess_shell(command)
        if await process.wait():
            raise RuntimeError(f"the command for a power failure failed: {command}")
        self._shadow.lost_power()
        self._memory.note("power", "power failure")

    async def _fence(self, kill: bool) -> None:
        await self._until(self._rng.choice(("slow", "slow", "executing", "copying", "at-once")))
        self._hit = [*self._open.values()]
        self.host.worker_death()
        self._memory.note("fence", "death of the workers", self._hit)
        if kill:
            await self.host.kill()
            self._memory.note("kill", "kill -9 (fencing)", self._hit)
            await self._restart()
            return
        await self.host.fence()
        await self._watch_pool()
        self.host.resume()
        await self._until_answered()

    async def _watch_pool(self) -> None:
        """After FENCED the backend uses no buffer of the old epoch: one that changes now is used."""
        mark = struct.pack("<QQ", self._memory.nonce << 32 | FENCE_MARK, self.host.epoch)
        self.host.mark_pool(mark)
        until_s = time.monotonic() + _FENCE_WATCH_S
        while time.monotonic() < until_s:
            await self.host.turn()
        at = self.host.pool_differs(mark)
        if at is not None:
            raise Broken(
                "fence", f"after FENCED a request of the old epoch changed its buffer, pool offset {at}"
            )
