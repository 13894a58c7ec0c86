"""The native memory disk against a model, and against anything that a worker can send."""

import random
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fakes.native_rig import DEVICE_NUMBER, EPOCH, OWN_SEGMENT, SLICE_SEGMENT, NativeRig
from ublkpool.bufpool.engine.native import MemoryStorage
from ublkpool.bufpool.errors import BackendError, WireError
from ublkpool.bufpool.wire import SEGMENT_CLIENTS, SEGMENT_POOL, Descriptor, Flag, Kind, Op

BLOCK = 512
DISK_BLOCKS = 192
DISK_BYTES = DISK_BLOCKS * BLOCK
"""Three words of the engine's block bitmap."""
DEPTH = 6
INVALID = -22


def rig(size_bytes: int = DISK_BYTES, own_bytes: int = DISK_BYTES) -> NativeRig:
    return NativeRig(MemoryStorage(names_reads=True), size_bytes=size_bytes, own_bytes=own_bytes, depth=DEPTH)


@pytest.fixture
def disk() -> Iterator[NativeRig]:
    made = rig()
    yield made
    made.close()


def asked(kind: Kind, op: Op, tag: int, offset: int, length: int, sequence: int = 1) -> Descriptor:
    return Descriptor(kind, op, 0, DEVICE_NUMBER, 0, tag, EPOCH, sequence, offset, length)


class Step(NamedTuple):
    """One descriptor of a worker; numbers in blocks of the disk."""

    what: str
    tag: int
    first: int
    blocks: int


class Wanted(NamedTuple):
    """A region that is lent or waited for."""

    tag: int
    kind: Kind
    first: int
    end: int

    def overlaps(self, other: "Wanted") -> bool:
        return self.first < other.end and other.first < self.end


class Model:
    """The expected lending, in simple lists that are searched each time."""

    def __init__(self) -> None:
        self.lent: list[Wanted] = []
        self.waiting: list[Wanted] = []

    def forget(self, tag: int) -> None:
        self.lent = [each for each in self.lent if each.tag != tag]
        self.waiting = [each for each in self.waiting if each.tag != tag]

    def settle(self) -> list[Wanted]:
        """The requests that get a region now, in order of arrival; none overtakes one that it overlaps."""
        named, still = [], list[Wanted]()
        for each in self.waiting:
            if any(each.overlaps(other) for other in (*self.lent, *still)):
                still.append(each)
            else:
                self.lent.append(each)
                named.append(each)
        self.waiting = still
        return named


class Play:
    """The same steps at the engine and at the model, which must name the same regions."""

    def __init__(self, disk: NativeRig) -> None:
        self.disk, self.model = disk, Model()
        self.sequence = 0
        self.last: dict[int, Descriptor] = {}

    def step(self, step: Step) -> None:
        if step.what in ("place", "read"):
            self._ask(step)
        elif step.what == "release" and step.tag in self.last:
            self.model.forget(step.tag)
            self._said(self.disk.say([self.last[step.tag]._replace(kind=Kind.RELEASE)]))
        elif step.what == "data" and any(
            each.tag == step.tag and each.kind == Kind.PLACE for each in self.model.lent
        ):
            self._data(step)

    def _ask(self, step: Step) -> None:
        first = step.first % DISK_BLOCKS
        count = min(step.blocks, DISK_BLOCKS - first)
        kind, op = (Kind.PLACE, Op.WRITE) if step.what == "place" else (Kind.REQUEST, Op.READ)
        self.sequence += 1
        request = asked(kind, op, step.tag, first * BLOCK, count * BLOCK, self.sequence)
        self.model.forget(step.tag)
        expected = self.model.settle()
        self.last[step.tag] = request
        self.model.waiting.append(Wanted(step.tag, kind, first, first + count))
        self._said(self.disk.say([request]), expected)

    def _data(self, step: Step) -> None:
        """DATA may be shorter than its PLACE; the lent region keeps its size."""
        request = self.last[step.tag]
        length = min(request.length, step.blocks * BLOCK)
        answers = self.disk.say([request._replace(kind=Kind.DATA, length=length)])
        lent = next(each for each in self.model.lent if each.tag == step.tag)
        self.model.lent[self.model.lent.index(lent)] = lent._replace(kind=Kind.DONE)
        assert [(each.kind, each.result) for each in answers] == [(Kind.DONE, length)]

    def _said(self, answers: list[Descriptor], before: list[Wanted] | None = None) -> None:
        expected = [*(before or []), *self.model.settle()]
        assert [(each.tag, each.segment, each.buffer) for each in answers] == [
            (each.tag, OWN_SEGMENT, each.first * BLOCK) for each in expected
        ]
        for each, wanted in zip(answers, expected, strict=True):
            read = wanted.kind == Kind.REQUEST
            assert (each.kind, each.flags) == ((Kind.DONE, Flag.REGION) if read else (Kind.PLACED, 0))
            assert each.result == (wanted.end - wanted.first) * BLOCK * read

    def end(self) -> None:
        counted = self.disk.engine.statistics()
        assert (counted.lent, counted.waiting) == (len(self.model.lent), len(self.model.waiting))


STEPS = st.builds(
    Step,
    st.sampled_from(("place", "place", "read", "data", "release", "release")),
    st.integers(0, DEPTH - 1),
    st.integers(0, DISK_BLOCKS - 1),
    st.sampled_from((1, 1, 2, 8, 63, 64, 65, 130)),
)


@given(st.lists(STEPS, max_size=60))
def test_no_byte_is_lent_twice_and_overlapping_requests_wait_in_order(steps: list[Step]) -> None:
    with closing(rig()) as disk:
        play = Play(disk)
        for step in steps:
            play.step(step)
        play.end()


