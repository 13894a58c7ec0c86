"""Requests that the engine in a worker begins and finishes later: no descriptor goes to it, and none comes back."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.fakes.driver import IOD_FUA, SECTOR_BYTES, Holder, Request
from support.fakes.file_inside import FALLOCATE, FSYNC, READ, RWF_DSYNC, WRITE, Entry, FileInside
from support.fakes.queue_rig import DEVICE, SEGMENT_SLICE, Plan
from ublkpool.bufpool.engine import _engine
from ublkpool.bufpool.wire import Descriptor, Kind, Op
from ublkpool.ublk import _native
from ublkpool.ublk.queue import Attention, LinkState
from ublkpool.ublk.statistics import read_statistics

DATA = b"\x2a" * (2 * SECTOR_BYTES)


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[FileInside]:
    made = FileInside(tmp_path / "disk", Plan(), is_block_device=True)
    yield made
    made.close()


@pytest.fixture
def in_memory() -> Iterator[FileInside]:
    """The file lies on a tmpfs, so that its I/O ends at once."""
    path = Path(f"/dev/shm/ublkpool-test-begun-{os.getpid()}")
    made = FileInside(path, Plan())
    yield made
    made.close()
    path.unlink()


def write(at: int, flags: int = 0) -> Request:
    return Request(Op.WRITE, at, 2, DATA, flags)


def descriptors(inside: FileInside) -> tuple[int, int]:
    return inside.side.statistics.descriptors_out, inside.side.statistics.descriptors_in


def test_a_request_with_data_is_on_a_buffer_of_the_pool_and_has_no_descriptor(inside: FileInside) -> None:
    before = descriptors(inside)
    request, read = write(4, IOD_FUA), Request(Op.READ, 4, 2)
    entry = inside.deliver(2, request)
    assert (entry.opcode, entry.offset, entry.length) == (WRITE, 4 * SECTOR_BYTES, len(DATA))
    assert entry.address == inside.driver.addresses[2] and entry.rw_flags == RWF_DSYNC
    assert inside.complete(entry, len(DATA)) == [] and request.result == len(DATA)
    entry = inside.deliver(2, read)
    assert entry.opcode == READ
    _native.ffi.memmove(_native.ffi.cast("uint8_t *", entry.address), DATA, len(DATA))
    inside.complete(entry, len(DATA))
    assert (read.result, bytes(read.received)) == (len(DATA), DATA)
    assert descriptors(inside) == before
    assert inside.side.statistics.buffers_lent == 0
    found = read_statistics(inside.side.block_bytes())
    assert sum(found.latencies["backend"].counts) == 2
    inside.side.check_durations()


@pytest.mark.parametrize(
    ("op", "opcode"), [(Op.FLUSH, FSYNC), (Op.DISCARD, FALLOCATE), (Op.WRITE_ZEROES, FALLOCATE)]
)
def test_a_request_without_data_has_neither_descriptor_nor_buffer(
    inside: FileInside, op: Op, opcode: int
) -> None:
    before = descriptors(inside)
    request = Request(op, 0 if op is Op.FLUSH else 8, 0 if op is Op.FLUSH else 8)
    entry = inside.deliver(1, request)
    assert entry.opcode == opcode and inside.side.statistics.lent_total == 0
    inside.complete(entry, 0)
    assert request.result == 0 and descriptors(inside) == before


def test_requests_that_wait_for_a_buffer_begin_in_their_order_of_arrival(tmp_path: Path) -> None:
    inside = FileInside(tmp_path / "disk", Plan(depth=6, spare=0), is_block_device=True)
    reads = [Request(Op.READ, 8 * tag, 8) for tag in range(inside.rig.plan.depth)]
    for tag, each in enumerate(reads):
        inside.driver.deliver(tag, each)
    begun, offsets = inside.turn(), []
    assert 0 < len(begun) < len(reads), "there are fewer buffers than requests"
    while begun:
        entry = begun.pop(0)
        offsets.append(entry.offset)
        inside.complete(entry, 8 * SECTOR_BYTES)
        # The commit was consumed: only then is its buffer the next one's.
        begun += inside.turn()
    assert offsets == [each.sector * SECTOR_BYTES for each in reads]
    assert [each.result for each in reads] == [8 * SECTOR_BYTES] * len(reads)
    inside.close()


def test_without_need_get_data_the_tag_has_its_buffer_already(tmp_path: Path) -> None:
    inside = FileInside(tmp_path / "disk", Plan(need_get_data=False), is_block_device=True)
    before = descriptors(inside)
    request = write(0)
    entry = inside.deliver(3, request)
    assert entry.address == inside.driver.addresses[3]
    inside.complete(entry, len(DATA))
    assert request.result == len(DATA) and descriptors(inside) == before
    inside.close()


def test_io_that_moved_less_goes_on_and_an_error_is_the_requests(inside: FileInside) -> None:
    request, failed = write(0), Request(Op.READ, 8, 1)
    first = inside.deliver(0, request)
    (second,) = inside.complete(first, SECTOR_BYTES)
    assert (second.address, second.length) == (first.address + SECTOR_BYTES, SECTOR_BYTES)
    assert request.result is None
    inside.complete(second, SECTOR_BYTES)
    assert request.result == len(DATA)
    inside.complete(inside.deliver(1, failed), -errno.EIO)
    assert failed.result == -errno.EIO


def test_what_the_engine_refuses_fails_with_its_errno(inside: FileInside) -> None:
    _engine.lib.engine_resize(inside.raw, 4 * SECTOR_BYTES)
    beyond = Request(Op.READ, 4, 1)
    inside.driver.deliver(0, beyond)
    assert inside.turn() == [] and beyond.result == -errno.EINVAL


def test_io_in_memory_is_done_within_the_call(in_memory: FileInside) -> None:
    request, read = write(6), Request(Op.READ, 6, 2)
    in_memory.driver.deliver(0, request)
    in_memory.driver.copy(0) if in_memory.turn() == [] else None
    assert in_memory.turn() == [] and request.result == len(DATA)
    in_memory.driver.deliver(0, read)
    assert in_memory.turn() == [] and bytes(read.received) == DATA
    assert in_memory.path.read_bytes()[6 * SECTOR_BYTES :][: len(DATA)] == DATA


def test_a_write_is_not_answered_if_the_file_was_cut_meanwhile(in_memory: FileInside) -> None:
    request = write(6)
    in_memory.driver.deliver(0, request)
    in_memory.turn()
    in_memory.driver.copy(0)
    os.truncate(in_memory.path, 16 * SECTOR_BYTES)
    in_memory.turn()
    assert in_memory.queue.link is LinkState.CUT and request.result is None
    assert _engine.lib.engine_error(in_memory.raw) == -errno.ENODATA


def test_data_in_the_client_area_is_named_by_a_descriptor(tmp_path: Path) -> None:
    inside = FileInside(tmp_path / "disk", Plan(slice_bytes=1 << 16), is_block_device=True)
    before = descriptors(inside)
    read = Request(Op.READ, 0, 1)
    read.client_buffer = 4096
    inside.driver.deliver(0, read)
    inside.turn()
    # This engine was given no client area.
    assert read.result == -errno.EFAULT
    assert descriptors(inside) == (before[0] + 1, before[1] + 1)
    assert SEGMENT_SLICE in inside.rig.areas
    inside.close()


def test_a_held_queue_is_quiet_only_when_the_engine_has_finished(inside: FileInside) -> None:
    request, late = write(0), Request(Op.READ, 8, 1)
    entry = inside.deliver(0, request)
    inside.queue.hold(True)
    inside.driver.deliver(1, late)
    assert inside.turn() == [] and not inside.queue.attention() & Attention.QUIET
    inside.complete(entry, len(DATA))
    assert inside.queue.attention() & Attention.QUIET and request.result == len(DATA)
    assert inside.queue.flush()
    (sync,) = inside.turn()
    assert sync.opcode == FSYNC
    inside.complete(sync, 0)
    assert inside.queue.attention() & Attention.FLUSHED
    inside.queue.hold(False)
    (entry,) = inside.turn()
    inside.complete(entry, SECTOR_BYTES)
    assert late.result == SECTOR_BYTES


def test_a_request_past_its_deadline_ends_the_engines_use_and_is_not_answered_by_it(tmp_path: Path) -> None:
    plan = Plan(timeout_ms=1000, fail_on_timeout=True)
    inside = FileInside(tmp_path / "disk", plan, is_block_device=True)
    request = write(0)
    entry = inside.deliver(0, request)
    _native.lib.uq_tick(inside.queue.raw, 2000)
    assert inside.queue.link is LinkState.CUT
    inside.complete(entry, len(DATA))
    assert request.result is None and inside.driver.holders[0] is Holder.SERVER
    inside.close()


class Said:
    """What an engine says of a request: at first what is true."""

    def __init__(self, inside: FileInside, tag: int) -> None:
        self.sequence = self._sequence(inside)
        self.tag, self.result = tag, len(DATA)

    @staticmethod
    def _sequence(inside: FileInside) -> int:
        """That of the one request that runs."""
        out = _engine.ffi.new("struct wire_descriptor *")
        assert _engine.lib.engine_running(inside.raw, out, 1) == 1
        return int(out.sequence)


class Liar:
    """Stands between core and engine: the engine's results are those that the test says."""

    def __init__(self, inside: FileInside) -> None:
        ffi = _native.ffi
        self._said = ffi.new("struct engine_result[]", 4)
        self._count = 0
        self._keep = ffi.callback("uint32_t(struct engine *, const struct engine_result **)", self._results)
        self.calls = ffi.new("struct engine_calls *", inside.calls[0])
        self.calls.results = self._keep
        inside.calls = self.calls
        inside.begin()

    def say(self, *said: Said) -> None:
        for at, each in enumerate(said):
            self._said[at].sequence, self._said[at].tag = each.sequence, each.tag
            self._said[at].result = each.result
        self._count = len(said)

    def _results(self, _engine: Any, results: Any) -> int:
        count, self._count = self._count, 0
        results[0] = self._said
        return count


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("sequence", -1, "device, queue, tag, epoch or sequence"),
        ("sequence", 1, "device, queue, tag, epoch or sequence"),
        ("tag", 1, "device, queue, tag, epoch or sequence"),
        ("tag", 4, "device, queue, tag, epoch or sequence"),
        ("tag", 65535, "device, queue, tag, epoch or sequence"),
        ("result", 3 * SECTOR_BYTES, "result"),
        ("result", SECTOR_BYTES + 1, "result"),
        ("result", -4096, "result"),
    ],
)
def test_a_result_that_cannot_be_this_requests_ends_the_link_and_answers_nothing(
    inside: FileInside, field: str, value: int, why: str
) -> None:
    earlier, request = write(0), write(8)
    inside.complete(inside.deliver(0, earlier), len(DATA))
    inside.deliver(0, request)
    liar, said = Liar(inside), Said(inside, 0)
    setattr(said, field, said.sequence + value if field == "sequence" else value)
    liar.say(said)
    inside.exchange()
    inside.driver.consume()
    assert inside.queue.link is LinkState.CUT and request.result is None
    assert inside.driver.holders[0] is Holder.SERVER
    assert inside.side.statistics.violations == 1
    assert why in inside.queue.violation(), inside.queue.violation()


