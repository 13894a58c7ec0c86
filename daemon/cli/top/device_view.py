"""The page of one device in depth.  Pure."""

from collections.abc import Iterator

from ublkpool.daemon.cli.render import format_duration
from ublkpool.daemon.cli.top.columns import Placed
from ublkpool.daemon.cli.top.device_columns import backend, pool_share, state, state_style
from ublkpool.daemon.cli.top.lines import Head, notice, title
from ublkpool.daemon.cli.top.model import KINDS, Device, Queue
from ublkpool.daemon.cli.top.session import Session
from ublkpool.daemon.cli.top.table_view import draw, place_columns
from ublkpool.daemon.cli.top.text import (
    Line,
    bar,
    fit,
    short_rate,
    short_seconds,
    short_share,
    short_size,
    spark,
)
from ublkpool.daemon.latency import quantile
from ublkpool.daemon.metrics.usage import Owner
from ublkpool.daemon.rates import DeviceRates
from ublkpool.daemon.status import DeviceStatus

KEYS = (
    ("Esc", "devices"),
    ("< >", "sort"),
    ("p", "pause"),
    ("+ -", "interval"),
    ("e", "events"),
    ("r", "reverse"),
)
SHARES = (0.5, 0.9, 0.99, 0.999)
_LABEL = 10
_CELL = 9
_NAMES = {"buffer_wait": "waits", "backend": "backend"}
"""What the kinds of durations are called, where not by their own names."""


def head(session: Session, width: int) -> Head:
    """Everything about the device but its queues."""
    device = session.model.devices.get(session.looked_at)
    if device is None:
        return Head(
            [title(session, [(session.looked_at, "title")], width)],
            notice(session, [(" no such device now", "alarm")], width),
        )
    status = device.status
    lead: Line = [
        (device.name, "title"),
        (f"  {state(device)}", f"title {state_style(device)}"),
        (f"  {status.path or '-'}  {_size(status.size_bytes)}", "title"),
    ]
    lines = [
        title(session, lead, width),
        *_facts(session, device, width),
        *_latencies(session, device, width),
    ]
    return Head(lines, notice(session, [(f" {device.reason}", "alarm")] if device.reason else [], width))


def columns(session: Session, width: int) -> Placed[Queue]:
    """The columns that fit."""
    return place_columns(session.queues_table, width, session.queues_table.columns[0].width)


def body(session: Session, width: int, height: int) -> list[Line]:
    """The columns' names and the queues on the screen."""
    return draw(session, session.queues_table, columns(session, width), session.queues, width, height)


def _size(size_bytes: int | None) -> str:
    return "size unknown" if size_bytes is None else short_size(size_bytes)


def _labelled(label: str, *parts: tuple[str, str]) -> Line:
    return [(fit(f" {label}", _LABEL), "head"), *parts]


def _facts(session: Session, device: Device, width: int) -> Iterator[Line]:
    status = device.status
    placement = status.shown_placement
    shape = f"{status.queues} of {status.depth} requests, placement {placement}, recovery {status.recovery}"
    yield _labelled("queues", (f"{shape}, epoch {status.epoch}", ""))
    yield _labelled("backend", *_backend(session, device))
    yield _labelled("pool", *_pool(session, device, width))
    yield _labelled("limits", (_limits(status), "" if status.iops_max or status.bytes_per_s_max else "dim"))
    yield _labelled("oldest", *_oldest(device))
    if status.differs:
        yield _labelled("differs", (", ".join(status.differs), "warn"))


def _backend(session: Session, device: Device) -> Iterator[tuple[str, str]]:
    status = device.status
    yield backend(device), "" if status.backend.attached or status.answers == "worker" else "warn"
    if status.backend.pid is not None:
        yield f", pid {status.backend.pid}", ""
    share = session.model.shares.get(Owner("backend", device.name))
    if share is not None:
        used = "" if share.cpu is None else f", {short_share(share.cpu)} of a CPU"
        yield f"{used}, {short_size(share.resident_bytes)} of memory", ""


def _pool(session: Session, device: Device, width: int) -> Iterator[tuple[str, str]]:
    pool, share = device.stats.pool, pool_share(device)
    if share is None:
        yield "none yet", "dim"
        return
    stock = pool.buffer_count - pool.free_count - pool.lent_count
    yield f"{short_size(pool.size_bytes)} ", ""
    yield bar(share, max(8, width // 8), session.marks), "graph"
    yield f" {pool.lent_count} lent, {stock} in stock, {pool.free_count} free", ""
    yield f", {pool.waiting_count} wait", "warn" if pool.waiting_count else "dim"


def _limits(status: DeviceStatus) -> str:
    found = [f"{short_rate(status.iops_max)} requests/s"] if status.iops_max else []
    found += [f"{short_size(status.bytes_per_s_max)}/s"] if status.bytes_per_s_max else []
    return ", ".join((*found, f"burst {status.burst_s:g} s")) if found else "none"


def _oldest(device: Device) -> Iterator[tuple[str, str]]:
    yield (
        f"{short_seconds(device.oldest_s)}, {device.in_flight} active",
        "warn" if device.oldest_s >= 5 else "",
    )
    cut_offs = sum(device.stats.cut_offs.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in device.stats.cut_offs.items())
    errors = sum(queue.errors for queue in device.stats.queues)
    so_far = (
        ("recoveries", device.recoveries, ""),
        ("replays", device.counter("replays"), ""),
        ("cut-offs", cut_offs, f" ({reasons})" if reasons else ""),
        ("errors", errors, ""),
    )
    yield "   so far ", "head"
    for number, (what, count, more) in enumerate(so_far):
        yield f"{', ' if number else ''}{what} {count}{more}", "warn" if count else "dim"


def _latencies(session: Session, device: Device, width: int) -> Iterator[Line]:
    names = [f"P{share * 100:g}" for share in SHARES]
    line = "".join(fit(each, _CELL, is_right=True) for each in ("/S", "B/S", *names))
    graph = width - _LABEL - len(line) - 2
    yield [(" " * _LABEL + line + ("  P99 TREND" if graph > 8 else ""), "head")]
    for number, kind in enumerate(KINDS):
        cells = _durations(device, kind)
        history = [each.kinds[number] for each in device.history]
        yield [
            (fit(f" {_NAMES.get(kind, kind)}", _LABEL), "head"),
            (
                "".join(fit(each, _CELL, is_right=True) for each in cells),
                kind if kind in ("read", "write") else "",
            ),
            ("  " + spark(history, graph, session.marks.ramp), "graph"),
        ]


def _durations(device: Device, kind: str) -> tuple[str, ...]:
    if device.rates is None or device.latencies is None:
        return ("",) * (2 + len(SHARES))
    histogram = getattr(device.latencies, kind)
    durations = (format_duration(quantile(histogram, share)) for share in SHARES)
    return (*_flow(device.rates, kind), *durations)


def _flow(rates: DeviceRates, kind: str) -> tuple[str, str]:
    requests, size = rates.requests_per_s, rates.bytes_per_s
    match kind:
        case "read":
            return short_rate(requests.read), short_size(size.read)
        case "write":
            return short_rate(requests.write), short_size(size.write)
        case "other":
            others = requests.flush + requests.discard + requests.write_zeroes
            return short_rate(others), short_size(size.discard + size.write_zeroes)
        case _:
            count = getattr(rates.latency, kind).count
            return short_rate(count / rates.interval_s), ""
