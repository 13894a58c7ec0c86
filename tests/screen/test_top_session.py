"""What each key does to the session, and rows that stay chosen while the order changes."""

from collections.abc import Sequence

import pytest

from support.fakes.top_readings import LOADS
from support.screen import press, text_of
from ublkpool.daemon.cli.top.board import click, draw
from ublkpool.daemon.cli.top.reading import Reading
from ublkpool.daemon.cli.top.session import FILTER_MAX, INTERVALS_S, Session
from ublkpool.daemon.cli.top.window import Scroll, Window

NAMES = [each.name for each in LOADS]


def text(session: Session, width: int = 80, height: int = 24) -> str:
    return "\n".join(text_of(session, width, height))


def test_rows_are_sorted_by_a_letter_and_the_other_way_round_by_the_same(session: Session) -> None:
    assert session.names == NAMES
    press(session, "R")
    busiest = [each.name for each in sorted(LOADS, key=lambda each: -each.reads)][:4]
    assert session.names[:4] == busiest == ["scratch", "db-data", "vm-build", "vm-web"]
    assert press(session, "R").names[-4:] == busiest[::-1]
    assert press(session, "r").names[:4] == busiest


def test_each_column_can_be_sorted_by(session: Session) -> None:
    seen = []
    for _ in session.devices_table.columns:
        press(session, ">")
        seen.append(session.devices_table.sort_by)
        assert sorted(session.names) == sorted(NAMES)
    assert sorted(seen) == sorted(each.name for each in session.devices_table.columns)
    assert press(session, "<", ">").devices_table.sort_by == "NAME"


def test_a_device_stays_chosen_wherever_it_is_sorted_to(session: Session) -> None:
    press(session, "down", "down")
    assert session.devices_table.window.chosen == "images"
    press(session, "L")
    assert ">images" in text(session) and session.names.index("images") != 2
    press(session, "home")
    assert session.devices_table.window.at(session.names) == 0
    press(session, "N")
    assert f">{NAMES[0]} " in text(session), "until one is chosen it is the first row"


def test_the_device_that_is_chosen_is_opened_and_left(session: Session) -> None:
    press(session, "down", "enter")
    assert (session.page, session.looked_at) == ("device", "db-journal")
    assert [each.device.name for each in session.queues] == ["db-journal"]
    press(session, "escape")
    assert (session.page, session.looked_at, session.queues) == ("devices", "", [])
    assert session.devices_table.window.chosen == "db-journal"


def test_pages_are_left_in_the_order_in_which_they_were_entered(session: Session) -> None:
    press(session, "enter", "e", "?")
    assert session.page == "help"
    assert [press(session, "escape").page for _ in range(4)] == ["events", "device", "devices", "devices"]
    assert press(session, "?", "?").page == press(session, "e", "e").page == "devices"
    for _ in range(5):
        press(session, "?", "e")
    assert [press(session, "escape").page for _ in range(3)] == ["help", "devices", "devices"]


def test_events_are_those_of_the_device_that_is_looked_at(session: Session) -> None:
    assert len(session.events()) == 7
    press(session, "/", *"web", "enter")
    assert [each.device for each in session.events()] == ["vm-web", "vm-web"]
    press(session, "escape", "down", "down", "enter", "e")
    assert {each.device for each in session.events()} == {"images"} and "events of images" in text(session)


def test_a_filter_is_edited_kept_and_removed(session: Session) -> None:
    press(session, "/", *"VM-x", "backspace")
    assert session.names == ["vm-alpine", "vm-build", "vm-old", "vm-web"] and "filter: VM-_" in text(session)
    press(session, "enter")
    assert not session.is_editing and "4 of 10 devices" in text(session)
    press(session, "/", "q")
    assert session.names == [] and not session.has_ended, "letters are the filter's"
    assert "no device has this in its name" in text(session)
    assert press(session, "escape").names == NAMES
    session.press("/", "/")
    session.paste("w\x1b[31m\neb" + "x" * 200)
    assert session.filter.startswith("w[31mebx") and len(session.filter) == FILTER_MAX
    assert press(session, "ctrl+u").filter == ""
    assert press(session, "ctrl+c").has_ended


def test_a_chosen_device_that_the_filter_hides_is_chosen_again_afterwards(session: Session) -> None:
    press(session, "end", "/", *"db", "enter")
    assert ">db-data" in text(session)
    press(session, "escape")
    assert ">wiki" in text(session)


def test_intervals_get_longer_and_shorter(session: Session) -> None:
    for _ in range(20):
        press(session, "+")
    assert session.interval_s == INTERVALS_S[-1]
    for _ in range(20):
        press(session, "-")
    assert session.interval_s == INTERVALS_S[0]
    session.interval_s = 3.0
    assert press(session, "+").interval_s == 5.0 and press(session, "-").interval_s == 2.0


