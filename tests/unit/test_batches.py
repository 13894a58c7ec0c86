"""Batches: requests that arrive together are columns and are answered together, over both transports."""

import array
import errno
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from support.fakes.plain_backend import Plain
from support.fakes.worker import DEADLINE_S, FakeWorker, serving
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Device, Moved, Properties, Request, check_properties
from ublkpool.bufpool.sdk.batch import Batch
from ublkpool.bufpool.wire import Descriptor, Flag, Kind, Op

BLOCK = 4096
pytestmark = pytest.mark.usefixtures("transport")


class Batched(Plain):
    """A backend whose batches the test handles."""

    def __init__(self, do: Callable[["Batched", Batch], None]) -> None:
        super().__init__()
        self.do = do
        self.seen: list[tuple[int, ...]] = []
        self.kept: list[Request] = []
        self.batch: Batch | None = None

    def serve_batch(self, batch: Batch) -> None:
        self.batch = batch
        self.seen.append(tuple(batch.op))
        self.do(self, batch)

    def copy(self, batch: Batch) -> None:
        batch.copy(memoryview(self.disk))


def _mixed(worker: FakeWorker) -> list[Descriptor]:
    """A write, a read, a request without data, a write with FUA, a read."""
    ops = [(Op.WRITE, 0), (Op.READ, 0), (Op.FLUSH, 0), (Op.WRITE, Flag.FUA), (Op.READ, Flag.REPLAY)]
    return [
        worker.describe(Kind.REQUEST, op, tag * BLOCK, 0 if op == Op.FLUSH else BLOCK, tag=tag, flags=flags)
        for tag, (op, flags) in enumerate(ops)
    ]


def _results(worker: FakeWorker, count: int) -> dict[int, int]:
    return {each.tag: each.result for each in (worker.receive() for _ in range(count))}


def test_reads_come_first_then_writes_and_flushes_are_no_part_of_it(tmp_path: Path) -> None:
    columns: list[list[int]] = []

    def note(backend: Batched, batch: Batch) -> None:
        assert (batch.op.format, batch.flags.format, batch.result.format) == ("B", "H", "i")
        assert (batch.offset.format, batch.length.format) == ("Q", "Q")
        columns.extend(
            [batch.offset.tolist(), batch.length.tolist(), batch.flags.tolist(), batch.result.tolist()]
        )
        # As numpy.frombuffer would see it.
        assert struct.unpack(f"<{len(batch)}Q", batch.offset) == tuple(batch.offset)

    backend = Batched(note)
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        worker.send(0, _mixed(worker))
        assert _results(worker, 5) == {0: BLOCK, 1: BLOCK, 2: 0, 3: BLOCK, 4: BLOCK}
    assert backend.seen == [(Op.READ, Op.READ, Op.WRITE, Op.WRITE)]
    assert columns == [
        [BLOCK, 4 * BLOCK, 0, 3 * BLOCK],
        [BLOCK] * 4,
        [0, Flag.REPLAY, 0, Flag.FUA],
        [BLOCK] * 4,
    ]
    assert "flush" in backend.calls


def test_copy_moves_all_data_and_leaves_out_failed_requests(tmp_path: Path) -> None:
    def copy(backend: Batched, batch: Batch) -> None:
        batch.result[1] = -errno.EIO
        batch.copy(memoryview(backend.disk))

    backend = Batched(copy)
    backend.disk[:] = b"d" * len(backend.disk)
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        sent = _mixed(worker)
        for each in (each for each in sent if each.op != Op.FLUSH):
            worker.pool[each.buffer : each.buffer + BLOCK] = bytes([65 + each.tag]) * BLOCK
        worker.send(0, sent)
        assert _results(worker, 5) == {0: BLOCK, 1: BLOCK, 2: 0, 3: BLOCK, 4: -errno.EIO}
        assert worker.pool[sent[1].buffer : sent[1].buffer + BLOCK] == b"d" * BLOCK
        assert worker.pool[sent[4].buffer : sent[4].buffer + BLOCK] == b"E" * BLOCK
    assert backend.disk[:BLOCK] == b"A" * BLOCK
    assert backend.disk[3 * BLOCK : 4 * BLOCK] == b"D" * BLOCK


def test_copy_to_places_of_the_authors_choice(tmp_path: Path) -> None:
    def copy(backend: Batched, batch: Batch) -> None:
        batch.copy(memoryview(backend.disk), memoryview(array.array("Q", [7 * BLOCK] * len(batch))))

    backend = Batched(copy)
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        assert worker.write(0, b"w" * BLOCK) == BLOCK
        assert worker.read(BLOCK, BLOCK) == b"w" * BLOCK
    assert backend.disk[7 * BLOCK : 8 * BLOCK] == b"w" * BLOCK