def test_a_second_result_of_a_request_is_refused(inside: FileInside) -> None:
    request = write(0)
    inside.deliver(0, request)
    liar, said = Liar(inside), Said(inside, 0)
    liar.say(said, said)
    inside.exchange()
    inside.driver.consume()
    assert request.result == len(DATA), "the first one is true"
    assert inside.queue.link is LinkState.CUT and inside.side.statistics.violations == 1


def test_an_error_that_a_read_may_have_is_no_violation(inside: FileInside) -> None:
    request = write(0)
    inside.deliver(0, request)
    liar, said = Liar(inside), Said(inside, 0)
    said.result = -4095
    liar.say(said)
    inside.exchange()
    inside.driver.consume()
    assert request.result == -4095 and inside.queue.link is LinkState.UP


def begin(inside: FileInside, tag: int, sequence: int, op: int = Op.WRITE) -> None:
    ffi = _engine.ffi
    request = ffi.new("struct engine_request *")
    request.sequence, request.tag, request.op = sequence, tag, op
    request.length, request.memory = SECTOR_BYTES, ffi.cast("uint8_t *", inside.rig.pool.address)
    _engine.lib.engine_begin(inside.raw, request)


def results(inside: FileInside) -> list[tuple[int, int, int]]:
    out = _engine.ffi.new("struct engine_result **")
    count = _engine.lib.engine_results(inside.raw, out)
    return [(each.sequence, each.tag, each.result) for each in out[0][0:count]] if count else []


