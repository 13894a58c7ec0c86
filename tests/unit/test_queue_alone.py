"""A queue core that answers requests itself, without a backend: a fake driver, no kernel."""

import errno
import os

import pytest

from support.fakes.driver import SECTOR_BYTES, Request
from support.fakes.queue_desk import Desk, data
from ublkpool.bufpool.wire import Op
from ublkpool.ublk import _native
from ublkpool.ublk.mappings import map_zeros
from ublkpool.ublk.queue import Attention
from ublkpool.workers.tag_state import State


def alone(**plan: int) -> Desk:
    return Desk(connected=False, answers_itself=True, **plan)


def test_a_write_is_copied_into_scratch_and_discarded() -> None:
    desk = alone()
    request = desk.write(0, 8, data(7, 4))
    assert desk.state(0) is State.COPYING and request.result is None
    desk.copy(0)
    desk.driver.consume()
    assert request.result == len(request.data)
    assert desk.side.scratch.view[: len(request.data)] == request.data
    stats = desk.side.statistics
    assert (stats.commits, stats.kernel_write_bytes, stats.in_flight) == (1, len(request.data), 0)


def test_zeros_are_read_whatever_was_written() -> None:
    desk = alone()
    desk.write(0, 0, data(7, 4))
    desk.copy(0)
    request = desk.read(1, 0, 4)
    desk.driver.consume()
    assert request.received == bytes(4 * SECTOR_BYTES) and request.result == 4 * SECTOR_BYTES


@pytest.mark.parametrize("op", [Op.FLUSH, Op.DISCARD, Op.WRITE_ZEROES])
def test_operations_without_data_are_answered_at_once(op: Op) -> None:
    desk = alone()
    request = desk.other(2, op)
    desk.driver.consume()
    assert request.result == 0


def test_it_asks_neither_broker_nor_backend() -> None:
    desk = alone()
    for tag in range(3):
        desk.write(tag, tag, data(tag))
        desk.copy(tag)
    assert desk.queue.output() == b"" and desk.queue.attention() == Attention(0)
    assert desk.side.statistics.lent_total == 0


def test_a_write_that_the_kernel_copied_in_part_fails_without_a_backend() -> None:
    desk = alone()
    request = desk.write(0, 0, data(7, 4))
    desk.copy(0, sectors=1)
    desk.driver.consume()
    assert request.result == -errno.EIO and desk.side.statistics.short_copies == 1


def test_a_request_that_the_driver_sends_again_is_answered_once() -> None:
    desk = alone()
    desk.write(0, 0, data(1))
    desk.copy(0, sectors=0)
    desk.driver.deliver(0, desk.driver.again.popleft())
    assert desk.state(0) is State.COPYING and desk.side.statistics.requeues == 1
    desk.copy(0)
    desk.driver.consume()
    assert [each.result for each in desk.driver.finished] == [SECTOR_BYTES]


def test_a_stopping_device_answers_all_requests() -> None:
    desk = alone()
    desk.queue.give_up()
    requests: list[Request] = [desk.write(0, 0, data(1)), desk.read(1, 0)]
    desk.copy(0)
    desk.driver.consume()
    assert [each.result for each in requests] == [SECTOR_BYTES] * 2


def test_an_unknown_operation_is_refused() -> None:
    desk = alone()
    request = desk.other(0, 9)
    desk.driver.consume()
    assert request.result == -errno.EOPNOTSUPP


def test_without_need_get_data_a_queue_cannot_answer_itself() -> None:
    with pytest.raises(ValueError, match="the core does not accept"):
        alone(need_get_data=False)


def test_the_zeros_for_reads_are_read_only() -> None:
    zeros = _native.ffi.buffer(map_zeros(8192))
    assert bytes(zeros) == bytes(8192)
    end_r, end_w = os.pipe()
    os.write(end_w, b"x")
    with pytest.raises(OSError, match="Bad address"):
        os.readv(end_r, [zeros])
    os.close(end_r)
    os.close(end_w)