@pytest.mark.parametrize("at", [[(1 << 20) - BLOCK + 1], [1 << 63], []])
def test_a_place_outside_of_the_memory_copies_nothing_and_fails_the_batch(
    tmp_path: Path, at: list[int]
) -> None:
    def copy(backend: Batched, batch: Batch) -> None:
        batch.copy(memoryview(backend.disk), memoryview(array.array("Q", at or [0])[: len(at)]))

    backend = Batched(copy)
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        assert worker.write(0, b"w" * BLOCK) == -errno.EIO
    assert not any(backend.disk)


def test_one_request_fails_one_is_short_and_the_others_succeed(tmp_path: Path) -> None:
    def judge(backend: Batched, batch: Batch) -> None:
        batch.result[0], batch.result[1], batch.result[2] = -errno.ENOSPC, 512, BLOCK + 1

    with FakeWorker(tmp_path) as worker, serving(worker, Batched(judge)):
        worker.send(0, [worker.describe(Kind.REQUEST, Op.READ, 0, BLOCK, tag=tag) for tag in range(4)])
        assert _results(worker, 4) == {0: -errno.ENOSPC, 1: 512, 2: -errno.EIO, 3: BLOCK}


def test_an_exception_fails_all_requests_but_those_of_later(tmp_path: Path) -> None:
    def fail(backend: Batched, batch: Batch) -> None:
        backend.kept.append(batch.later(1))
        raise OSError(errno.EDQUOT, "full")

    backend = Batched(fail)
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        worker.send(0, [worker.describe(Kind.REQUEST, Op.WRITE, 0, BLOCK, tag=tag) for tag in range(3)])
        assert _results(worker, 2) == {0: -errno.EDQUOT, 2: -errno.EDQUOT}
        assert worker.is_silent()
        # From a thread beside the loop's.
        backend.kept[0].complete()
        assert _results(worker, 1) == {1: BLOCK}


def test_a_request_of_later_behaves_like_any_request(tmp_path: Path) -> None:
    is_served = threading.Event()

    def keep(backend: Batched, batch: Batch) -> None:
        backend.kept.append(batch.later(0))
        for wrong in (0, 1, -1):
            with pytest.raises(IndexError):
                batch.later(wrong)
        batch.copy(memoryview(backend.disk))
        with pytest.raises(IndexError):
            batch.buffer(1)
        assert bytes(batch.buffer(0)) == bytes(backend.kept[0].buffer)
        is_served.set()

    backend = Batched(keep)
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        request = worker.describe(Kind.REQUEST, Op.WRITE, BLOCK, BLOCK, flags=Flag.FUA)
        worker.pool[request.buffer : request.buffer + BLOCK] = b"l" * BLOCK
        worker.send(0, [request])
        assert is_served.wait(DEADLINE_S)
        assert worker.is_silent()
        (kept,) = backend.kept
        assert (kept.op, kept.offset, kept.length, kept.fua, kept.region) == (
            Op.WRITE,
            BLOCK,
            BLOCK,
            True,
            -1,
        )
        assert bytes(kept.buffer) == b"l" * BLOCK and not any(backend.disk), "it was left out of the copy"
        fence = worker.fence_executing()
        assert worker.is_silent(), "one of the old epoch still runs"
        kept.fail(OSError(errno.EIO, "late"))
        assert (worker.receive().kind, fence.epoch) == (Kind.FENCED, 2)
        assert worker.is_silent(), "a dropped request has no answer"


def test_a_batch_that_is_kept_too_long_shows_old_numbers_and_does_no_harm(tmp_path: Path) -> None:
    backend = Batched(Batched.copy)
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        assert worker.write(BLOCK, b"k" * BLOCK) == BLOCK
    assert backend.batch is not None
    assert backend.batch.offset.tolist() == [BLOCK]


class Posting(Plain):
    """A backend whose writes land in slots that the SDK posts."""

    properties = Properties(
        size_bytes=1 << 20,
        volatile_cache=True,
        placement="backend",
        segment_bytes=1 << 20,
        post_max_bytes=1 << 16,
    )

    def __init__(self) -> None:
        super().__init__()
        self.placed: list[int] = []

    def store_placed(self, region: int, buf: memoryview, offset: int, fua: bool) -> Moved:
        self.placed.append(region)
        return super().store_placed(region, buf, offset, fua)


def _posting_worker(tmp_path: Path) -> FakeWorker:
    return FakeWorker(tmp_path, placement="backend", depth=4, post_bytes=(BLOCK, 64 << 10))


def _posts(worker: FakeWorker, count: int) -> list[Descriptor]:
    posts = [worker.receive() for _ in range(count)]
    assert {each.kind for each in posts} == {Kind.POST}
    return posts


def _land(worker: FakeWorker, post: Descriptor, data: bytes, **more: int) -> Descriptor:
    """DATA of a write that landed in a posted slot, without PLACE."""
    assert worker.own is not None
    worker.own[post.buffer : post.buffer + len(data)] = data
    request = worker.describe(Kind.DATA, Op.WRITE, 2 * BLOCK, len(data), flags=more.get("flags", 0))
    request = request._replace(segment=post.segment, buffer=post.buffer)
    worker.send(0, [request])
    return request


