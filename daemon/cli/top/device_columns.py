"""The columns of devices, in the order in which a wider screen shows more of them.  Pure."""

import re
from collections.abc import Callable
from typing import Any

from ublkpool.daemon.cli.render import format_duration
from ublkpool.daemon.cli.top.columns import Column
from ublkpool.daemon.cli.top.model import Device
from ublkpool.daemon.cli.top.text import (
    SHORT,
    Marks,
    Span,
    short_rate,
    short_seconds,
    short_share,
    short_size,
    spark,
)
from ublkpool.daemon.rates import DeviceRates

_GOOD, _BAD = frozenset({"live"}), frozenset({"failed"})
_NUMBERS = re.compile(r"(\d+)")
Value = Callable[[Device], Any]


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """The order of names in which vol2 comes before vol10."""
    return tuple((int(each), "") if each.isdecimal() else (-1, each) for each in _NUMBERS.split(name) if each)


def state(device: Device) -> str:
    """The state in a word, with a mark if the device does not serve although the word alone might not say so."""
    word = device.status.drain or device.status.state
    return (
        f"{word} !" if device.reason and word not in ("failed", "recovering", "draining", "drained") else word
    )


def state_style(device: Device) -> str:
    """Good, warn or bad."""
    word = device.status.state
    if word in _BAD:
        return "bad"
    return "good" if word in _GOOD and not device.reason and not device.status.drain else "warn"


def backend(device: Device) -> str:
    """The backend's kind, in parentheses if it is not attached."""
    status = device.status
    if status.answers == "worker":
        return "workers"
    kind = status.backend.kind or "none"
    return kind if status.backend.attached or not status.backend.kind else f"({kind})"


def pool_share(device: Device) -> float | None:
    """The share of the pool's buffers that is lent to requests."""
    pool = device.stats.pool
    return pool.lent_count / pool.buffer_count if pool.buffer_count else None


def _rate(read: Callable[[DeviceRates], float]) -> Value:
    return lambda device: None if device.rates is None else read(device.rates)


def _shown(value: Value, show: Callable[[Any], str], style: str = "") -> Callable[[Device, int, Marks], Span]:
    def cell(device: Device, width: int, marks: Marks) -> Span:
        found = value(device)
        return ("" if found is None else show(found), style if found else "dim")

    return cell


def _number(
    name: str,
    value: Value,
    show: Callable[[Any], str] = str,
    style: str = "",
    width: int = SHORT,
    letter: str = "",
) -> Column[Device]:
    return Column(name, max(width, len(name)), _shown(value, show, style), value, letter=letter)


def _duration(name: str, value: Value, letter: str = "") -> Column[Device]:
    return _number(name, value, format_duration, letter=letter)


def _others(rates: DeviceRates) -> float:
    return rates.requests_per_s.flush + rates.requests_per_s.discard + rates.requests_per_s.write_zeroes


def _quantile(kind: str, field: str) -> Value:
    return lambda device: (
        None if device.rates is None else getattr(getattr(device.rates.latency, kind), field)
    )


def name_column(letter: str = "N") -> Column[Device]:
    """The device's name."""
    return Column(
        "NAME",
        10,
        lambda device, width, marks: (device.name, "name"),
        lambda device: natural(device.name),
        False,
        True,
        letter,
    )


def _history(device: Device, width: int, marks: Marks) -> Span:
    return spark([each.p99_s for each in device.history], width, marks.ramp), "graph"


RATES: tuple[Column[Device], ...] = (
    _number("R/S", _rate(lambda rates: rates.requests_per_s.read), short_rate, "read", letter="R"),
    _number("W/S", _rate(lambda rates: rates.requests_per_s.write), short_rate, "write", letter="W"),
    _number("R B/S", _rate(lambda rates: rates.bytes_per_s.read), short_size, "read"),
    _number("W B/S", _rate(lambda rates: rates.bytes_per_s.write), short_size, "write"),
    _duration("P50", lambda device: device.p50_s),
    _duration("P99", lambda device: device.p99_s, "L"),
)
RARE: tuple[Column[Device], ...] = (
    _number("OTHER/S", _rate(_others), short_rate),
    _number("ERR/S", _rate(lambda rates: rates.errors_per_s), short_rate, "bad", letter="E"),
    _duration("R P50", _quantile("read", "p50_s")),
    _duration("R P99", _quantile("read", "p99_s")),
    _duration("W P50", _quantile("write", "p50_s")),
    _duration("W P99", _quantile("write", "p99_s")),
)
ACTIVE = _number("ACTIVE", lambda device: device.in_flight, letter="A")
OLDEST = _number("OLDEST", lambda device: device.oldest_s, short_seconds)
HELD = _number("HELD", lambda device: sum(each.buffers_held for each in device.stats.queues), width=5)
WAITED = _number("WAITED", lambda device: sum(each.buffers_waited for each in device.stats.queues))
WAIT_P99 = _duration("WAIT P99", _quantile("buffer_wait", "p99_s"))
BACKEND_P99 = _duration("BACK P99", _quantile("backend", "p99_s"))

DEVICE_COLUMNS: tuple[Column[Device], ...] = (
    name_column(),
    Column(
        "STATE",
        10,
        lambda device, width, marks: (state(device), state_style(device)),
        state,
        False,
        True,
        letter="S",
    ),
    *RATES,
    Column("TREND", 8, _history, lambda device: device.p99_s, is_right=True, grows_to=40),
    ACTIVE,
    _number("SIZE", lambda device: device.status.size_bytes, short_size),
    _number("QUEUES", lambda device: device.status.queues),
    Column(
        "BACKEND",
        8,
        lambda device, width, marks: (backend(device), "" if device.status.backend.attached else "dim"),
        backend,
        False,
        True,
    ),
    _number("PID", lambda device: device.status.backend.pid, width=7),
    _number("POOL", pool_share, short_share, width=4),
    HELD,
    WAITED,
    _number("RECOV", lambda device: device.recoveries, style="warn", width=5),
    OLDEST,
    *RARE,
    WAIT_P99,
    BACKEND_P99,
)
