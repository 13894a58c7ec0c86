"""The null backend answers correctly and stores nothing, with both placements."""

from pathlib import Path

import pytest

from support.fakes.worker import DEADLINE_S, FakeWorker, serving
from ublkpool.backends.null import NullBackend, NullOptions
from ublkpool.bufpool.wire import Descriptor, Kind, Op

pytestmark = pytest.mark.usefixtures("transport")


def test_answers_every_operation_in_full(tmp_path: Path) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, NullBackend(NullOptions(size=1 << 30))):
        assert len(worker.read(0, 4096)) == 4096
        assert worker.write(8192, b"x" * 4096) == 4096
        assert [worker.do(op, 0, 4096) for op in (Op.FLUSH, Op.DISCARD, Op.WRITE_ZEROES)] == [0, 0, 0]


def test_a_batch_is_answered_by_one_frame(tmp_path: Path) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, NullBackend(NullOptions(size=1 << 30))):
        batch = [worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096, tag=tag) for tag in range(8)]
        worker.send(0, batch)
        frame = worker.links[0].receive_frame(DEADLINE_S)
        assert len(frame) == 8 * 64


@pytest.mark.parametrize("offset", [1 << 30, (1 << 64) - 4096])
def test_a_request_outside_the_device_fails(tmp_path: Path, offset: int) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, NullBackend(NullOptions(size=1 << 30))):
        assert worker.do(Op.DISCARD, offset, 4096) == -22


def test_places_writes_in_slots_that_come_back(tmp_path: Path) -> None:
    options = NullOptions(size=1 << 30, placement="backend", segment=128 << 10)
    with FakeWorker(tmp_path, placement="backend") as worker, serving(worker, NullBackend(options)):
        for _ in range(5):
            assert worker.write(0, b"y" * 4096) == 4096


def test_a_third_write_waits_for_one_of_two_slots(tmp_path: Path) -> None:
    options = NullOptions(size=1 << 30, placement="backend", segment=128 << 10)
    with FakeWorker(tmp_path, placement="backend") as worker, serving(worker, NullBackend(options)):
        (first, aborted), (second, request) = worker.place(0, 4096, tag=0), worker.place(0, 4096, tag=1)
        assert first.buffer != second.buffer
        third = worker.describe(Kind.PLACE, Op.WRITE, 0, 4096, tag=2)
        worker.send(0, [third])
        assert worker.is_silent()
        worker.release(aborted)
        assert worker.answer_of(third).buffer == first.buffer
        fourth = worker.describe(Kind.PLACE, Op.WRITE, 0, 4096, tag=0)
        worker.send(0, [fourth])
        assert worker.fill(second, request, b"w" * 4096, release=False) == 4096
        assert worker.is_silent(), "an answered write's slot is lent until RELEASE"
        worker.release(request)
        worker.release(request)
        assert worker.answer_of(fourth).buffer == second.buffer
        worker.send(0, [worker.describe(Kind.PLACE, Op.WRITE, 0, 4096, tag=1)])
        assert worker.is_silent(), "and comes back once"


def test_a_fence_takes_back_lent_slots_and_drops_waiting_requests(tmp_path: Path) -> None:
    options = NullOptions(size=1 << 30, placement="backend", segment=64 << 10)
    with FakeWorker(tmp_path, placement="backend") as worker, serving(worker, NullBackend(options)):
        assert worker.fill(*worker.place(0, 4096, tag=0), b"a" * 4096, release=False) == 4096
        worker.send(0, [worker.describe(Kind.PLACE, Op.WRITE, 0, 4096, tag=1)])
        worker.fence()
        fenced = worker.receive()
        assert (fenced.kind, fenced.epoch) == (Kind.FENCED, 2)
        assert worker.write(0, b"z" * 4096, tag=1) == 4096
        assert worker.is_silent()


def test_an_old_epoch_is_never_executed(tmp_path: Path) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, NullBackend(NullOptions(size=1 << 30))):
        old: Descriptor = worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096)
        worker.fence()
        assert worker.receive().kind == Kind.FENCED
        worker.send(0, [old])
        assert worker.is_silent()