def test_writes_land_in_posted_regions_without_a_place(tmp_path: Path) -> None:
    backend = Posting()
    with _posting_worker(tmp_path) as worker, serving(worker, backend):
        posts = _posts(worker, 8)
        assert sorted({each.length for each in posts}) == [BLOCK, 64 << 10]
        post = next(each for each in posts if each.length == BLOCK)
        request = _land(worker, post, b"p" * BLOCK, flags=Flag.FUA)
        assert worker.answer_of(request).result == BLOCK
        worker.release(request)
        # The SDK still asks for a place if no posted slot is large enough.
        assert worker.write(8 * BLOCK, b"q" * 8192) == 8192
    assert backend.placed[0] == post.buffer and len(backend.placed) == 2
    assert backend.disk[2 * BLOCK : 3 * BLOCK] == b"p" * BLOCK
    assert backend.disk[8 * BLOCK : 8 * BLOCK + 8192] == b"q" * 8192
    assert ("pwrite", 2 * BLOCK, True) in backend.calls


def test_regions_posted_to_a_dead_worker_are_posted_to_the_next(tmp_path: Path) -> None:
    with _posting_worker(tmp_path) as worker, serving(worker, Posting()):
        before = {each.buffer for each in _posts(worker, 8)}
        worker.epoch += 1
        worker.send(0, [Descriptor(Kind.WELCOME, device=7, epoch=worker.epoch)])
        after = _posts(worker, 8)
        assert {each.buffer for each in after} == before and {each.epoch for each in after} == {worker.epoch}


class PostingAll(Posting):
    """A backend without `place`, for which the SDK posts slots of every size."""

    properties = msgspec.structs.replace(Posting.properties, post_max_bytes=BLOCK)


def test_a_backend_that_names_no_places_has_a_slot_for_every_size(tmp_path: Path) -> None:
    with _posting_worker(tmp_path) as worker, serving(worker, PostingAll()):
        _posts(worker, 8)
        assert worker.write(0, b"a" * (64 << 10)) == 64 << 10


class PostingSmall(Posting):
    """The SDK posts slots for small writes, and the backend places the large ones."""

    properties = msgspec.structs.replace(Posting.properties, post_max_bytes=BLOCK)

    def __init__(self) -> None:
        super().__init__()
        self.device: Device | None = None

    def started(self, device: Device) -> None:
        self.device = device
        self.room: int = device.own_from + BLOCK

    def place(self, offset: int, length: int, flags: int) -> int | None:
        return self.room

    def released(self, region: int) -> None:
        self.calls.append(("released", region))


def test_small_writes_land_in_posted_slots_and_the_author_places_the_others(tmp_path: Path) -> None:
    backend = PostingSmall()
    with _posting_worker(tmp_path) as worker, serving(worker, backend):
        posts = _posts(worker, 4)
        assert backend.device is not None
        middle = backend.device.own_from
        assert middle == 1 << 19
        assert {each.length for each in posts} == {BLOCK} and all(each.buffer < middle for each in posts)
        request = _land(worker, posts[0], b"s" * BLOCK)
        assert worker.answer_of(request).result == BLOCK
        worker.release(request)
        placed, asked = worker.place(0, 8192)
        assert placed.buffer == middle + BLOCK
        assert worker.fill(placed, asked, b"l" * 8192) == 8192
        backend.room = middle - BLOCK
        refused, _ = worker.place(0, 8192)
        assert refused.kind == Kind.REJECT, "that part is the SDK's"
    assert backend.placed == [posts[0].buffer, middle + BLOCK]
    assert [each for each in backend.calls if each[0] == "released"] == [("released", middle + BLOCK)]


class PostingBatches(Posting):
    """The same with batches."""

    def serve_batch(self, batch: Batch) -> None:
        batch.copy(memoryview(self.disk))


def test_a_batch_finds_data_that_landed_in_the_own_segment(tmp_path: Path) -> None:
    backend = PostingBatches()
    with _posting_worker(tmp_path) as worker, serving(worker, backend):
        request = _land(worker, _posts(worker, 8)[0], b"b" * BLOCK)
        assert worker.answer_of(request).result == BLOCK
        worker.release(request)
        assert worker.read(2 * BLOCK, BLOCK) == b"b" * BLOCK


@pytest.mark.parametrize(
    "wrong",
    [
        Properties(post_max_bytes=1 << 16),
        Properties(post_max_bytes=1 << 16, placement="backend", segment_bytes=1 << 20, read_buffers="own"),
        Properties(post_max_bytes=1 << 16, placement="backend"),
    ],
)
def test_posts_need_writes_in_the_own_segment_and_reads_elsewhere(wrong: Properties) -> None:
    with pytest.raises(BackendError, match=r"post_max_bytes is for|need a segment"):
        check_properties(wrong)
