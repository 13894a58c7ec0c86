"""What the user has chosen, and what each key changes in it.  Pure: the screen and the pump look here."""

from collections.abc import Callable, Sequence
from typing import Generic, Literal, TypeVar

from ublkpool.daemon.cli.top.columns import Column, sort
from ublkpool.daemon.cli.top.device_columns import DEVICE_COLUMNS
from ublkpool.daemon.cli.top.model import Device, Model, Queue
from ublkpool.daemon.cli.top.queue_columns import QUEUE_COLUMNS
from ublkpool.daemon.cli.top.reading import Reading
from ublkpool.daemon.cli.top.text import UNICODE, Marks
from ublkpool.daemon.cli.top.window import Scroll, Window
from ublkpool.daemon.events.event import Event

T = TypeVar("T")
Page = Literal["devices", "device", "events", "help"]
INTERVALS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
FILTER_MAX = 64
ENDS = ("q", "ctrl+c", "ctrl+q")
"""The keys that end it."""


class Table(Generic[T]):
    """How the user sees one table: its order, the columns that have scrolled away, the chosen row."""

    def __init__(self, columns: Sequence[Column[T]], sort_by: str) -> None:
        self.columns = columns
        self.sort_by = sort_by
        self.is_reversed = False
        self.first = 0
        self.first_max = 0
        """The most columns that may scroll away; the board knows the width."""
        self.window = Window()

    def sorted(self, items: Sequence[T]) -> list[T]:
        """The items in the chosen order."""
        return sort(items, self._column(), self.is_reversed)

    def sort_next(self, step: int) -> None:
        """Sort by a column further right or left."""
        names = [each.name for each in self.columns]
        self.sort_with(names[(names.index(self.sort_by) + step) % len(names)])

    def sort_with(self, name: str) -> None:
        """Sort by this column; the other way round if it is the one already."""
        self.is_reversed = name == self.sort_by and not self.is_reversed
        self.sort_by = name

    def sort_by_letter(self, letter: str) -> bool:
        """Sort by the column with this letter; False if there is none."""
        for each in self.columns:
            if each.letter and each.letter == letter:
                self.sort_with(each.name)
                return True
        return False

    def shift(self, by: int) -> None:
        """Scroll one column away, or back."""
        self.first = min(self.first_max, max(0, self.first + by))

    def _column(self) -> Column[T]:
        return next(each for each in self.columns if each.name == self.sort_by)


