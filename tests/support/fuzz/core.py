"""Sends a queue core many thousands of wrong descriptors, over a fake driver that enforces the kernel's rules.

Most descriptors are a valid answer to an outstanding request with one or a few fields changed; the others are old,
repeated or random.  The module does not decide which answers are valid: it checks that the core counted each descriptor
as a violation, or as stale, or moved the one tag that it names, and that every request is answered once in the end.
"""

import random
import struct

from support.fakes.driver import SECTOR_BYTES, FakeDriver, Holder, Request
from support.fakes.queue_rig import DEVICE, Area, Plan, Rig, new_area
from ublkpool.bufpool.wire import (
    DESCRIPTORS_PER_FRAME_MAX,
    SEGMENT_POOL,
    Descriptor,
    Flag,
    Kind,
    Op,
)
from ublkpool.ublk import _native
from ublkpool.ublk.queue import Attention, Command, LinkState
from ublkpool.workers.tag_state import State

_ffi, _lib = _native.ffi, _native.lib
FIELDS = (
    # Offset in the descriptor, and bytes.
    (0, 1),
    (1, 1),
    (2, 2),
    (4, 4),
    (8, 2),
    (10, 2),
    (12, 4),
    (16, 8),
    (24, 8),
    (32, 8),
    (40, 4),
    (44, 4),
    (48, 8),
    (56, 8),
)
OURS = struct.pack("<IH", DEVICE, 0)
COUNTS = (1, 1, 1, 2, 3, 8)
CORNERS = (0, 1, -1, 1 << 63, (1 << 63) - 1, 1 << 31, (1 << 31) - 1, 4096)
STEPS = (-1, 1, -512, 512, 4096, 1 << 32)
TURNS_TO_ANSWER_MAX = 200
HELLO = Descriptor(Kind.HELLO, device=DEVICE, epoch=3).pack()


class AnyPlace(FakeDriver):
    """A driver that accepts any address in the backend's segment."""

    def _accept(self, command: Command, length: int) -> None:
        area, offset = self.side.rig.locate(self.side.number, command.address, length)
        if area.number == 1:
            self.side.rig.ledger.use(self.side.rig.slot_at(offset, length), (self.side.number, command.tag))
        self.addresses[command.tag] = command.address


