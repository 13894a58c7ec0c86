"""Events: their codes are documented, their numbers rise, and a flood costs no other device's events."""

import ast
import logging
import random
import re
from pathlib import Path

import msgspec
import pytest

from ublkpool.daemon.events import flood
from ublkpool.daemon.events.event import (
    LINE_BYTES_MAX,
    TEXT_MAX,
    Event,
    decode,
    encode,
    make_event,
    render,
    render_json,
)
from ublkpool.daemon.events.flood import EVENTS_MAX, WINDOW_S, FloodLimit
from ublkpool.daemon.events.history import History, Kept
from ublkpool.daemon.events.kinds import BackendDied, DaemonStarted, DeviceFailed, TakeoverEnded, kinds
from ublkpool.daemon.events.tell import LOOKED_AT_MAX, Events

ROOT = Path(__file__).parents[2]
CODES = (
    *("daemon-started", "daemon-stopped", "machine-goes-down"),
    *(
        "device-added",
        "device-live",
        "device-not-started",
        "device-failed",
        "device-deleted",
        "device-adopted",
    ),
    *("settings-changed", "device-drained", "device-resumed", "device-resized", "store-rebound"),
    *("backend-attached", "backend-replaced", "backend-detached", "backend-died", "backend-refused"),
    *("backend-cut-off", "request-late", "requests-fail"),
    *("worker-died", "workers-replaced", "recovery-begun", "recovery-ended", "broker-replaced"),
    *("takeover-ended", "command-hung", "events-lost", "events-suppressed"),
)
"""Scripts rely on them: a code may be added here, and none is taken away."""
DIED = BackendDied(kind="file", pid=7, was_cut_off=False)
MINUTES = 120
BYTES_MAX = 64 << 10
_log = logging.getLogger("ublkpool.device")


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def told(events: Events, seq: int = 0) -> list[Event]:
    return [event for line in events.after(seq, most=10**6).lines if (event := decode(line.rstrip()))]


def test_no_code_was_renamed() -> None:
    assert set(CODES) <= set(kinds())
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)+", code) for code in kinds())


def test_every_code_is_documented_with_its_fields() -> None:
    rows = re.findall(
        r"^\| `([a-z-]+)` \| ([^|]+) \| ([^|]*)\| ([^|]+) \|$",
        (ROOT / "docs/EVENTS.md").read_text(),
        re.MULTILINE,
    )
    documented = {code: set(re.findall(r"`([a-z_]+)`", fields)) for code, _, fields, _ in rows}
    assert documented == {code: set(kind.__struct_fields__) for code, kind in kinds().items()}


