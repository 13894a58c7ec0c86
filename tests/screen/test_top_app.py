"""The application in textual's own pilot: keys, sizes, the mouse, and readings that the test hands over."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from textual.geometry import Region
from textual.pilot import Pilot

from ublkpool.daemon.cli.top.app import _STYLES, Handed, Said, Top, style_of
from ublkpool.daemon.cli.top.reading import Reading
from ublkpool.daemon.cli.top.session import Session
from ublkpool.daemon.errors import DaemonError, DaemonUnreachable

GOLDEN = Path(__file__).parent / "golden"
DEADLINE_S = 120
Play = Callable[[Top, "Pilot[Exception]"], Awaitable[None]]


def play(app: Top, steps: Play, width: int = 80, height: int = 24) -> Exception | None:
    """Run the application while the steps are played; what it returned."""

    async def run() -> None:
        async with app.run_test(size=(width, height)) as pilot:
            await steps(app, pilot)

    asyncio.run(run())
    return app.return_value


def shown(app: Top) -> list[str]:
    """The lines that the widget gives textual."""
    return [app.view.render_line(y).text.rstrip() for y in range(app.size.height)]


async def hand(app: Top, pilot: "Pilot[Exception]", *found: Reading | Exception) -> None:
    """Hand these over, as the pump does."""
    for each in found:
        app.post_message(Handed(each))
    await pilot.pause(0)


def test_the_80x24_screen_is_the_golden_text(minute: Sequence[Reading]) -> None:
    app = Top(Session("/run/ublkpool"))

    async def steps(app: Top, pilot: "Pilot[Exception]") -> None:
        await hand(app, pilot, *minute)
        assert shown(app) == (GOLDEN / "devices-80x24.txt").read_text().splitlines()
        await pilot.press("enter")
        assert shown(app) == (GOLDEN / "device-80x24.txt").read_text().splitlines()
        await pilot.press("escape", "question_mark")
        assert shown(app) == (GOLDEN / "help-80x24.txt").read_text().splitlines()

    play(app, steps)


def test_keys_have_the_names_that_the_session_knows(session: Session) -> None:
    app = Top(session)

    async def steps(app: Top, pilot: "Pilot[Exception]") -> None:
        await pilot.press("slash", "d", "b", "minus", "enter")
        assert session.names == ["db-data", "db-journal"] and not session.is_editing
        await pilot.press("escape", "greater_than_sign", "greater_than_sign")
        assert session.filter == "" and session.devices_table.sort_by == "R/S"
        await pilot.press("less_than_sign", "R", "R", "space", "plus", "minus", "minus", "right")
        assert session.is_paused and session.interval_s == 0.5 and session.devices_table.is_reversed
        assert session.devices_table.first == 1
        await pilot.press("pagedown", "end", "home", "down", "j", "up", "left", "f1")
        assert shown(app)[0].startswith(" help") and session.devices_table.window.at(session.names) == 1
        await pilot.press("backspace")
        assert shown(app)[0].startswith(" ublkpool")

    play(app, steps)


def test_each_choice_is_told_to_the_pump(session: Session) -> None:
    told: list[tuple[float, bool, str]] = []
    app = Top(session, lambda now: told.append((now.interval_s, now.is_paused, now.looked_at)))

    async def steps(app: Top, pilot: "Pilot[Exception]") -> None:
        await pilot.press("p", "plus", "enter", "escape")

    play(app, steps)
    assert told == [(1.0, True, ""), (2.0, True, ""), (2.0, True, "db-data"), (2.0, True, "")]


def test_each_reading_is_taken_once_it_is_shown(minute: Sequence[Reading]) -> None:
    taken: list[str] = []
    app = Top(Session("/run/ublkpool"), on_taken=lambda: taken.append(shown(app)[0]))

    async def steps(app: Top, pilot: "Pilot[Exception]") -> None:
        await hand(app, pilot, minute[0], minute[1], DaemonUnreachable("gone"))

    play(app, steps)
    assert [line.split("  ")[-2].strip() for line in taken] == [
        "18:57:34 UTC",
        "18:57:35 UTC",
        "18:57:35 UTC",
    ]


def test_the_daemons_absence_is_told_until_it_is_back(session: Session, minute: Sequence[Reading]) -> None:
    app = Top(session)

    async def steps(app: Top, pilot: "Pilot[Exception]") -> None:
        await hand(app, pilot, DaemonUnreachable("none is running"))
        assert shown(app)[4] == " waiting for the daemon: none is running"
        await pilot.press("p")
        assert shown(app)[4] == " PAUSED, p goes on  none is running"
        await pilot.press("p")
        app.post_message(Said("the daemon, process 7, is stopped (SIGSTOP); waiting"))
        await pilot.pause(0)
        assert shown(app)[4] == " the daemon, process 7, is stopped (SIGSTOP); waiting"
        await hand(app, pilot, minute[-1])
        assert shown(app)[4].split()[:2] == ["daemon", "supervisor"]

    play(app, steps)


@pytest.mark.parametrize("failure", [ZeroDivisionError(), DaemonError("the answer makes no sense")])
def test_another_failure_ends_it_and_is_its_result(session: Session, failure: Exception) -> None:
    async def steps(app: Top, pilot: "Pilot[Exception]") -> None:
        await hand(app, pilot, failure)

    assert play(Top(session), steps) is failure


@pytest.mark.parametrize("key", ["q", "ctrl+c", "ctrl+q"])
def test_a_key_ends_it(session: Session, key: str) -> None:
    app = Top(session)

    async def steps(app: Top, pilot: "Pilot[Exception]") -> None:
        await pilot.press(key)

    assert play(app, steps) is None and session.has_ended and app.return_code == 0


def test_another_size_is_another_screen(session: Session) -> None:
    app = Top(session)

    async def resize(pilot: "Pilot[Exception]", width: int, height: int) -> None:
        await pilot.resize_terminal(width, height)
        async with asyncio.timeout(DEADLINE_S):
            while app.view.size != (width, height) or len(app.view.board.lines) != height:
                await asyncio.sleep(0.005)

    async def steps(app: Top, pilot: "Pilot[Exception]") -> None:
        await resize(pilot, 132, 40)
        assert shown(app) == (GOLDEN / "devices-132x40.txt").read_text().splitlines()
        for size in ((1, 1), (7, 3), (300, 90), (80, 24)):
            await resize(pilot, *size)
        assert shown(app) == (GOLDEN / "devices-80x24.txt").read_text().splitlines()

    play(app, steps)


def test_the_mouse_chooses_sorts_and_scrolls(session: Session) -> None:
    app = Top(session)

    async def steps(app: Top, pilot: "Pilot[Exception]") -> None:
        heading = shown(app)[5]
        await pilot.click(offset=(heading.index("P99") + 1, 5))
        assert session.devices_table.sort_by == "P99"
        await pilot.click(offset=(3, 8))
        assert session.devices_table.window.at(session.names) == 2
        app.view.on_mouse_scroll_down()
        assert session.devices_table.window.at(session.names) == 5
        app.view.on_mouse_scroll_up()
        assert session.devices_table.window.at(session.names) == 2

    play(app, steps)


def test_text_that_is_pasted_is_the_filters(session: Session) -> None:
    from textual.events import Paste

    app = Top(session)

    async def steps(app: Top, pilot: "Pilot[Exception]") -> None:
        app.post_message(Paste("q"))
        await pilot.press("slash")
        app.post_message(Paste("vm-\n"))
        await pilot.pause(0)

    play(app, steps)
    assert session.filter == "vm-" and not session.has_ended


def test_only_lines_that_changed_are_drawn(
    session: Session, minute: Sequence[Reading], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Top(session)

    async def steps(app: Top, pilot: "Pilot[Exception]") -> None:
        drawn: list[int] = []
        refresh = app.view.refresh

        def counted(*regions: Region) -> None:
            drawn.extend(each.y for each in regions)
            refresh(*regions)

        monkeypatch.setattr(app.view, "refresh", counted)
        app.view.show()
        assert drawn == []
        await pilot.press("down")
        assert drawn == [6, 7]

    play(app, steps)


def test_without_colour_every_line_is_the_same(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    app = Top(session)

    async def steps(app: Top, pilot: "Pilot[Exception]") -> None:
        assert app.no_color
        assert shown(app) == (GOLDEN / "devices-80x24.txt").read_text().splitlines()

    play(app, steps)


def test_each_style_has_a_colour() -> None:
    for name in _STYLES:
        assert style_of(name).bgcolor is not None
    assert style_of("chosen bad").bold and style_of("chosen bad").bgcolor == style_of("chosen").bgcolor
