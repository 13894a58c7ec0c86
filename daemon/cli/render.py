"""The tables of `list` and `stats`: aligned columns, no value ever cut.

Owns the columns and their wording.  On a terminal, columns that do not fit on the line follow below their row.
"""

import os
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from ublkpool.bufpool.sizes import format_size
from ublkpool.daemon.latency import quantile
from ublkpool.daemon.status import DeviceStats, DeviceStatus, Histogram, OpCounts, QueueStats, Setting

OPS = OpCounts.__struct_fields__


_GAP = "  "
_INDENT = "    "
_WIDTH_FALLBACK, _HEIGHT_FALLBACK = 80, 24


class Table(NamedTuple):
    """Headers and rows of equal length; the first `keys` columns identify a row."""

    headers: tuple[str, ...]
    rows: list[tuple[str, ...]]
    keys: int = 1


def print_table(table: Table, out: TextIO | None = None) -> None:
    """Write the table to `out` (default stdout)."""
    out = out if out is not None else sys.stdout
    out.write(plain_text(table, terminal_size(out)[0] if out.isatty() else None))


def plain_text(table: Table, width: int | None = None) -> str:
    """The table as aligned lines, with two spaces between columns.

    With a `width` in characters, columns beyond it follow below each row as `header: value`, except the keys.  A word
    longer than a line stays whole.
    """
    lines = [table.headers, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.headers))]
    beside = len(widths) if width is None else _how_many_fit(widths, width, table.keys)
    text = []
    for line in lines:
        text.append(_GAP.join(map(str.ljust, line[:beside], widths)).rstrip())
        if width is not None and line is not table.headers:
            text += _below(table.headers[beside:], line[beside:], width)
    return "".join(f"{line}\n" for line in text)


def _how_many_fit(widths: Sequence[int], width: int, at_least: int) -> int:
    count = len(widths)
    while count > at_least and sum(widths[:count]) + len(_GAP) * (count - 1) > width:
        count -= 1
    return count


def _below(headers: Sequence[str], values: Sequence[str], width: int) -> list[str]:
    """The values as `header: value`, several on a line if they fit; a longer value has lines of its own."""
    lines: list[str] = []
    for header, value in zip(headers, values, strict=True):
        text = f"{header.lower()}: {value}"
        if value and lines and len(lines[-1]) + len(_GAP) + len(text) <= width:
            lines[-1] += _GAP + text
        elif value:
            lines += textwrap.wrap(
                text,
                width,
                initial_indent=_INDENT,
                subsequent_indent=2 * _INDENT,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return lines


def terminal_size(out: TextIO) -> tuple[int, int]:
    """Columns and lines, each at least 1: those in COLUMNS and LINES, else the terminal's."""
    try:
        columns, lines = os.get_terminal_size(out.fileno())
    except OSError:
        columns, lines = 0, 0
    return (
        _number("COLUMNS") or columns or _WIDTH_FALLBACK,
        _number("LINES") or lines or _HEIGHT_FALLBACK,
    )


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0


def format_duration(seconds: float | None) -> str:
    """Three digits and a unit: `0.45us`, `85.3us`, `1.20ms`, `12.5s`; empty for None."""
    if seconds is None:
        return ""
    for unit, unit_s in (("us", 1e-6), ("ms", 1e-3)):
        # What would be rounded to 1000 is written in the next unit.
        if seconds / unit_s < 999.5:
            return three_digits(seconds / unit_s) + unit
    return three_digits(seconds) + "s"


def format_rate(per_s: float) -> str:
    """Whole requests a second, and a decimal where that would show few as none."""
    return f"{per_s:.1f}" if 0 < per_s < 9.95 else f"{per_s:.0f}"


def three_digits(value: float) -> str:
    """The value, from 0 to 999, in three digits at most."""
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def device_table(devices: Sequence[DeviceStatus]) -> Table:
    """The table of `list`."""
    headers: tuple[str, ...] = (
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
    rows = [_device_row(device) for device in devices]
    if any(device.differs for device in devices):
        headers = (*headers, "DIFFERS")
        rows = [(*row, ", ".join(each.differs)) for row, each in zip(rows, devices, strict=True)]
    return Table(headers, rows, keys=3)


def settings_table(settings: Sequence[Setting]) -> Table:
    """The table of `set NAME`; CONFIG is empty for a value that is the config's."""
    rows: list[tuple[str, ...]] = [
        (each.key, each.value, "" if each.value == each.configured else each.configured, each.applies)
        for each in settings
    ]
    return Table(("KEY", "VALUE", "CONFIG", "A CHANGE APPLIES"), rows)


def stats_tables(devices: Sequence[DeviceStats]) -> list[Table]:
    """The tables of `stats`: one row per queue, then one row per pool; no latency where none was counted."""
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
        *("READ P50", "READ P99", "WRITE P50", "WRITE P99"),
    )
    queues = [_queue_row(device.name, queue) for device in devices for queue in device.queues]
    pool_headers = (
        "NAME",
        "MEMORY",
        "POOL",
        "HUGE PAGES",
        "BUFFERS",
        "FREE",
        "LENT",
        "WAITING",
        "LENT EVER",
        "RETURNED EVER",
        "REASON",
    )
    return [Table(headers, queues, keys=2), Table(pool_headers, [_pool_row(device) for device in devices])]


def _device_row(device: DeviceStatus) -> tuple[str, ...]:
    return (
        device.name,
        device.path or "-",
        device.state,
        _device_size(device),
        str(device.queues),
        str(device.depth),
        device.shown_placement,
        device.recovery,
        _backend(device),
        device.reason,
    )


def _device_size(device: DeviceStatus) -> str:
    shown = _size(device.size_bytes)
    overruled = device.config_size_bytes
    return shown if overruled is None else f"{shown} (config: {_size(overruled)})"


def _backend(device: DeviceStatus) -> str:
    if device.answers == "worker":
        return "its workers"
    backend = device.backend
    kind = backend.kind or "none"
    if device.isolation == "none":
        return f"{kind} (in its workers)"
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
        *_quantiles(queue.latency.read),
        *_quantiles(queue.latency.write),
    )


def _quantiles(histogram: Histogram) -> tuple[str, str]:
    return (format_duration(quantile(histogram, 0.5)), format_duration(quantile(histogram, 0.99)))


def _op(request_count: int, size_bytes: int) -> str:
    return f"{request_count} ({_size(size_bytes)})" if size_bytes else str(request_count)


def _pool_row(device: DeviceStats) -> tuple[str, ...]:
    pool = device.pool
    counts = (pool.buffer_count, pool.free_count, pool.lent_count, pool.waiting_count)
    sizes = (
        _size(device.memory_bytes),
        _size(pool.size_bytes),
        _size(pool.huge_bytes) if pool.huge_bytes else "-",
    )
    return (device.name, *sizes, *map(str, (*counts, pool.lent_total, pool.returned_total)), device.reason)


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_size(size_bytes)
