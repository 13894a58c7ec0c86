"""Frames of requests that become calls: the same answers as from the engine that keeps a record of each."""

import errno
from collections.abc import Sequence

import pytest

from support.plain_backend import SIZE_BYTES, Plain
from ublkpool.bufpool import wire
from ublkpool.bufpool.backend import Backend, Device, Outbox, Properties, Request, perform
from ublkpool.bufpool.direct import DirectCalls, suits
from ublkpool.bufpool.dispatch import RequestEngine
from ublkpool.bufpool.errors import WireError
from ublkpool.bufpool.wire import Descriptor, Flag, Kind, Op

BLOCK = 4096
DEPTH = 16
SLICE = wire.SEGMENT_CLIENTS + 3


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
        clients={SLICE: memoryview(bytearray(b"c" * BLOCK))},
        own=memoryview(b""),
        own_segment=0,
        watch=lambda descriptor, callback: None,
        unwatch=lambda descriptor: None,
        wake=outbox.wake,
    )


class Moody(Plain):
    """Answers in every way there is."""

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


class Recorded(Moody):
    """The same, one request object each."""

    def submit(self, batch: Sequence[Request]) -> None:
        for request in batch:
            try:
                request.complete(perform(self, request))
            except Exception as error:
                request.fail(error)


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
    _request(15, Op.WRITE, 3 * BLOCK, segment=SLICE)._replace(buffer=0),
]


@pytest.mark.parametrize("per_frame", [1, len(EVERYTHING)])
def test_the_answers_are_those_of_the_engine_that_records_each(per_frame: int) -> None:
    outbox = Outbox()
    engines = []
    for backend in (Moody(), Recorded()):
        engine = RequestEngine(backend, _device(outbox), outbox)
        answers: list[Descriptor] = []
        for start in range(0, len(EVERYTHING), per_frame):
            engine.take(1, wire.pack_frame(EVERYTHING[start : start + per_frame]))
            for queue, frame in engine.answers():
                assert queue == 1
                answers += wire.iter_frame(frame)
        answers.sort(key=lambda each: each.tag)
        engines.append((answers, engine.statistics(), backend.calls, bytes(backend.disk)))
    outbox.close()
    assert engines[0] == engines[1]
    assert engines[0][3][3 * BLOCK : 4 * BLOCK] == b"c" * BLOCK
    assert suits(Moody()) and not suits(Recorded())
    results = {each.tag: each.result for each in engines[0][0]}
    assert results[0] == BLOCK and results[1] == -errno.ENOSPC and results[3] == -errno.EIO
    assert 11 not in results


def test_a_frame_with_more_than_requests_is_left_alone() -> None:
    outbox = Outbox()
    backend = Plain()
    direct = DirectCalls(backend, _device(outbox))
    write = _request(0, Op.WRITE, 0).pack()
    fence = Descriptor(Kind.FENCE, device=7, queue=1, epoch=3).pack()
    outbox.close()
    for frame in (write + fence, fence, write[:-1], b"", write * (wire.DESCRIPTORS_PER_FRAME_MAX + 1)):
        assert direct.answers_to(frame, 2) is None
    assert not backend.calls
    assert direct.answers_to(write, 2) is not None


@pytest.mark.parametrize(
    ("segment", "buffer"),
    [(1, DEPTH * BLOCK - 512), (1, (1 << 64) - 1), (2, 0), (SLICE, 512), (SLICE + 1, 0)],
)
def test_a_buffer_outside_the_pool_is_the_workers_fault(segment: int, buffer: int) -> None:
    outbox = Outbox()
    direct = DirectCalls(Plain(), _device(outbox))
    outbox.close()
    with pytest.raises(WireError, match="outside the pool"):
        direct.answers_to(_request(0, Op.WRITE, 0, segment=segment)._replace(buffer=buffer).pack(), 2)


class InPlace(Plain):
    properties = Properties(read_buffers="own", segment_bytes=65536)

    def read_in_place(self, offset: int, length: int) -> int | None:
        return 0


def test_who_reads_in_place_is_not_called_directly() -> None:
    assert suits(Plain()) and not suits(InPlace())
    assert Backend.submit is Plain.submit