class Session:
    """The model and the user's view of it."""

    def __init__(
        self, run_dir: str, interval_s: float = 1.0, marks: Marks = UNICODE, sort_by: str = "NAME"
    ) -> None:
        self.run_dir = run_dir
        self.marks = marks
        self.model = Model()
        self.interval_s = interval_s
        self.is_paused = False
        self.has_ended = False
        self.page: Page = "devices"
        self.looked_at = ""
        """The device that is looked at in depth."""
        self.filter = ""
        self.is_editing = False
        """Whether keys are letters of the filter."""
        self.devices_table = Table(DEVICE_COLUMNS, sort_by)
        self.queues_table = Table(QUEUE_COLUMNS, "QUEUE")
        self.event_scroll, self.help_scroll = Scroll(follows=True), Scroll(follows=False)
        self.body_height = 1
        """Lines that the board had for rows."""
        self.body_count = 0
        """Lines that there were to show in them."""
        self.devices: list[Device] = []
        """Those that the filter leaves, in order."""
        self.names: list[str] = []
        self.queues: list[Queue] = []
        self.queue_names: list[str] = []
        self._back: list[Page] = []

    def take(self, reading: Reading) -> None:
        """Show this reading."""
        self.model.take(reading)
        self._arrange()

    def lose(self, trouble: str, has_failed: bool = False) -> None:
        """Say why there is no reading; `has_failed`: the next one is asked for at the end of an interval."""
        self.model.lose(trouble, has_failed)

    @property
    def table(self) -> Table[Device] | Table[Queue]:
        """The table on this page."""
        return self.queues_table if self.page == "device" else self.devices_table

    @property
    def keys(self) -> list[str]:
        """The keys of the table's rows."""
        return self.queue_names if self.page == "device" else self.names

    def events(self) -> list[Event]:
        """Those that the page shows: of the device that is looked at, or of the devices that the filter leaves."""
        found = self.model.events
        if self.looked_at:
            return [each for each in found if each.device == self.looked_at]
        return [each for each in found if self._is_wanted(each.device)]

    def press(self, key: str, character: str | None) -> None:
        """Do what the key means; `character` is what it prints, if anything."""
        if self.is_editing and key != "ctrl+c":
            self._edit(key, character)
        elif key in ENDS:
            self.has_ended = True
        elif key in _MOVES:
            _MOVES[key](self)
        elif (action := _ACTIONS.get(character or key) or _ACTIONS.get(key)) is not None:
            action(self)
        elif self.page in ("devices", "device"):
            self.table.sort_by_letter(character or "")
        self._arrange()

    def paste(self, text: str) -> None:
        """Add the text to the filter that is being edited."""
        if self.is_editing:
            for char in text:
                self._edit(char, char)
            self._arrange()

    def click(self, index: int) -> None:
        """Choose the row with this index on the page; a chosen device is opened."""
        if self.page not in ("devices", "device"):
            return
        was = self.table.window.at(self.keys)
        self.table.window.choose(index, self.keys)
        if index == was:
            self.open()
        self._arrange()

    def sort_with(self, name: str) -> None:
        """Sort the page's table by this column."""
        self.table.sort_with(name)
        self._arrange()

    def move(self, by: int) -> None:
        """Move the choice, or the text, so many lines down."""
        if self.page == "events":
            self.event_scroll.move(by, self.body_count, self.body_height)
        elif self.page == "help":
            self.help_scroll.move(by, self.body_count, self.body_height)
        else:
            self.table.window.move(by, self.keys)

    def turn_page(self, by: int) -> None:
        """Move by as many lines as the page has."""
        self.move(by * max(1, self.body_height - 1))

    def open(self) -> None:
        """Look at the chosen device in depth."""
        if self.page == "devices" and self.names:
            self.is_editing = False
            self.looked_at = self.names[self.devices_table.window.at(self.names)]
            self.queues_table.window = Window()
            self._go("device")

    def open_events(self) -> None:
        """Show the events, or leave them."""
        self._toggle("events")

    def open_help(self) -> None:
        """Show the help, or leave it."""
        self._toggle("help")

    def back(self) -> None:
        """Leave the page; on the first one, leave the filter."""
        if not self._back:
            self.filter = ""
            return
        self.page = self._back.pop()
        if self.page == "devices":
            self.looked_at = ""

    def edit_filter(self) -> None:
        """Let the next keys be the filter's letters."""
        if self.page in ("devices", "events") and not self.looked_at:
            self.is_editing = True

    def pause(self) -> None:
        """Stop the screen, or go on."""
        self.is_paused = not self.is_paused

    def change_interval(self, step: int) -> None:
        """Take the next longer or shorter interval."""
        others = [each for each in INTERVALS_S if (each - self.interval_s) * step > 0]
        if others:
            self.interval_s = min(others) if step > 0 else max(others)

    def shift(self, by: int) -> None:
        """Show columns further right or left."""
        if self.page in ("devices", "device"):
            self.table.shift(by)

    def sort_next(self, step: int) -> None:
        """Sort by another column."""
        if self.page in ("devices", "device"):
            self.table.sort_next(step)

    def reverse(self) -> None:
        """Turn the order round."""
        if self.page in ("devices", "device"):
            self.table.is_reversed = not self.table.is_reversed

    def _toggle(self, page: Page) -> None:
        if self.page == page:
            self.back()
        else:
            self._go(page)

    def _go(self, page: Page) -> None:
        if page in self._back:
            del self._back[self._back.index(page) :]
        self._back.append(self.page)
        self.page = page
        self.help_scroll.top = 0

    def _edit(self, key: str, character: str | None) -> None:
        match key:
            case "enter":
                self.is_editing = False
            case "escape":
                self.is_editing, self.filter = False, ""
            case "backspace":
                self.filter = self.filter[:-1]
            case "ctrl+u":
                self.filter = ""
            case "up" | "down":
                self.move(-1 if key == "up" else 1)
            case _:
                if character and character.isprintable():
                    self.filter = (self.filter + character)[:FILTER_MAX]

    def _arrange(self) -> None:
        """Put in order what the pages show."""
        found = [each for each in self.model.devices.values() if self._is_wanted(each.name)]
        self.devices = self.devices_table.sorted(found)
        self.names = [each.name for each in self.devices]
        self.queues = self.queues_table.sorted(self.model.queues(self.looked_at)) if self.looked_at else []
        self.queue_names = [str(each.device.stats.queues[0].queue) for each in self.queues]

    def _is_wanted(self, name: str) -> bool:
        return self.filter.casefold() in name.casefold()


_MOVES: dict[str, Callable[[Session], None]] = {
    "up": lambda session: session.move(-1),
    "down": lambda session: session.move(1),
    "pageup": lambda session: session.turn_page(-1),
    "pagedown": lambda session: session.turn_page(1),
    "home": lambda session: session.move(-(1 << 30)),
    "end": lambda session: session.move(1 << 30),
    "left": lambda session: session.shift(-1),
    "right": lambda session: session.shift(1),
    "enter": Session.open,
    "escape": Session.back,
    "backspace": Session.back,
}
_ACTIONS: dict[str, Callable[[Session], None]] = {
    "k": _MOVES["up"],
    "j": _MOVES["down"],
    "g": _MOVES["home"],
    "G": _MOVES["end"],
    "/": Session.edit_filter,
    "<": lambda session: session.sort_next(-1),
    ">": lambda session: session.sort_next(1),
    "r": Session.reverse,
    "p": Session.pause,
    " ": Session.pause,
    "+": lambda session: session.change_interval(1),
    "-": lambda session: session.change_interval(-1),
    "e": Session.open_events,
    "?": Session.open_help,
    "h": Session.open_help,
    "f1": Session.open_help,
}