@pytest.mark.parametrize("tag", [0, 4, 65535])
def test_the_engine_begins_no_request_of_a_tag_that_has_one_or_that_it_does_not_know(
    inside: FileInside, tag: int
) -> None:
    begin(inside, 0, 90)
    begin(inside, tag, 91)
    assert _engine.lib.engine_error(inside.raw) == -errno.EPROTO
    inside.exchange()
    assert inside.queue.link is LinkState.CUT
    assert inside.queue.violation().startswith("the engine in the worker")


def test_results_stay_where_they_are_while_the_next_requests_end(in_memory: FileInside) -> None:
    for tag in range(4):
        begin(in_memory, tag, 10 + tag)
    out = _engine.ffi.new("struct engine_result **")
    assert _engine.lib.engine_results(in_memory.raw, out) == 4
    for tag in range(4):
        begin(in_memory, tag, 20 + tag)
    assert [each.sequence for each in out[0][0:4]] == [10, 11, 12, 13]
    assert [each[0] for each in results(in_memory)] == [20, 21, 22, 23]
    assert results(in_memory) == []


def test_a_request_without_memory_fails_in_an_engine_that_has_no_fixed_buffers(inside: FileInside) -> None:
    request = _engine.ffi.new("struct engine_request *")
    request.op, request.length = Op.READ, SECTOR_BYTES
    _engine.lib.engine_begin(inside.raw, request)
    assert results(inside) == [(0, 0, -errno.EFAULT)]


