"""The columns of one device's queues.  Pure."""

from ublkpool.daemon.cli.top.columns import Column
from ublkpool.daemon.cli.top.device_columns import (
    ACTIVE,
    BACKEND_P99,
    HELD,
    OLDEST,
    RARE,
    RATES,
    WAIT_P99,
    WAITED,
)
from ublkpool.daemon.cli.top.model import Device, Queue
from ublkpool.daemon.cli.top.text import SHORT, short_share, short_size


def _number(queue: Queue) -> int:
    return queue.device.stats.queues[0].queue


def _of_queue(column: Column[Device]) -> Column[Queue]:
    """The column of a device, for a queue, which is a device of one queue."""
    return Column(
        column.name,
        column.width,
        lambda queue, width, marks: column.cell(queue.device, width, marks),
        lambda queue: column.order(queue.device),
        letter=column.letter,
    )


QUEUE_COLUMNS: tuple[Column[Queue], ...] = (
    Column("QUEUE", 5, lambda queue, width, marks: (str(_number(queue)), "name"), _number, True, True, "N"),
    Column(
        "PID",
        7,
        lambda queue, width, marks: ("" if queue.pid is None else str(queue.pid), ""),
        lambda queue: queue.pid,
        is_ascending=True,
    ),
    *map(_of_queue, RATES),
    _of_queue(ACTIVE),
    Column(
        "CPU%",
        5,
        lambda queue, width, marks: (short_share(queue.share.cpu) if queue.share else "", ""),
        lambda queue: queue.share.cpu if queue.share else None,
    ),
    Column(
        "MEMORY",
        SHORT,
        lambda queue, width, marks: (short_size(queue.share.resident_bytes) if queue.share else "", ""),
        lambda queue: queue.share.resident_bytes if queue.share else None,
    ),
    *map(_of_queue, (BACKEND_P99, WAIT_P99, HELD, WAITED, OLDEST)),
    *map(_of_queue, RARE),
    Column(
        "ON CPU",
        SHORT,
        lambda queue, width, marks: ("" if queue.cpu is None else str(queue.cpu), ""),
        lambda queue: queue.cpu,
        is_ascending=True,
    ),
)