def test_every_kind_is_told_somewhere() -> None:
    made = {
        node.func.id
        for path in (ROOT / "daemon").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert {kind.__name__ for kind in kinds().values()} <= made


def test_an_event_survives_its_line_with_typed_details() -> None:
    event = make_event(5, 1795707865.1234, "vol0", DIED, "backend file has ended", None)
    assert event.time == "2026-11-26T15:44:25.123Z" and event.severity == "warning"
    again = decode(encode(event).rstrip())
    assert again == event and again.typed() == DIED


def test_an_event_of_another_version_can_be_read() -> None:
    known = msgspec.to_builtins(make_event(5, 0.0, "", DIED, "x", None))
    for changed in ({"code": "volume-grown"}, {"details": {"kind": 7}}, {"further": [1]}):
        event = decode(msgspec.json.encode(known | changed))
        assert event is not None and event.seq == 5
        assert render(event) and render_json(event)
    newer = decode(msgspec.json.encode(known | {"code": "volume-grown"}))
    assert newer is not None and newer.typed() is None


def test_a_text_is_bounded_and_moves_no_cursor() -> None:
    nasty = "\x1b[2J\n\u202e" + "é" * 10_000
    event = make_event(1, 0.0, "vol0", DeviceFailed(reason=nasty), nasty, "error")
    assert len(event.text) == TEXT_MAX == len(event.details["reason"])
    assert render(event).isprintable() and render_json(event).isascii() and render_json(event).isprintable()
    names = tuple(f"{number:064}" for number in range(50))
    widest = TakeoverEnded(
        adopted=names,
        recovered=names,
        failed=names,
        adopted_count=50,
        recovered_count=50,
        failed_count=50,
        seconds=1.0,
    )
    assert len(encode(make_event(1, 0.0, "", widest, "\\" * 1000, None))) < LINE_BYTES_MAX


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"null", b'{"seq":1}', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_event_is_passed_over(line: bytes) -> None:
    assert decode(line) is None


def test_a_damaged_number_does_not_end_the_numbers() -> None:
    known = msgspec.to_builtins(make_event(5, 0.0, "", DIED, "x", None))
    for seq in (-1, 1 << 63, (1 << 64) - 1, 1.5, "7"):
        assert decode(msgspec.json.encode(known | {"seq": seq})) is None
    last = decode(msgspec.json.encode(known | {"seq": 1 << 62}))
    assert last is not None
    events = Events(earlier=[last])
    events.record(DIED, "gone")
    assert len(events.after(last.seq).lines) == 1


def test_one_call_logs_a_line_and_records_an_event(caplog: pytest.LogCaptureFixture) -> None:
    events = Events()
    with caplog.at_level(logging.INFO, "ublkpool"):
        logging.getLogger("ublkpool").propagate = True
        events.of("vol0").tell(_log, DIED, "backend file is gone", severity="info")
        events.of("vol0").tell(_log, DIED, "backend cut off", place="vol0 queue 1")
        events.record(DaemonStarted(version="1", pid=1, after_death=False), "only recorded")
    lines = [(each.levelname, each.getMessage()) for each in caplog.records]
    assert lines == [("INFO", "vol0: backend file is gone"), ("WARNING", "vol0 queue 1: backend cut off")]
    assert [(each.device, each.severity, each.text) for each in told(events)] == [
        ("vol0", "info", "backend file is gone"),
        ("vol0", "warning", "backend cut off"),
        ("", "info", "only recorded"),
    ]


def test_a_log_level_takes_no_event_away() -> None:
    quiet = logging.getLogger("ublkpool.test-events")
    quiet.setLevel(logging.CRITICAL)
    events = Events()
    events.tell(quiet, DIED, "gone", device="vol0")
    assert len(told(events)) == 1


@pytest.mark.parametrize("wall_s", [1795707865.0, 5.0], ids=["", "clock set back"])
def test_numbers_rise_over_restarts_and_over_a_clock_that_is_set_back(wall_s: float) -> None:
    first = Events(wall=lambda: 1795707865.0)
    for _ in range(10):
        first.record(DIED, "gone", device="vol0")
    before = told(first)
    second = Events(earlier=before, wall=lambda: wall_s)
    second.record(DIED, "gone", device="vol0")
    seqs = [each.seq for each in told(second)]
    assert seqs == sorted(set(seqs)) and len(seqs) == 11


def test_numbers_rise_although_no_event_reached_a_file() -> None:
    clock = Clock()
    first = Events(wall=clock)
    for _ in range(EVENTS_MAX):
        first.record(DIED, "gone")
    last = told(first)[-1].seq
    clock.now_s += 1.0
    second = Events(wall=clock)
    second.record(DIED, "gone")
    assert told(second)[0].seq > last


def test_a_device_that_flaps_pushes_out_no_other_devices_events() -> None:
    clock = Clock()
    events = Events(bytes_max=64 << 10, clock=clock, wall=clock)
    events.record(DeviceFailed(reason="the one that matters"), "it failed", device="vol1")
    # A thousand times a minute for two hours.
    for _ in range(MINUTES):
        for _ in range(1000):
            events.record(DIED, "gone", device="vol0")
        clock.now_s += 60.0
    kept = told(events)
    assert kept[0].text == "it failed" and events.gone_seq == 0
    flapping = [each for each in kept if each.code == "backend-died"]
    assert EVENTS_MAX <= len(flapping) <= EVENTS_MAX + MINUTES * 60 / WINDOW_S
    counted = sum(each.details["count"] for each in kept if each.code == "events-suppressed")
    clock.now_s += WINDOW_S
    events.note_suppressed()
    counted = sum(each.details["count"] for each in told(events) if each.code == "events-suppressed")
    assert counted + len(flapping) == MINUTES * 1000


def test_after_a_quiet_window_a_flood_is_recorded_anew() -> None:
    clock = Clock()
    limit = FloodLimit(clock)
    assert [limit.admits("code", "vol0") for _ in range(30)].count(True) == EVENTS_MAX
    assert limit.next_s() == clock.now_s + WINDOW_S and limit.due() == []
    clock.now_s += WINDOW_S
    assert limit.due() == [flood.Suppressed("code", "vol0", 10)] and limit.next_s() is None
    assert [limit.admits("code", "vol0") for _ in range(3)] == [True, False, False]
    clock.now_s += WINDOW_S
    assert limit.due() == [flood.Suppressed("code", "vol0", 2)]
    clock.now_s += WINDOW_S
    assert limit.due() == []
    assert limit.admits("code", "vol0") and limit.admits("code", "vol0")


def test_an_incident_of_a_thousand_devices_is_recorded_whole() -> None:
    limit = FloodLimit(Clock())
    for code in kinds():
        assert all(limit.admits(code, f"vol{number}") for number in range(1000)), code


def test_windows_end_in_the_order_of_their_begin_and_each_tells_its_own_count() -> None:
    clock, rng = Clock(), random.Random(4)
    limit = FloodLimit(clock)
    told_of, counted, admitted = dict.fromkeys("abc", 0), dict.fromkeys("abc", 0), dict.fromkeys("abc", 0)
    for _ in range(20_000):
        clock.now_s += rng.choice((0.0, 1.0, 40.0))
        for each in limit.due():
            assert each.left_out > 0
            told_of[each.device] += each.left_out
        device = rng.choice("abc")
        counted[device] += 1
        admitted[device] += limit.admits("code", device)
        assert (limit.next_s() or clock.now_s) >= clock.now_s
    clock.now_s += WINDOW_S
    for each in limit.due():
        told_of[each.device] += each.left_out
    assert counted == {each: told_of[each] + admitted[each] for each in "abc"} and all(told_of.values())


def test_many_names_grow_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flood, "KEYS_MAX", 1024)
    clock = Clock()
    limit = FloodLimit(clock)
    admitted = sum(limit.admits("device-added", f"vol{number}") for number in range(10_000))
    assert 1024 <= admitted <= 1024 + EVENTS_MAX
    assert len(limit._windows) <= 1025
    clock.now_s += WINDOW_S
    limit.due()
    assert len(limit._windows) <= 1


