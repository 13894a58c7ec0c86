"""Status for people: tables, with rich on a terminal, plain aligned text elsewhere.

Owns columns and wording.  Must not import rich unless it writes to a terminal.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from ublkpool.bufpool.sizes import format_size
from ublkpool.daemon.status import DeviceStats, DeviceStatus, OpCounts, QueueStats

OPS = OpCounts.__struct_fields__


class Table(NamedTuple):
    """Headers and rows; every row is as long as the headers."""

    headers: tuple[str, ...]
    rows: list[tuple[str, ...]]


def print_table(table: Table, out: TextIO | None = None) -> None:
    """Write the table to `out` (stdout)."""
    out = out if out is not None else sys.stdout
    if out.isatty():
        _print_rich(table, out)
    else:
        out.write(plain_text(table))


def plain_text(table: Table) -> str:
    """The table as aligned lines, two spaces between columns."""
    lines = [table.headers, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.headers))]
    padded = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return "".join(f"{line}\n" for line in padded)


def device_table(devices: Sequence[DeviceStatus]) -> Table:
    """What `list` shows."""
    headers = (
        "NAME",
        "PATH",
        "STATE",
        "SIZE",
        "QUEUES",
        "DEPTH",
        "PLACEMENT",
        "RECOVERY",
        "BACKEND",
        "REASON",
    )
    return Table(headers, [_device_row(device) for device in devices])


def stats_tables(devices: Sequence[DeviceStats]) -> list[Table]:
    """What `stats` shows: what the queues did, and where the buffers are."""
    headers = (
        "NAME",
        "QUEUE",
        *(op.upper() for op in OPS),
        "ERRORS",
        "IN FLIGHT",
        "BUFFERS",
        "KERNEL COPIED",
        "WE COPIED",
        "IN PLACE",
    )
    queues = [_queue_row(device.name, queue) for device in devices for queue in device.queues]
    pool_headers = (
        "NAME",
        "POOL",
        "HUGE PAGES",
        "BUFFERS",
        "FREE",
        "LENT",
        "WAITING",
        "LENT EVER",
        "RETURNED EVER",
    )
    return [Table(headers, queues), Table(pool_headers, [_pool_row(device) for device in devices])]


def _device_row(device: DeviceStatus) -> tuple[str, ...]:
    return (
        device.name,
        device.path or "-",
        device.state,
        _size(device.size_bytes),
        str(device.queues),
        str(device.depth),
        device.placement if device.need_get_data else "at fetch",
        device.recovery,
        _backend(device),
        device.reason,
    )


def _backend(device: DeviceStatus) -> str:
    if device.answers == "worker":
        return "its workers"
    backend = device.backend
    kind = backend.kind or "none"
    who = f"{kind} (pid {backend.pid})" if backend.pid is not None else kind
    return who if backend.attached or not backend.kind else f"{who}, not attached"


def _queue_row(name: str, queue: QueueStats) -> tuple[str, ...]:
    held = f"{queue.buffers_held} held, {queue.buffers_waited} waited for"
    return (
        name,
        str(queue.queue),
        *(_op(getattr(queue.requests, op), getattr(queue.bytes, op)) for op in OPS),
        str(queue.errors),
        str(queue.in_flight),
        held,
        _size(queue.copies.kernel_bytes),
        _size(queue.copies.own_bytes),
        _size(queue.copies.in_place_bytes),
    )


def _op(request_count: int, size_bytes: int) -> str:
    return f"{request_count} ({_size(size_bytes)})" if size_bytes else str(request_count)


def _pool_row(device: DeviceStats) -> tuple[str, ...]:
    pool = device.pool
    counts = (pool.buffer_count, pool.free_count, pool.lent_count, pool.waiting_count)
    sizes = (_size(pool.size_bytes), _size(pool.huge_bytes) if pool.huge_bytes else "-")
    return (device.name, *sizes, *map(str, (*counts, pool.lent_total, pool.returned_total)))


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_size(size_bytes)


def _print_rich(table: Table, out: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    shown = RichTable(*table.headers, box=None, pad_edge=False, header_style="bold")
    for row in table.rows:
        shown.add_row(*row)
    Console(file=out, markup=False, highlight=False).print(shown)
