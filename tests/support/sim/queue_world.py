"""A device's queue cores, drivers, broker and backends in one random order of events that a seed decides.

Each step lets one party do one thing, so that every order that real processes could produce can come up.  `World.run`
ends with everything answered, every tag gone and every buffer back.
"""

import random
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

from support.fakes.backend import FakeBackend, Key, Store
from support.fakes.driver import SECTOR_BYTES, FakeDriver, Holder, Request
from support.fakes.liar import CUT, STALE, Lie, Scene, lies_about, posts_that_lie
from support.fakes.queue_rig import SEGMENT_SLICE, Plan, Rig, Side
from support.vm.shadow_disk import ShadowDisk
from ublkpool.bufpool.wire import DESCRIPTOR_BYTES, Descriptor, Kind, Op
from ublkpool.ublk.queue import Attention, LinkState
from ublkpool.ublk.statistics import read_statistics
from ublkpool.workers.tag_state import State

Temper = Literal["honest", "dying", "lying"]
ENDS = ("drained", "stopped", "given up")
FIRST_SECTORS = (0, (7 << 60) >> 9)
STEPS_TO_ANSWER_MAX = 20_000
KILL_RATE = 0.01
LIE_RATE = 0.1
ERROR_RATE = 0.01
TRACE_LINES = 24


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What a seed plays."""

    plan: Plan
    temper: Temper
    end: str
    steps: int
    iops: int = 0
    bytes_per_s: int = 0
    burst_ns: int = 0
    """The device's limits, see `Rig.limit`."""
    reuses_answered: bool = False
    """Backends that break the protocol in a way that no worker can see; see `FakeBackend`."""