def test_what_waits_for_the_file_is_bounded_and_what_is_lost_is_counted() -> None:
    clock = Clock()
    events = Events(BYTES_MAX, clock=clock)
    for number in range(200):
        events.record(DIED, "gone", device=f"vol{number}")
    waiting = events.unwritten()
    size = sum(len(each.line) for each in waiting)
    assert BYTES_MAX // 2 - 1000 < size <= BYTES_MAX // 2 and waiting[0].device == "vol0"
    assert events.take_lost() == 200 - len(waiting) and events.take_lost() == 0
    assert len(told(events)) == 200, "what is shown does not depend on the file"
    events.written(waiting[9].seq)
    assert events.unwritten()[0] is waiting[10]
    for _ in range(3):
        events.record(DIED, "gone", device="later")
    assert len(events.unwritten()) == len(waiting) - 7 and events.take_lost() == 0


def test_the_history_is_bounded_in_bytes_and_says_what_is_gone() -> None:
    rng = random.Random(1)
    history = History(10_000)
    for seq in range(1, 2000):
        text = "x" * rng.randrange(400)
        history.append(Kept(make_event(seq, 0.0, "vol0", DIED, text, None)))
        assert history.size_bytes <= 10_000
    kept = [each.seq for each in history.after(0, 2000)]
    assert kept == list(range(history.gone_seq + 1, 2000)) and len(kept) > 10
    assert [each.seq for each in history.after(1990, 100)] == list(range(1991, 2000))
    assert [each.seq for each in history.after(1990, 3)] == [1991, 1992, 1993]
    assert history.after(1999, 3) == []
    assert history.last_seq == 1999


def test_a_slice_has_the_asked_devices_and_goes_on_after_the_last_event_looked_at() -> None:
    clock = Clock()
    events = Events(clock=clock, wall=clock)
    for number in range(30):
        clock.now_s += 1.0
        events.record(DIED, f"event {number}", device=f"vol{number % 3}")
    found, at = [], 0
    while True:
        part = events.after(at, frozenset({"vol1"}), most=4)
        if not part.lines:
            break
        assert len(part.lines) <= 4
        found += [event.text for line in part.lines if (event := decode(line.rstrip()))]
        at = part.last_seq
    assert found == [f"event {number}" for number in range(1, 30, 3)]
    assert at <= told(events)[-1].seq
    late = told(events)[20].time
    assert len(events.after(0, since=late).lines) == 10


def test_a_slice_looks_at_a_bounded_number_of_events_and_says_how_far() -> None:
    events = Events()
    count = 3 * LOOKED_AT_MAX // EVENTS_MAX * EVENTS_MAX
    for number in range(count):
        events.record(DIED, "gone", device=f"vol{number // EVENTS_MAX}")
    last = f"vol{count // EVENTS_MAX - 1}"
    seqs = [each.seq for each in told(events)]
    first = events.after(0, frozenset({last}))
    assert first.lines == [] and first.last_seq == seqs[LOOKED_AT_MAX - 1]
    found, before, at = 0, -1, 0
    while at != before:
        before = at
        lines, at = events.after(at, frozenset({last}), most=7)
        found += len(lines)
    assert found == EVENTS_MAX and at == seqs[-1]


def test_what_is_asked_for_in_slices_looks_at_each_event_once(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events()
    for number in range(4000):
        events.record(DIED, "gone", device=f"vol{number}")
    looked = 0
    kept_after = History.after

    def counted(history: History, seq: int, most: int) -> list[Kept]:
        nonlocal looked
        found = kept_after(history, seq, most)
        looked += len(found)
        return found

    monkeypatch.setattr(History, "after", counted)
    before, at, lines = -1, 0, 0
    while at != before:
        before = at
        part = events.after(at)
        at, lines = part.last_seq, lines + len(part.lines)
    assert lines == 4000 and looked <= 4000 // 64 * LOOKED_AT_MAX + 2 * LOOKED_AT_MAX