class CoreFuzz:
    """One queue, its driver and a backend that sends wrong descriptors."""

    def __init__(self, rng: random.Random, plan: Plan) -> None:
        self.rng, self.plan = rng, plan
        self.rig = Rig(plan)
        self.side = self.rig.sides[0]
        self.queue = self.side.queue
        self.driver = AnyPlace(self.side)
        # All backends share one memory: the check is the addresses that the core gives to the kernel.
        self.segment: Area = new_area(2, 2 * plan.depth * plan.max_io_bytes)
        self.rig.areas[2] = self.segment
        self.number = 1
        self.truths: dict[int, bytes] = {}
        """By tag: the valid answer to the core's last descriptor about it."""
        self.old = [bytes(64)] * 16
        self._draw = rng.random
        self._tags = range(plan.depth)
        self._base, self._size = _ffi.new("uint8_t **"), _ffi.new("uint64_t *")
        self.queue.start()
        self.driver.consume()
        self._connect()

    def play(self, inputs: int) -> int:
        """Have the core judge at least `inputs` descriptors, then answer every request.  Returns how many it judged."""
        while int(self.side.statistics.descriptors_in) < inputs:
            self._busy()
            for _ in range(self.rng.randint(4, 24)):
                self._fire()
            self.side.check()
        judged = int(self.side.statistics.descriptors_in)
        self._finish()
        return judged

    def _connect(self) -> None:
        """Connect the next backend, which uses the memory of the one before, up to its WELCOME."""
        while _lib.uq_segment_idle(self.queue.raw, self._base, self._size):
            pass
        own = self.plan.place_in_backend or self.plan.reads_own
        number = self.number + 1 if own else 0
        while not self.queue.expect(number, self.segment.base, self.segment.size_bytes, self.plan.reads_own):
            self._settle()
            self.side.idle_segments()
        self.number += 1
        self.queue.input(HELLO)
        self._hear()

    def _hear(self) -> None:
        """Read the core's descriptors, and keep the valid answer to the last one of each tag."""
        output = self.queue.output()
        self.queue.sent(len(output) // 64)
        for at in range(0, len(output), 64):
            kind, tag = output[at], output[at + 10]
            if kind == Kind.REQUEST and output[at + 44] == SEGMENT_POOL:
                offset, length = (int.from_bytes(output[at + n : at + n + 8], "little") for n in (48, 32))
                self.rig.ledger.use(self.rig.slot_at(offset, length), (0, tag))
            if kind in (Kind.REQUEST, Kind.PLACE, Kind.DATA):
                self.truths[tag] = self._truth(output[at : at + 64])

    def _truth(self, asked: bytes) -> bytes:
        """The valid answer to a descriptor; its region is the tag's own part of the segment."""
        kind, op = asked[0], asked[1]
        region = struct.pack("<IQ", self.number, asked[10] * self.plan.max_io_bytes)
        if kind == Kind.PLACE:
            return bytes((Kind.PLACED,)) + asked[1:44] + region + bytes(8)
        names_region = op == Op.READ and asked[44] == 0
        length = asked[32:36] if op in (Op.READ, Op.WRITE) else bytes(4)
        flags = bytes((Flag.REGION if names_region else 0, 0))
        return (
            bytes((Kind.DONE, op))
            + flags
            + asked[4:40]
            + length
            + (region if names_region else bytes(12))
            + bytes(8)
        )

    def _settle(self) -> None:
        """Let the kernel and the broker do their outstanding work."""
        self.rig.settle(0)
        self.driver.consume()
        for tag in self.driver.tags(Holder.COPYING):
            self.driver.copy(tag)
        self.driver.consume()
        self.driver.finished.clear()

    def _busy(self) -> None:
        """Deliver requests on most of the tags."""
        self._settle()
        for tag in self.driver.tags(Holder.DRIVER):
            if self.rng.random() < 0.8:
                self.driver.deliver(tag, self._request())
        if self.rng.random() < 0.5:
            self._settle()
        self._hear()

    def _request(self) -> Request:
        if self.driver.again:
            return self.driver.again.popleft()
        op = self.rng.choice((Op.READ, Op.WRITE, Op.WRITE, Op.FLUSH, Op.DISCARD))
        block = self.plan.block_bytes // SECTOR_BYTES
        sectors = block * self.rng.randint(1, self.plan.max_io_bytes // self.plan.block_bytes)
        return Request(op, 8, sectors, bytes(sectors * SECTOR_BYTES) if op == Op.WRITE else b"")

    def _fire(self) -> None:
        """Send one frame and check its effect."""
        draw = self._draw
        words = [self._word() for _ in range(COUNTS[int(draw() * len(COUNTS))])]
        frame = b"".join(words)
        if draw() < 0.01:
            torn = (b"", frame[:-1], frame + b"x", frame * (DESCRIPTORS_PER_FRAME_MAX + 1))
            frame = torn[int(draw() * len(torn))]
        self.old[int(draw() * len(self.old))] = words[0]
        counters, raw = self.side.statistics, self.queue.raw
        judged, stale, cut = counters.descriptors_in, counters.stale_answers, counters.violations
        posts = counters.posts
        before = [_lib.uq_tag_state(raw, tag) for tag in self._tags]
        self.queue.input(frame)
        after = [_lib.uq_tag_state(raw, tag) for tag in self._tags]
        judged, stale = counters.descriptors_in - judged, counters.stale_answers - stale
        cut, posts = counters.violations - cut, counters.posts - posts
        assert cut == (_lib.uq_link_state(raw) == LinkState.CUT) and stale <= judged
        # An answer for another queue or a tag that does not exist is a violation, never stale.
        for each in words[: max(0, judged - cut)]:
            assert each[4:10] == OURS and each[10] < self.plan.depth and not each[11]
        assert not posts or self.plan.place_in_backend
        if before != after or judged != stale + cut + posts:
            self._judge(before, after, words[:judged], judged - stale - posts, cut)
        if cut:
            self.queue.clear(Attention.CUT)
            self.queue.lost()
            self._connect()

    def _judge(
        self, before: list[int], after: list[int], words: list[bytes], not_stale: int, cut: int
    ) -> None:
        """Each descriptor that was no violation, no POST and not stale has moved the tag that it names, no other."""
        # A buffer that is given back may move another request, which waited for one.
        moved = {tag for tag in self._tags if before[tag] != after[tag] and before[tag] != State.WAIT_BUFFER}
        said = {each[4:24] for each in words}
        assert all(self.truths[tag][4:24] in said for tag in moved), "moved by an answer to something else"
        # A violation may have ended its own request; the last of too many stale answers counts as a violation, too.
        assert not_stale - cut <= len(moved) <= not_stale

    def _word(self) -> bytes:
        draw = self._draw
        shape = draw()
        if shape < 0.03 or not self.truths:
            return self.rng.randbytes(64)
        if shape < 0.08:
            return self.old[int(draw() * len(self.old))]
        truths = list(self.truths.values())
        word = bytearray(self._post() if draw() < 0.15 else truths[int(draw() * len(truths))])
        if word[0] == Kind.PLACED and draw() < 0.2:
            word[0] = Kind.REJECT
        if shape < 0.12:
            return bytes(word)
        for _ in range(1 if shape < 0.9 else 3):
            at, size = FIELDS[int(draw() * len(FIELDS))]
            word[at : at + size] = self._value(word[at : at + size], size)
        return bytes(word)

    def _post(self) -> bytes:
        """A POST that is often valid: half of the cells belong to no tag's PLACED."""
        size = self.rng.choice(self.plan.geometry.classes).buffer_bytes
        cell = int(self._draw() * 2 * self.plan.depth)
        return Descriptor(Kind.POST, device=DEVICE, epoch=self.plan.epoch, length=size, segment=self.number,
                          buffer=cell * self.plan.max_io_bytes).pack()  # fmt: skip

    def _value(self, old: bytearray, size: int) -> bytes:
        choice, most = int(self._draw() * 8), 1 << 8 * size
        if choice < 3:
            return self.rng.randbytes(size)
        if choice < 5:
            return (CORNERS[int(self._draw() * len(CORNERS))] % most).to_bytes(size, "little")
        near = int.from_bytes(old, "little") + STEPS[int(self._draw() * len(STEPS))]
        return (near % most).to_bytes(size, "little")

    def _finish(self) -> None:
        """Connect a last backend that answers every request correctly."""
        self.queue.lost()
        self._connect()
        for _ in range(TURNS_TO_ANSWER_MAX):
            self._settle()
            for tag in self.driver.tags(Holder.DRIVER):
                if self.driver.again:
                    self.driver.deliver(tag, self.driver.again.popleft())
            self._hear()
            self._answer_all()
            if not self.driver.outstanding:
                break
        assert not self.driver.outstanding, "a request is never answered"
        assert self.queue.link is LinkState.UP
        self.side.check()
        served = sum(self.side.statistics.requests)
        assert self.side.statistics.commits == served and self.queue.in_flight == 0

    def _answer_all(self) -> None:
        for tag, truth in self.truths.items():
            if self.queue.tag_state(tag) in (State.SERVING, State.PLACING):
                self.queue.input(truth)
        self.truths.clear()
