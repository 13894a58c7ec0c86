"""The whole screen: the golden texts, every size, what it says of trouble, and a thousand devices."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from support.fakes.top_readings import LOADS, REFUSED, reading
from support.screen import IS_WRITING, press
from support.screen import text_of as lines
from ublkpool.daemon.cli.top import device_columns
from ublkpool.daemon.cli.top.board import draw
from ublkpool.daemon.cli.top.columns import Column
from ublkpool.daemon.cli.top.model import Device
from ublkpool.daemon.cli.top.reading import Reading
from ublkpool.daemon.cli.top.session import Session
from ublkpool.daemon.cli.top.text import ASCII, Marks, Span, cells

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("name", "keys", "width", "height"),
    [
        ("devices-80x24", (), 80, 24),
        ("devices-132x40", (), 132, 40),
        ("device-80x24", ("enter",), 80, 24),
        ("events-80x24", ("e",), 80, 24),
        ("help-80x24", ("?",), 80, 24),
    ],
)
def test_the_screen_is_the_golden_text(
    session: Session, name: str, keys: Sequence[str], width: int, height: int
) -> None:
    shown = "".join(f"{line}\n" for line in lines(press(session, *keys), width, height))
    path = GOLDEN / f"{name}.txt"
    if IS_WRITING:
        path.write_text(shown)
    assert shown == path.read_text(), "if the change is meant: make pictures"


@given(
    width=st.integers(1, 240),
    height=st.integers(1, 70),
    keys=st.lists(
        st.sampled_from(["enter", "e", "?", "down", "right", "end", "/", "p", "escape", "pagedown", "L"]),
        max_size=6,
    ),
    trouble=st.sampled_from(["", "x" * 300]),
)
def test_every_size_gets_its_exact_lines(width: int, height: int, keys: list[str], trouble: str) -> None:
    session = Session("/run/ublkpool")
    for each in _few():
        session.take(each)
    session.lose(trouble)
    for key in keys:
        session.press(key, key if len(key) == 1 else None)
        found = draw(session, width, height).lines
        assert len(found) == height
        assert all(sum(cells(text) for text, _ in line) == width for line in found)


def _few() -> list[Reading]:
    if not _FEW:
        _FEW.extend(reading(3))
    return _FEW


_FEW: list[Reading] = []


def test_nothing_at_all_is_drawn_as_well() -> None:
    assert len(lines(Session("/run/ublkpool"))) == 24
    session = Session("/run/ublkpool")
    session.take(reading(1, loads=())[0])
    assert any("ublkpool add" in line for line in lines(session))
    assert "--run-dir" not in "\n".join(lines(session))
    session = Session("/srv/other daemon")
    session.take(reading(1, loads=())[0])
    text = " ".join(line.strip() for line in lines(session))
    assert "ublkpool add NAME --size 1G --backend memory --run-dir '/srv/other daemon'" in text


def test_devices_that_recover_without_a_reason_are_counted_as_well(minute: Sequence[Reading]) -> None:
    session = Session("/run/ublkpool")
    session.take(reading(1, LOADS[:2])[0])
    assert "devices 2, all serve" in lines(session)[1]
    session.take(reading(1, [LOADS[0], LOADS[1]._replace(state="recovering")])[0])
    assert "devices 2, 1 with trouble" in lines(session)[1]


def test_an_absent_daemon_is_told_and_what_it_told_last_stays(
    session: Session, minute: Sequence[Reading]
) -> None:
    for keys in ((), ("enter",), ("escape", "e")):
        press(session, *keys)
        session.lose("waiting for the daemon: none is running")
        text = "\n".join(lines(session))
        assert "waiting for the daemon: none is running" in text and "18:58:35 UTC" in text
        session.take(minute[-1])
        assert "waiting for the daemon" not in "\n".join(lines(session))


@pytest.mark.parametrize("height", [6, 10, 16, 24])
def test_trouble_is_told_on_a_small_screen_too(session: Session, height: int) -> None:
    session.lose("the daemon is away")
    assert any("the daemon is away" in line for line in lines(session, 60, height))


AWAY = (
    "/run/ublkpool/admin.sock: gone, but a daemon (process 4711) listens there: its run directory was emptied or "
    "replaced; kill 4711, then start the daemon again"
)


@pytest.mark.parametrize("height", [6, 10, 24])
def test_a_long_trouble_is_told_to_its_end_with_the_way_out(session: Session, height: int) -> None:
    session.lose(AWAY, has_failed=True)
    for keys in ((), ("enter",), ("escape", "e")):
        press(session, *keys)
        assert f" waiting for the daemon: {AWAY}" in "".join(lines(session, 80, height))


def test_a_long_reason_is_told_to_its_end_with_the_way_out(session: Session) -> None:
    press(session, *["down"] * 7, "enter")
    assert session.looked_at == "vm-old" and f" {REFUSED}" in "".join(lines(session))


def test_a_pause_and_the_filter_are_told_beside_trouble(session: Session) -> None:
    session.lose("none is running", has_failed=True)
    press(session, "/", "v")
    text = "".join(lines(session)[4:6])
    assert text.startswith(" filter: v_") and "waiting for the daemon: none is running" in text
    press(session, "enter", "p")
    text = "".join(lines(session)[4:6])
    assert text.startswith(" PAUSED, p goes on  filter: v  4 of 10 devices  none is running")
    assert "waiting" not in text, "a paused screen asks for nothing"


def test_a_device_in_depth_says_why_it_does_not_serve(session: Session) -> None:
    press(session, "end", "enter")
    text = "\n".join(lines(session))
    assert "wiki  failed" in text and " queue 0: its worker ended: killed by SIGKILL" in text


def test_a_device_in_depth_has_limits_cut_offs_and_settings_that_differ(session: Session) -> None:
    press(session, "down", "down", "enter")
    assert "recoveries 1, replays 17, cut-offs 1 (silence 1)" in "\n".join(lines(session, 120))
    press(session, "escape", *["down"] * 3, "enter")
    text = "\n".join(lines(session, 100, 30))
    assert "vm-alpine" in text and "limits   500 requests/s, burst 1 s" in text
    device = session.model.devices["vm-alpine"]
    status = structs.replace(device.status, differs=("iops_max=500 (config: 0)",), bytes_per_s_max=10 << 20)
    session.model.devices["vm-alpine"] = device._replace(status=status)
    text = "\n".join(lines(session, 100, 30))
    assert "differs  iops_max=500 (config: 0)" in text and "500 requests/s, 10.0M/s, burst 1 s" in text


def test_text_of_a_backend_does_nothing_to_the_terminal(session: Session, minute: Sequence[Reading]) -> None:
    statuses = [
        structs.replace(
            each,
            reason="\x1b[2J\nboo",
            backend=structs.replace(each.backend, kind="\x1b]0;x\x07\u202e", attached=True),
        )
        for each in minute[-1].statuses
    ]
    session.take(minute[-1]._replace(statuses=statuses))
    for keys in ((), ("enter",)):
        press(session, *keys)
        assert all(line.isprintable() for line in lines(session, 200, 40))


def test_a_terminal_with_ascii_alone_gets_ascii_alone(minute: Sequence[Reading]) -> None:
    session = Session("/run/ublkpool", marks=ASCII)
    for each in minute:
        session.take(each)
    for keys in ((), ("enter",), ("e",), ("?",)):
        press(session, *keys)
        assert all(line.isascii() for line in lines(session))


def test_a_taller_screen_shows_more_rows_and_events(session: Session) -> None:
    small, tall = lines(session, 80, 20), lines(session, 80, 60)
    assert sum("vm-" in line for line in tall) > sum("vm-" in line for line in small)
    assert tall.index(" EVENTS") > small.index(" EVENTS")


def test_of_a_thousand_devices_only_those_on_the_screen_are_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Rendered:
        count: int = 0

    rendered = Rendered()

    def counted(column: Column[Device]) -> Column[Device]:
        def cell(device: Device, width: int, marks: Marks) -> Span:
            rendered.count += 1
            return column.cell(device, width, marks)

        return column._replace(cell=cell)

    loads = [LOADS[1]._replace(name=f"vol{number}", reads=number % 7, writes=0) for number in range(1000)]
    session = Session("/run/ublkpool")
    session.devices_table.columns = tuple(map(counted, device_columns.DEVICE_COLUMNS))
    for each in reading(2, loads):
        session.take(each)
    rendered.count = 0
    shown = lines(session)
    rows = sum(" vol" in line[:5] or line.startswith(">vol") for line in shown)
    assert 0 < rows < 24 and rendered.count == rows * 10
    press(session, "end")
    assert any(line.startswith(">vol999") for line in lines(session))