def test_an_old_epochs_regions_and_waiters_are_gone_after_a_fence(disk: NativeRig) -> None:
    first = asked(Kind.PLACE, Op.WRITE, 0, 0, 4096)
    waiting = asked(Kind.PLACE, Op.WRITE, 1, 0, 8192)
    assert [each.tag for each in disk.say([first, waiting])] == [0]
    fence = Descriptor(Kind.FENCE, device=DEVICE_NUMBER, epoch=EPOCH + 1)
    again = waiting._replace(epoch=EPOCH + 1, tag=2)
    assert [(each.kind, each.tag) for each in disk.say([fence, again])] == [
        (Kind.FENCED, 0),
        (Kind.PLACED, 2),
    ]


def test_a_pool_write_that_lies_outside_the_pool_moves_nothing(disk: NativeRig) -> None:
    request = asked(Kind.REQUEST, Op.WRITE, 0, 0, 4096)._replace(segment=SEGMENT_POOL)
    inside = len(disk.pool.view) - 4096
    assert [each.result for each in disk.say([request._replace(buffer=inside)])] == [4096]
    for buffer in (inside + 1, len(disk.pool.view), (1 << 64) - 1, (1 << 64) - 4096):
        assert [each.result for each in disk.say([request._replace(buffer=buffer)])] == [-14]


def test_a_clients_buffer_is_read_and_written_where_it_is_and_nowhere_else(disk: NativeRig) -> None:
    disk.slice.view[4096:8192] = b"z" * 4096
    write = asked(Kind.REQUEST, Op.WRITE, 0, 8192, 4096)._replace(segment=SLICE_SEGMENT)
    assert [each.result for each in disk.say([write._replace(buffer=4096)])] == [4096]
    assert disk.own.view[8192:12288] == b"z" * 4096
    read = write._replace(op=Op.READ, sequence=2)
    (answer,) = disk.say([read._replace(buffer=512)])
    assert (answer.result, answer.flags) == (4096, 0)
    assert disk.slice.view[512:4608] == b"z" * 4096
    for buffer in (len(disk.slice.view) - 4095, (1 << 64) - 4096):
        assert [each.result for each in disk.say([write._replace(buffer=buffer)])] == [-14]
    for segment in (SLICE_SEGMENT + 1, SEGMENT_CLIENTS, 0xFFFFFFFF):
        assert [each.result for each in disk.say([write._replace(segment=segment)])] == [-14]


@pytest.mark.parametrize("kind", [Kind.PLACE, Kind.REQUEST])
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 0),
        (DISK_BYTES, 512),
        (DISK_BYTES - 512, 1024),
        (0, DISK_BYTES + 512),
        ((1 << 64) - 512, 1024),
        (512, (1 << 64) - 512),
        (0, 1 << 63),
    ],
)
def test_a_request_beyond_the_disk_is_refused(disk: NativeRig, kind: Kind, offset: int, length: int) -> None:
    op = Op.WRITE if kind == Kind.PLACE else Op.READ
    answers = disk.say([asked(kind, op, 0, offset, length)])
    assert [each.result for each in answers] == [INVALID]
    assert disk.engine.statistics().lent == 0


def test_data_longer_than_its_place_is_dropped(disk: NativeRig) -> None:
    request = asked(Kind.PLACE, Op.WRITE, 0, 0, 4096)
    assert len(disk.say([request])) == 1
    assert disk.say([request._replace(kind=Kind.DATA, length=4608)]) == []
    assert disk.engine.statistics().dropped == 1


def test_a_device_larger_than_the_disk_is_refused() -> None:
    with pytest.raises(BackendError, match="no native engine: Invalid argument"):
        rig(size_bytes=DISK_BYTES + 512)


CORNERS = (
    0,
    1,
    511,
    512,
    4096,
    DISK_BYTES - 512,
    DISK_BYTES,
    1 << 31,
    1 << 32,
    1 << 63,
    (1 << 64) - 512,
    (1 << 64) - 1,
)


def noise(rng: random.Random) -> Descriptor:
    """A descriptor that is mostly valid."""
    kind = rng.choice(
        (Kind.REQUEST, Kind.REQUEST, Kind.PLACE, Kind.PLACE, Kind.DATA, Kind.RELEASE, Kind.FENCE)
    )
    offset, length, buffer = (
        rng.choice(CORNERS) if rng.random() < 0.2 else rng.randrange(DISK_BYTES // 3) for _ in range(3)
    )
    op = rng.choice((*Op, Op.READ, Op.WRITE, Op.WRITE, 4, 255))
    return Descriptor(
        kind,
        op,
        rng.randrange(16),
        DEVICE_NUMBER,
        0,
        rng.randrange(DEPTH),
        EPOCH,
        rng.randrange(2),
        offset,
        length,
    )._replace(segment=rng.choice((0, SEGMENT_POOL, SEGMENT_POOL, 77)), buffer=buffer)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_a_worker_sends_is_written_beside_the_disk_or_the_pool(seed: int) -> None:
    """The own segment is larger than the device, and no request may touch the bytes behind the device."""
    rng = random.Random(seed)
    with closing(rig(size_bytes=DISK_BYTES // 2)) as disk:
        disk.own.view[DISK_BYTES // 2 :] = behind = rng.randbytes(DISK_BYTES // 2)
        disk.pool.view[:] = rng.randbytes(len(disk.pool.view))
        for _ in range(3000):
            try:
                disk.say([noise(rng)])
            except WireError:
                continue
        assert disk.own.is_intact() and disk.pool.is_intact()
        assert disk.own.view[DISK_BYTES // 2 :] == behind
        counted = disk.engine.statistics()
        assert min(counted.bytes_written, counted.bytes_read, counted.waited, counted.failed) > 10, counted