def _submitted(inside: FileInside) -> Entry:
    assert _engine.lib.engine_prepare(inside.raw) == 0
    (entry,) = inside.uring.entries()
    return entry


def test_a_fence_waits_for_what_was_begun_before_it_and_drops_its_result(inside: FileInside) -> None:
    begin(inside, 0, 50)
    entry, later = _submitted(inside), inside.rig.plan.epoch + 1
    fence = Descriptor(Kind.FENCE, device=DEVICE, epoch=later).pack()
    sent = _engine.ffi.from_buffer("struct wire_descriptor *", fence)
    assert _engine.lib.engine_take(inside.raw, sent, 1) == 0
    answers = _engine.ffi.new("struct wire_descriptor **")
    assert _engine.lib.engine_answers(inside.raw, 0, answers) == 0, "not confirmed before it has ended"
    _engine.lib.engine_complete(inside.raw, entry.user_data, SECTOR_BYTES)
    assert results(inside) == []
    assert _engine.lib.engine_answers(inside.raw, 0, answers) == 1
    assert answers[0].kind == Kind.FENCED
    begin(inside, 0, 51)
    _engine.lib.engine_complete(inside.raw, _submitted(inside).user_data, SECTOR_BYTES)
    assert results(inside) == [(51, 0, SECTOR_BYTES)]