@pytest.mark.parametrize("key", [("p", "p"), ("space", " ")])
def test_a_pause_is_told(session: Session, key: tuple[str, str]) -> None:
    session.press(*key)
    assert session.is_paused and "PAUSED" in text(session)
    session.press(*key)
    assert not session.is_paused and "PAUSED" not in text(session)


@pytest.mark.parametrize("key", ["q", "ctrl+c", "ctrl+q"])
def test_keys_that_end_it(session: Session, key: str) -> None:
    assert press(session, key).has_ended


@pytest.mark.parametrize("key", ["x", "f7", "tab", "ctrl+x", "insert", "Z", "^"])
def test_a_key_without_a_meaning_changes_nothing(session: Session, key: str) -> None:
    before = text(session)
    assert text(press(session, key)) == before


def test_columns_scroll_and_stop_at_the_last(session: Session) -> None:
    def names() -> list[str]:
        board = draw(session, 80, 24)
        return "".join(part for part, _ in board.lines[board.body_at]).split()

    assert names()[2] == "R/S"
    press(session, *["right"] * 60)
    assert names()[:2] == ["NAME▲", "STATE"] and names()[-2:] == ["BACK", "P99"] and "R/S" not in names()
    first = session.devices_table.first
    press(session, "left")
    assert session.devices_table.first == first - 1, "no key is lost at the end"
    press(session, *["left"] * 60)
    assert names()[2] == "R/S"


def test_a_wider_screen_shows_the_columns_that_had_scrolled_away(session: Session) -> None:
    press(session, *["right"] * 60)
    assert "R/S" in text(session, 400)
    assert session.devices_table.first == 0


def test_a_click_chooses_opens_and_sorts(session: Session) -> None:
    board = draw(session, 80, 24)
    line = next(y for y, each in enumerate(board.lines) if any("vm-build" in part for part, _ in each))
    click(session, board, 3, line, 80)
    assert session.devices_table.window.chosen == "vm-build" and session.looked_at == ""
    heading = "".join(part for part, _ in board.lines[board.body_at])
    click(session, board, heading.index("P99") + 1, board.body_at, 80)
    assert session.devices_table.sort_by == "P99"
    board = draw(session, 80, 24)
    click(session, board, 3, board.body_at + 1 + session.names.index("vm-build"), 80)
    assert session.looked_at == "vm-build", "a second click opens it"
    board = draw(session, 80, 24)
    heading = "".join(part for part, _ in board.lines[board.body_at])
    click(session, board, heading.index("W/S") + 1, board.body_at, 80)
    assert session.queues_table.sort_by == "W/S"
    for y in (0, 23, 40):
        click(session, board, 3, y, 80)
    assert session.looked_at == "vm-build"


def test_a_click_that_opens_a_device_ends_the_editing_of_the_filter(session: Session) -> None:
    press(session, "/", "v")
    session.click(0)
    assert session.looked_at == "vm-alpine" and not session.is_editing and session.filter == "v"
    assert press(session, "q").has_ended, "letters are keys again"


def test_a_device_that_is_deleted_is_told_of_and_followed_again(
    session: Session, minute: Sequence[Reading]
) -> None:
    press(session, "enter")
    statuses = [each for each in minute[-1].statuses if each.name != "db-data"]
    session.take(minute[-1]._replace(statuses=statuses))
    assert "no such device now" in text(session) and session.queues == []
    press(session, "down", "up", "pagedown", "r", ">")
    session.take(minute[-1])
    assert len(session.queues) == 4 and "no such device now" not in text(session)


def test_the_events_follow_until_the_user_scrolls_back() -> None:
    scroll = Scroll(follows=True)
    assert scroll.shown(50, 10) == range(40, 50) and scroll.shown(51, 10) == range(41, 51)
    scroll.move(-1, 51, 10)
    assert not scroll.follows and scroll.shown(52, 10) == range(40, 50)
    scroll.move(1 << 30, 52, 10)
    assert scroll.follows and scroll.shown(60, 10) == range(50, 60)
    assert scroll.shown(3, 10) == range(3)


def test_a_text_does_not_follow_its_end() -> None:
    scroll = Scroll(follows=False)
    scroll.move(5, 8, 10)
    assert scroll.shown(8, 4) == range(4)


def test_a_window_holds_the_chosen_row() -> None:
    window, keys = Window(), [str(each) for each in range(100)]
    window.move(50, keys)
    assert window.chosen == "50" and 50 in window.shown(keys, 10)
    window.move(-100, keys)
    assert window.chosen is None and window.shown(keys, 10) == range(10)
    window.move(1 << 30, keys)
    assert window.shown(keys, 10) == range(90, 100)
    assert window.shown(keys[:5], 10) == range(5) and window.at([]) == -1 and window.shown([], 10) == range(0)
    window.choose(7, keys)
    window.choose(700, keys)
    assert window.chosen == "7"
