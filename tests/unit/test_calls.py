"""Requests that become Python calls have the same answers as in the Python model; limits and errors of calls."""

import errno
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from support.fakes.plain_backend import SIZE_BYTES, Plain
from support.fakes.request_engine import RequestEngine
from ublkpool.bufpool import wire
from ublkpool.bufpool.sdk.backend import Device, Outbox, Request
from ublkpool.bufpool.sdk.calls import CallEngine
from ublkpool.bufpool.wire import Descriptor, Flag, Kind, Op

BLOCK = 4096
DEPTH = 16


def _device(outbox: Outbox) -> Device:
    return Device(
        name="x",
        number=7,
        epoch=2,
        size_bytes=SIZE_BYTES,
        logical_block_bytes=512,
        queues=2,
        depth=DEPTH,
        max_io_bytes=BLOCK,
        need_get_data=False,
        placement="pool",
        read_only=False,
        pool=memoryview(bytearray(bytes(range(256)) * (DEPTH * BLOCK // 256))),
        own=memoryview(b""),
        own_segment=0,
        watch=lambda descriptor, callback: None,
        unwatch=lambda descriptor: None,
        wake=outbox.wake,
    )


class Moody(Plain):
    """A backend that answers in each possible way."""

    def pread(self, buf: memoryview, offset: int) -> int | None:  # type: ignore[override]
        if offset == BLOCK:
            raise OSError(errno.ENOSPC, "full")
        if offset == 2 * BLOCK:
            raise ZeroDivisionError
        if offset == 3 * BLOCK:
            return len(buf) + 1
        if offset == 4 * BLOCK:
            return 512
        if offset == 5 * BLOCK:
            return -errno.EDQUOT
        super().pread(buf, offset)
        return None


def _request(tag: int, op: Op, offset: int, **more: int) -> Descriptor:
    moves = op in (Op.READ, Op.WRITE)
    return Descriptor(
        Kind.REQUEST,
        op,
        more.get("flags", 0),
        7,
        1,
        tag,
        more.get("epoch", 2),
        1 << 40 | tag,
        offset,
        BLOCK,
        99,
        more.get("segment", wire.SEGMENT_POOL if moves else wire.SEGMENT_NONE),
        tag * BLOCK if moves else 0,
    )


EVERYTHING = [
    *(_request(tag, Op.READ, tag * BLOCK) for tag in range(6)),
    _request(6, Op.WRITE, 0, flags=Flag.FUA),
    _request(7, Op.WRITE, BLOCK, flags=Flag.REPLAY),
    _request(8, Op.FLUSH, 0),
    _request(9, Op.DISCARD, 0, flags=Flag.NOUNMAP),
    _request(10, Op.WRITE_ZEROES, BLOCK),
    _request(11, Op.WRITE, 0, epoch=1),
    _request(12, Op.READ, 0, segment=wire.SEGMENT_NONE),
    _request(13, Op.FLUSH, 0)._replace(op=4),
    _request(14, Op.WRITE, 2 * BLOCK, flags=Flag.FUA | Flag.REPLAY, epoch=3),
]


@pytest.mark.parametrize("per_frame", [1, len(EVERYTHING)])
def test_the_answers_are_those_of_the_model_in_python(per_frame: int) -> None:
    told = []
    for make in (CallEngine, RequestEngine):
        outbox, backend = Outbox(), Moody()
        engine = make(backend, _device(outbox), outbox)
        answers = _say(
            engine, *(EVERYTHING[at : at + per_frame] for at in range(0, len(EVERYTHING), per_frame))
        )
        counted = engine.statistics()
        same = [getattr(counted, name) for name in ("answered", "failed", "replayed", "dropped", "running")]
        told.append(
            (sorted(answers, key=lambda each: each.tag), same, sorted(backend.calls, key=str), backend.disk)
        )
        engine.close()
        outbox.close()
    assert told[0] == told[1]
    results = {each.tag: each.result for each in told[0][0]}
    assert results[0] == BLOCK and results[1] == -errno.ENOSPC and results[3] == -errno.EIO
    assert 11 not in results


def _say(engine: CallEngine | RequestEngine, *frames: list[Descriptor]) -> list[Descriptor]:
    answers: list[Descriptor] = []
    for frame in frames:
        engine.take(1, wire.pack_frame(frame))
        for queue, words in engine.answers():
            assert queue == 1
            answers += wire.iter_frame(words)
    return answers


class Seeing(Plain):
    """Requests, and the contents of their buffers."""

    def submit(self, batch: Sequence[Request]) -> None:
        for request in batch:
            self.calls.append((request.op, request.region, bytes(request.buffer[:1])))
            request.complete()


@pytest.mark.parametrize("make", [CallEngine, RequestEngine])
@pytest.mark.parametrize("kind", [Plain, Seeing])
def test_data_in_the_client_area_is_served_in_place(
    make: type[CallEngine] | type[RequestEngine], kind: type[Plain]
) -> None:
    outbox, backend = Outbox(), kind()
    areas = {wire.SEGMENT_CLIENTS + at: memoryview(bytearray(b"%d" % at * 4 * BLOCK)) for at in (0, 3)}
    engine = make(backend, replace(_device(outbox), clients=areas), outbox)
    pool = _request(2, Op.WRITE, 2 * BLOCK)
    wanted = [_request(at, Op.WRITE, at * BLOCK, segment=wire.SEGMENT_CLIENTS + at) for at in (0, 3)]
    assert {each.result for each in _say(engine, [pool, *wanted])} == {BLOCK}
    if kind is Seeing:
        assert backend.calls == [(Op.WRITE, -1, b"\0"), (Op.WRITE, -1, b"0"), (Op.WRITE, -1, b"3")]
    else:
        assert backend.disk[:BLOCK] == b"0" * BLOCK and backend.disk[3 * BLOCK : 4 * BLOCK] == b"3" * BLOCK
        back = _request(0, Op.READ, 0, segment=wire.SEGMENT_CLIENTS + 3)
        assert [each.result for each in _say(engine, [back])] == [BLOCK]
        assert areas[wire.SEGMENT_CLIENTS + 3][:BLOCK] == b"0" * BLOCK
    engine.close()
    outbox.close()


@pytest.fixture
def moody() -> Iterator[CallEngine]:
    outbox = Outbox()
    engine = CallEngine(Moody(), _device(outbox), outbox)
    yield engine
    engine.close()
    outbox.close()


@pytest.mark.parametrize(("segment", "buffer"), [(1, DEPTH * BLOCK - 512), (1, (1 << 64) - 1), (2, 0)])
def test_a_buffer_outside_the_pool_fails_its_request(moody: CallEngine, segment: int, buffer: int) -> None:
    wrong = _request(0, Op.WRITE, 0)._replace(segment=segment, buffer=buffer)
    assert [each.result for each in _say(moody, [wrong])] == [-errno.EFAULT]


def test_a_result_larger_than_its_request_is_logged_once(
    moody: CallEngine, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert [each.result for each in _say(moody, [_request(0, Op.READ, 3 * BLOCK)])] == [-errno.EIO]
    assert caplog.text.count("larger than its request") == 1


class Odd(Plain):
    """A backend that returns a value that is no number of bytes."""

    def pread(self, buf: memoryview, offset: int) -> int | None:  # type: ignore[override]
        if offset == 0:
            raise StopIteration
        return 1 << 40 if offset == BLOCK else "all"  # type: ignore[return-value]


def test_an_invalid_result_fails_its_own_request_alone() -> None:
    outbox = Outbox()
    engine = CallEngine(Odd(), _device(outbox), outbox)
    asked = [_request(tag, Op.READ, tag * BLOCK) for tag in range(3)] + [_request(3, Op.WRITE, 0)]
    assert [each.result for each in _say(engine, asked)] == [-errno.EIO] * 3 + [BLOCK]
    engine.close()
    outbox.close()


class Naming(Plain):
    """A backend that reads in place, in regions that the test names."""

    def __init__(self) -> None:
        super().__init__()
        self.room: int | None = None
        self.back: list[int] = []

    def read_in_place(self, offset: int, length: int) -> int | None:
        return self.room

    def released(self, region: int) -> None:
        self.back.append(region)
        raise ZeroDivisionError


def test_a_read_in_place_waits_for_its_region_and_lets_it_go() -> None:
    outbox, backend = Outbox(), Naming()
    device = replace(_device(outbox), own=memoryview(bytearray(2 * BLOCK)), own_segment=9)
    engine = CallEngine(backend, device, outbox)
    read = _request(0, Op.READ, 0, segment=wire.SEGMENT_NONE)
    assert not _say(engine, [read])
    backend.room = BLOCK
    engine.collect()
    (answer,) = [each for _, frame in engine.answers() for each in wire.iter_frame(frame)]
    assert (answer.kind, answer.flags, answer.segment, answer.buffer) == (Kind.DONE, Flag.REGION, 9, BLOCK)
    assert not _say(engine, [read._replace(kind=Kind.RELEASE)])
    assert backend.back == [BLOCK], "and its exception ends nothing"
    backend.room = BLOCK + 512
    assert [each.result for each in _say(engine, [read._replace(sequence=5)])] == [-errno.EINVAL]
    engine.close()
    outbox.close()
