"""The page of all devices.  Pure."""

import shlex

from ublkpool import RUN_DIR_DEFAULT
from ublkpool.daemon.cli.render import format_duration
from ublkpool.daemon.cli.top.columns import Placed
from ublkpool.daemon.cli.top.lines import NOTICE_LINES, Head, beside, notice, title
from ublkpool.daemon.cli.top.model import Device
from ublkpool.daemon.cli.top.session import Session
from ublkpool.daemon.cli.top.table_view import draw, place_columns
from ublkpool.daemon.cli.top.text import (
    Line,
    fit,
    short_rate,
    short_seconds,
    short_share,
    short_size,
    spark,
    wrap,
)

NAME_MIN, NAME_MAX = 10, 24
KEYS = (
    ("Enter", "device"),
    ("/", "filter"),
    ("< >", "sort"),
    ("p", "pause"),
    ("+ -", "interval"),
    ("e", "events"),
    ("r", "reverse"),
)
_LABEL = 8


def head(session: Session, width: int) -> Head:
    """What all devices do together."""
    daemon = session.model.daemon
    version = f" {daemon.version}" if daemon else ""
    at = width // 2
    reads, writes = _traffic(session, "read", at), _traffic(session, "write", at)
    lines = [
        title(session, [(f"ublkpool{version}", "title"), (f"  {session.run_dir}", "title")], width),
        beside(reads, _counts(session), at),
        beside(writes, _pools(session), at),
        beside(_slowest(session, at), _active(session), at),
    ]
    return Head(lines, notice(session, _processes(session), width))


def columns(session: Session, width: int) -> Placed[Device]:
    """The columns that fit; names get the width that they need."""
    longest = max((len(each) for each in session.names), default=0)
    return place_columns(session.devices_table, width, min(NAME_MAX, max(NAME_MIN, longest)))


def body(session: Session, width: int, height: int) -> list[Line]:
    """The columns' names and the devices on the screen."""
    placed = columns(session, width)
    lines = draw(session, session.devices_table, placed, session.devices, width, height)
    if not session.devices:
        lines += wrap([(_why_empty(session), "dim")], width, NOTICE_LINES)
    return lines


def _why_empty(session: Session) -> str:
    if session.model.devices:
        return "  no device has this in its name"
    if session.model.trouble:
        return ""
    is_usual = session.run_dir == str(RUN_DIR_DEFAULT)
    where = "" if is_usual else f" --run-dir {shlex.quote(session.run_dir)}"
    return f"  no devices; add one with: ublkpool add NAME --size 1G --backend memory{where}"


def _traffic(session: Session, op: str, width: int) -> Line:
    found = [each.rates for each in session.model.devices.values() if each.rates is not None]
    requests = sum(getattr(each.requests_per_s, op) for each in found)
    size = sum(getattr(each.bytes_per_s, op) for each in found)
    history = [getattr(each, f"{op}s") for each in session.model.totals]
    return [
        (fit(f" {op}s", _LABEL), "head"),
        (fit(f"{short_rate(requests)}/s", 8, is_right=True), op),
        (fit(f"{short_size(size)}/s", 10, is_right=True) + " ", op),
        (spark(history, width - _LABEL - 21, session.marks.ramp), op),
    ]


def _counts(session: Session) -> Line:
    devices = session.model.devices.values()
    bad = sum(not each.serves for each in devices)
    recoveries = sum(each.recoveries for each in devices)
    return [
        ("devices ", "head"),
        (f"{len(devices)}, ", ""),
        (f"{bad} with trouble" if bad else "all serve", "bad" if bad else "good"),
        (f", recoveries {recoveries}", "warn" if recoveries else "dim"),
    ]


def _pools(session: Session) -> Line:
    pools = [each.stats.pool for each in session.model.devices.values()]
    buffers, lent = sum(each.buffer_count for each in pools), sum(each.lent_count for each in pools)
    waiting = sum(each.waiting_count for each in pools)
    share = short_share(lent / buffers if buffers else 0.0)
    return [
        ("pools   ", "head"),
        (f"{short_size(sum(each.size_bytes for each in pools))}, {share} lent, ", ""),
        (f"{waiting} wait" if waiting else "none waits", "warn" if waiting else "dim"),
    ]


def _slowest(session: Session, width: int) -> Line:
    slow = [(each.p99_s, each.name) for each in session.model.devices.values() if each.p99_s is not None]
    history = [each.p99_s for each in session.model.totals]
    p99_s, name = max(slow, default=(None, ""))
    shown = fit(format_duration(p99_s) or "-", 8, is_right=True)
    return [
        (fit(" P99", _LABEL), "head"),
        (shown, "graph"),
        (fit(name, 10, session.marks.cut, is_right=True) + " ", "name"),
        (spark(history, width - _LABEL - 21, session.marks.ramp), "graph"),
    ]


def _active(session: Session) -> Line:
    devices = session.model.devices.values()
    active = sum(each.in_flight for each in devices)
    oldest_s = max((each.oldest_s for each in devices), default=0.0)
    return [("active  ", "head"), (f"{active} requests, oldest {short_seconds(oldest_s)}", "")]


def _processes(session: Session) -> Line:
    found = []
    for owner, share in session.model.shares.items():
        if not owner.device:
            used = "" if share.cpu is None else f"{short_share(share.cpu)} "
            found.append(f"{owner.role} {used}{short_size(share.resident_bytes)}")
    return [(fit(" daemon", _LABEL), "head"), (", ".join(found), "dim")] if found else []