class World:
    """One run; every choice comes from `rng`."""

    def __init__(self, scenario: Scenario, rng: random.Random) -> None:
        self.scenario, self.rng = scenario, rng
        plan = scenario.plan
        self.rig = Rig(plan)
        self.rig.limit(scenario.iops, scenario.bytes_per_s, scenario.burst_ns)
        self.limit_ns = 0
        self.passed = [0, 0]
        """I/Os and bytes that were answered, other than FLUSH."""
        self.drivers = [FakeDriver(side) for side in self.rig.sides]
        block = plan.block_bytes // 512
        first, sectors = rng.choice(FIRST_SECTORS), 512
        self.disk = ShadowDisk(rng, first, sectors, plan.max_io_bytes // 512, block)
        self.store = Store(first * 512, sectors * 512)
        self.backend: FakeBackend | None = None
        self.coming: list[deque[bytes]] = [deque() for _ in self.drivers]
        """Frames that the backend has sent and the worker has not read."""
        self.late: list[list[bytes]] = [[] for _ in self.drivers]
        self.segment = 1
        self.now_ms = 0
        self.waited_ns = [0 for _ in self.drivers]
        """Summed over the requests of each queue: how long the core has not answered them."""
        self.ages: dict[Request, int] = {}
        self.trace: deque[str] = deque(maxlen=TRACE_LINES)
        self.lies = 0
        self.absent: set[int] = set()
        """Queues that fail requests which would wait for a backend."""
        self.absences = 0
        self.ending = False
        self._actions: tuple[tuple[Callable[[int], None], int], ...] = (
            (self._submit, 6),
            (self._copy, 4),
            (self._consume, 5),
            (self._send, 5),
            (self._place, 3),
            (self._execute, 5),
            (self._answer, 5),
            (self._hear, 5),
            (self._lease, 3),
            (self._wishes, 3),
            (self._mail, 3),
            (self._link, 2),
            (self._tick, 1),
            *([(self._post, 4)] if plan.posts else []),
            *([(self._pass_limited, 4)] if scenario.iops or scenario.bytes_per_s else []),
        )

    def run(self) -> None:
        """Play the scenario to its end.  Raises `AssertionError` for each broken promise."""
        for driver in self.drivers:
            driver.side.queue.start()
            # A worker reads limits and clock before its first request (pass_limited in queue_ring.c).
            driver.side.queue.limit_tick(self.limit_ns)
        work, weights = zip(*self._actions, strict=True)
        queues = len(self.drivers)
        for step, action in enumerate(self.rng.choices(work, weights, k=self.scenario.steps)):
            action(self.rng.randrange(queues))
            self._harvest(step)
        self._finish()

    def note(self, text: str) -> None:
        self.trace.append(text)

    def _submit(self, queue: int) -> None:
        driver = self.drivers[queue]
        idle = driver.tags(Holder.DRIVER)
        again = bool(driver.again) and (self.ending or self.rng.random() < 0.7)
        if not idle or (self.ending and not again):
            return
        request = driver.again.popleft() if again else self.disk.request()
        if request is None:
            return
        # The core cannot know that a tag was sent back before its next request; one comes soon.
        tag = self.rng.choice(sorted(driver.sent_back) if again and driver.sent_back else idle)
        if self.scenario.plan.slice_bytes and not again:
            self._take_client_buffer(queue, tag, request)
        self.note(f"queue {queue} tag {tag}: {request}")
        self.ages.setdefault(request, 0)
        short = None
        if request.left and self.rng.random() < 0.1:
            short = self.disk.whole_blocks(self.rng.randint(1, request.left))
        driver.deliver(tag, request, short)

    def _take_client_buffer(self, queue: int, tag: int, request: Request) -> None:
        """Half of the clients have their data where the backend can see it."""
        plan = self.scenario.plan
        if request.op not in (Op.READ, Op.WRITE) or self.rng.random() < 0.5:
            return
        room = (plan.max_io_bytes - request.sectors * 512) // plan.block_bytes
        at = (queue * plan.depth + tag) * plan.max_io_bytes + self.rng.randint(0, room) * plan.block_bytes
        request.client_buffer = at
        self.rig.areas[SEGMENT_SLICE].view[at : at + len(request.data)] = request.data

    def _copy(self, queue: int) -> None:
        driver = self.drivers[queue]
        copying = driver.tags(Holder.COPYING)
        if not copying:
            return
        tag = self.rng.choice(copying)
        chance = self.rng.random()
        sectors = None
        if driver.request_at(tag).is_in_place:
            pass
        elif chance < 0.05:
            sectors = 0
        elif chance < 0.2:
            request = driver.request_at(tag)
            sectors = self.disk.whole_blocks(self.rng.randint(1, request.left))
            # Linux 7.3 takes the commit of a short copy for the whole request.
            request.may_fail |= sectors < request.left
        self.note(f"queue {queue} tag {tag}: copies {'all' if sectors is None else sectors}")
        driver.copy(tag, sectors)

    def _consume(self, queue: int) -> None:
        self.drivers[queue].consume(self.rng.choice((None, 1, 2)))

    def _send(self, queue: int) -> None:
        """Descriptors reach the backend, all or the first few."""
        core = self.rig.sides[queue].queue
        output = core.output()
        if self.backend is None or not output:
            return
        count = self.rng.randint(1, len(output) // DESCRIPTOR_BYTES)
        core.sent(count)
        self.backend.receive(queue, output[: count * DESCRIPTOR_BYTES])

    def _key(self, queue: int, found: dict[Key, Descriptor]) -> Key | None:
        keys = [key for key in found if key[0] == queue]
        return self.rng.choice(keys) if keys else None

    def _place(self, queue: int) -> None:
        backend = self.backend
        key = self._key(queue, backend.placing) if backend else None
        if backend is None or key is None or self._lies(queue, backend, key, backend.placing[key]):
            return
        rejects = self._is_heard(queue) and self.rng.random() < 0.02
        self._say(queue, backend.reject(key, -28) if rejects else backend.place(key))

    def _post(self, queue: int) -> None:
        backend = self.backend
        if backend is None or queue not in backend.welcomed or self._lies_of_a_post(queue, backend):
            return
        self._say(queue, backend.post(queue))

    def _lies_of_a_post(self, queue: int, backend: FakeBackend) -> bool:
        """Perhaps post a region that must not be posted."""
        core, plan = self.rig.sides[queue].queue, self.scenario.plan
        if self.scenario.temper != "lying" or not self._is_heard(queue) or self.rng.random() > LIE_RATE / 4:
            return False
        self.lies += 1
        size = self.rng.choice(plan.geometry.classes).buffer_bytes
        lies = posts_that_lie(backend.post_at(queue, 0, size), backend.segment.size_bytes, plan.block_bytes)
        lent = [at for key, at in backend.named.items() if key in backend.given and key[0] == queue]
        if lent:
            lies["lent"] = backend.post_at(queue, self.rng.choice(lent), size)
        name = self.rng.choice(list(lies))
        self.note(f"queue {queue}: backend posts, {name}")
        core.input(lies[name].pack())
        assert core.link is LinkState.CUT, f"{name!r} did not cut the link"
        return True

    def _execute(self, queue: int) -> None:
        backend = self.backend
        if backend is not None and self.rig.sides[queue].queue.link is LinkState.CUT:
            backend.scribble(queue)
        key = self._key(queue, backend.given) if backend else None
        if backend is not None and key is not None:
            backend.execute(key, self.rng.randint(1, 4) if self.rng.random() < 0.2 else None)

    def _answer(self, queue: int) -> None:
        backend = self.backend
        if backend is None:
            return
        keys = [key for key in backend.executed if key[0] == queue]
        self.rng.shuffle(keys)
        frame = b""
        chosen = keys[: self.rng.randint(1, 3)]
        frame = b"".join([backend.answer(key) for key in chosen[1:]])
        if frame:
            self._say(queue, frame)
        for key in chosen[:1]:
            request = backend.executed[key].descriptor._replace(kind=Kind.REQUEST)
            if not self._lies(queue, backend, key, request):
                self._say(queue, backend.answer(key))

    def _say(self, queue: int, frame: bytes | None) -> None:
        """The backend sends a frame, whether or not a worker will read it."""
        if frame is not None:
            self.coming[queue].append(frame)

    def _hear(self, queue: int) -> None:
        """A frame reaches the worker; `_kill` sends it once more, much too late."""
        core = self.rig.sides[queue].queue
        if not self.coming[queue]:
            return
        frame, was_heard = self.coming[queue].popleft(), self._is_heard(queue)
        core.input(frame)
        assert self._is_heard(queue) or not was_heard, f"an honest answer cut the link: {core.violation()}"
        self.late[queue].append(frame)

    def _is_heard(self, queue: int) -> bool:
        """Whether the worker still listens; a backend cannot know."""
        return self.rig.sides[queue].queue.link is LinkState.UP

    def _lies(self, queue: int, backend: FakeBackend, key: Key, request: Descriptor) -> bool:
        """Perhaps lie about this request instead of answering it."""
        core = self.rig.sides[queue].queue
        if self.scenario.temper != "lying" or not self._is_heard(queue) or self.rng.random() > LIE_RATE:
            return False
        self.lies += 1
        plan = self.scenario.plan
        given = backend.placing.get(key, request)
        scene = Scene(given, backend.segment.number, backend.segment.size_bytes, plan.block_bytes, plan.depth,
                      self.rng)  # fmt: skip
        choice = self.rng.randrange(5)
        if choice == 0:
            self._lie_stale(queue, scene)
        elif choice == 1 and given.kind != Kind.PLACE and given.op in (Op.READ, Op.WRITE):
            self._blame(key, "result 0")
            core.input(scene.done(0).pack())
            backend.forget(key)
        else:
            self._lie_and_be_cut(queue, key, scene, harmless=choice < 3)
        return True

    def _lie_stale(self, queue: int, scene: Scene) -> None:
        statistics = self.rig.sides[queue].statistics
        before = int(statistics.stale_answers)
        name = self.rng.choice(list(STALE))
        self.note(f"queue {queue} tag {scene.request.tag}: backend lies, {name}")
        self.rig.sides[queue].queue.input(STALE[name](scene))
        assert int(statistics.stale_answers) == before + 1
        assert self.rig.sides[queue].queue.link is LinkState.UP

    def _lie_and_be_cut(self, queue: int, key: Key, scene: Scene, harmless: bool) -> None:
        lies = CUT if harmless else self._lent_regions(queue, scene) or lies_about(scene.request)
        name = self.rng.choice(list(lies))
        if not harmless:
            self._blame(key, name)
        self.note(f"queue {queue} tag {key[1]}: backend lies, {name}")
        core = self.rig.sides[queue].queue
        core.input(lies[name](scene))
        assert core.link is LinkState.CUT, f"{name!r} did not cut the link"

    def _lent_regions(self, queue: int, scene: Scene) -> dict[str, Lie]:
        """Regions that hold another tag's write."""
        assert self.backend is not None
        lent = [
            cell for key, cell in self.backend.named.items() if key[0] == queue and key in self.backend.given
        ]
        if scene.request.kind != Kind.PLACE or not lent or self.rng.random() < 0.5:
            return {}
        return {"lent": lambda scene: scene.region(lent[0] - lent[0] % scene.block_bytes).pack()}

    def _blame(self, key: Key, what: str) -> None:
        self.note(f"queue {key[0]} tag {key[1]}: may fail for {what}")
        self.drivers[key[0]].request_at(key[1]).may_fail = True

    def _lease(self, queue: int) -> None:
        self.rig.ask(queue)

    def _wishes(self, queue: int) -> None:
        self.rig.hear_wishes(queue)

    def _mail(self, queue: int) -> None:
        self.rig.deliver_mail(queue)

    def _tick(self, queue: int) -> None:
        passes_ms = self.rng.randrange(60)
        self.now_ms += passes_ms
        for side in self.rig.sides:
            unanswered = sum(
                side.queue.tag_state(tag) not in (State.KERNEL, State.COMMITTING, State.GONE)
                for tag in range(self.scenario.plan.depth)
            )
            self.waited_ns[side.number] += unanswered * passes_ms * 1_000_000
            side.queue.set_real_time(self.now_ms * 1_000_000)
            side.queue.tick(self.now_ms)
            if side.queue.attention() & Attention.ABSENT:
                side.queue.clear(Attention.ABSENT)
                assert self.backend is None or side.queue.link is LinkState.CUT, (
                    "one that is there is not absent"
                )
                self.note(f"queue {side.number}: no backend for too long")
                self.absent.add(side.number)
                self.absences += 1

    def _pass_limited(self, queue: int) -> None:
        """One worker reads the clock; those of the others are old."""
        self.limit_ns += self.rng.randrange(4_000_000)
        self.rig.sides[queue].queue.limit_tick(self.limit_ns)

    def _meter(self, request: Request) -> None:
        scenario, queues = self.scenario, len(self.drivers)
        is_over = scenario.end == "given up" and self.ending
        if is_over or request.op == Op.FLUSH or (request.result or 0) < 0:
            return
        moved = request.sectors * SECTOR_BYTES if request.op in (Op.READ, Op.WRITE) else 0
        self.passed = [self.passed[0] + 1, self.passed[1] + moved]
        for_s = (self.limit_ns + scenario.burst_ns + queues * 4_000_000) / 1e9
        for passed, rate, largest in zip(
            self.passed, (scenario.iops, scenario.bytes_per_s), (1, scenario.plan.max_io_bytes), strict=True
        ):
            assert not rate or passed <= rate * for_s + (queues + 1) * largest, f"{passed} in {for_s} s"

    def _link(self, queue: int) -> None:
        """The supervisor: end backends that were cut off, and admit the next one."""
        if self.backend is None:
            self._revive()
            return
        was_cut = any(side.queue.link is LinkState.CUT for side in self.rig.sides)
        dies = self.scenario.temper == "dying" and not self.ending and self.rng.random() < 20 * KILL_RATE
        if was_cut or dies:
            self._kill(dies)
        elif self.rig.sides[queue].queue.link is LinkState.EXPECTED:
            self.rig.sides[queue].queue.input(self.backend.hello(queue))

    def _kill(self, at_once: bool) -> None:
        self.note("the backend dies")
        for side in self.rig.sides:
            if not at_once or self.rng.random() < 0.5:
                violations = int(side.statistics.violations)
                side.queue.cut()
                assert side.statistics.violations == violations, "the owner's cut is nobody's violation"
        self.backend = None
        for side in self.rig.sides:
            coming, late = self.coming[side.number], self.late[side.number]
            for _ in range(self.rng.randint(0, len(coming))):
                self._hear(side.number)
            side.queue.lost()
            for frame in (*late[-3:], *coming):
                side.queue.input(frame)
            assert side.queue.link is LinkState.NONE, "late answers of the dead do nothing"
            late.clear()
            coming.clear()

    def _revive(self) -> None:
        self._drop_idle_segments()
        self.segment += 1
        made = FakeBackend(self.rig, self.drivers, self.store, self.segment, self.rng)
        made.error_rate = ERROR_RATE
        made.reuses_answered = self.scenario.reuses_answered
        own = self.scenario.plan.place_in_backend or made.reads_own
        number, size = (self.segment, made.segment.size_bytes) if own else (0, 0)
        sides = self.rig.sides
        if not all(side.queue.expect(number, made.segment.base, size, made.reads_own) for side in sides):
            for side in sides:
                side.queue.lost()
            return
        self.note(f"backend {self.segment} is expected")
        self.absent.clear()
        self.backend = made

    def _drop_idle_segments(self) -> None:
        for side in self.rig.sides:
            side.idle_segments()

    def _harvest(self, step: int) -> None:
        for driver in self.drivers:
            if driver.side.number in self.absent:
                for waiting in filter(None, driver.requests):
                    waiting.may_fail = True
            for request in driver.finished:
                self.ages.pop(request, None)
                self._judge(request)
            driver.finished.clear()
        if step % 16 == 0:
            self.check()

    def _judge(self, request: Request) -> None:
        assert request.result is not None
        self.disk.end(request)
        self._meter(request)
        if request.result < 0 and request.op in (Op.READ, Op.WRITE, Op.FLUSH, Op.DISCARD, Op.WRITE_ZEROES):
            assert request.may_fail or self.scenario.plan.fail_on_timeout or self.ending, f"{request} failed"
        elif request.op not in list(Op):
            assert request.result == -95 or self.ending

    def check(self) -> None:
        """What holds at every moment."""
        for side in self.rig.sides:
            side.check()
            driver = self.drivers[side.number]
            known = sum(each is not None for each in driver.requests) + len(driver.sent_back)
            assert side.queue.in_flight == known, f"{side.queue.in_flight} in flight, not {known}"

    def _finish(self) -> None:
        self.note(f"the end: {self.scenario.end}")
        self.ending = True
        if self.scenario.end == "given up":
            self._give_up()
        if self.scenario.end == "stopped":
            self._stop()
        self._until(
            lambda: not any(driver.outstanding for driver in self.drivers), "a request is never answered"
        )
        self._stop()
        self._until(self._all_gone, "a tag does not go")
        self._check_the_end()

    def _give_up(self) -> None:
        if self.backend is not None and self.rng.random() < 0.7:
            self._kill(at_once=False)
            self._revive = lambda: None  # type: ignore[method-assign]
        for side in self.rig.sides:
            side.queue.give_up()

    def _stop(self) -> None:
        for driver in self.drivers:
            if not driver.stopping:
                driver.stop()

    def _all_gone(self) -> bool:
        return all(set(driver.holders) == {Holder.GONE} for driver in self.drivers)

    def _until(self, done: Callable[[], bool], complaint: str) -> None:
        work = [action for action, _ in self._actions]
        for turn in range(STEPS_TO_ANSWER_MAX // len(work)):
            for action in work:
                for queue in range(len(self.drivers)):
                    action(queue)
                    self._harvest(1)
            if turn % 8 == 0:
                self.check()
            if done():
                return
        stuck = [
            (State(side.queue.tag_state(tag)).name, request)
            for side in self.rig.sides
            for tag, request in enumerate(self.drivers[side.number].requests)
            if request
        ]
        raise AssertionError(f"{complaint}: {stuck}")

    def _check_the_end(self) -> None:
        self.check()
        assert not self.rig.ledger.user_of and not self.ages
        for side in self.rig.sides:
            assert side.queue.attention() & Attention.GONE
            assert all(side.queue.tag_state(tag) == State.GONE for tag in range(self.scenario.plan.depth))
            self._check_durations(side)
            if not self.scenario.plan.need_get_data:
                self.rig.table.reclaim(side.owner)
        self.rig.give_all_back()
        for each in self.rig.table.statistics().classes:
            assert each.free == each.count, f"buffers of {each.buffer_bytes} bytes are lost"

    def _check_durations(self, side: Side) -> None:
        """Durations of requests sum up to the time in which they were unanswered.

        A write that the driver sends again counts as a new request, and a tag that goes away while a write is copied
        takes the write with it.
        """
        side.check_durations()
        kinds = read_statistics(side.block_bytes()).latencies
        counted_ns = sum(kinds[kind].sum_ns for kind in ("read", "write", "other"))
        waited_ns = self.waited_ns[side.number]
        is_whole = not side.statistics.requeues and self.scenario.end == "drained"
        assert counted_ns == waited_ns if is_whole else counted_ns <= waited_ns
        assert kinds["backend"].sum_ns <= counted_ns
