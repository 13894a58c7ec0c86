"""The screen: textual draws the board's lines and brings keys, clicks and sizes.

Owns colours, and that only lines that have changed are drawn.  All of it runs on textual's loop; the pump hands its
readings over by messages.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from ublkpool.daemon.cli.top.board import Board, click, draw
from ublkpool.daemon.cli.top.reading import Reading
from ublkpool.daemon.cli.top.session import Session
from ublkpool.daemon.cli.top.text import Line
from ublkpool.daemon.errors import DaemonUnreachable, RemoteError

WHEEL_LINES = 3
_BACKGROUND = "#101418"
_STYLES = {
    "": "#c8d0d8",
    "dim": "#7a8794",
    "head": "#8fa3b8",
    "sorted": "bold #ffd479",
    "name": "bold #e8eef4",
    "title": "bold #f2f6fa on #1f4e79",
    "key": "bold #7cc7ff",
    "good": "#7bd88f",
    "warn": "#ffb454",
    "bad": "bold #ff6b68",
    "alarm": "bold #ffffff on #a3262a",
    "read": "#6cb6ff",
    "write": "#d2a8ff",
    "graph": "#56d4bc",
    "cursor": "reverse",
    "chosen": "on #2a3f55",
}


def style_of(names: str) -> Style:
    """The style of these names, the later ones above the earlier ones."""
    found = Style.parse(f"{_STYLES['']} on {_BACKGROUND}")
    for name in names.split():
        found += Style.parse(_STYLES[name])
    return found


class BoardView(Widget, can_focus=True):
    """Draws the board; keeps its last lines, so that it draws only others."""

    DEFAULT_CSS = "BoardView { width: 100%; height: 100%; }"

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self._styles: dict[str, Style] = {}
        self.board = Board([], 0, 0)

    def show(self) -> None:
        """Draw the lines that have changed."""
        before, (width, height) = self.board, self.size
        self.board = draw(self._session, width, height)
        if len(before.lines) != len(self.board.lines):
            self.refresh()
            return
        pairs = enumerate(zip(before.lines, self.board.lines, strict=True))
        changed = [Region(0, y, width, 1) for y, (old, new) in pairs if old != new]
        if changed:
            self.refresh(*changed)

    def render_line(self, y: int) -> Strip:
        """The line as textual wants it."""
        lines = self.board.lines
        return self._strip(lines[y]) if y < len(lines) else Strip.blank(self.size.width, self._style(""))

    def on_resize(self) -> None:
        """Draw for the new size."""
        self.show()

    def on_click(self, event: events.Click) -> None:
        """Choose what is there."""
        click(self._session, self.board, event.x, event.y, self.size.width)
        self.show()

    def on_mouse_scroll_down(self) -> None:
        """Move down."""
        self._session.move(WHEEL_LINES)
        self.show()

    def on_mouse_scroll_up(self) -> None:
        """Move up."""
        self._session.move(-WHEEL_LINES)
        self.show()

    def _strip(self, line: Line) -> Strip:
        segments = [Segment(text, self._style(names)) for text, names in line]
        return Strip(segments).adjust_cell_length(self.size.width, self._style(""))

    def _style(self, names: str) -> Style:
        if names not in self._styles:
            self._styles[names] = style_of(names)
        return self._styles[names]


class Handed(Message):
    """What the pump has read."""

    def __init__(self, found: Reading | Exception) -> None:
        super().__init__()
        self.found = found


class Said(Message):
    """Why the daemon is silent."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class Top(App[Exception]):
    """The application; its result is an exception that ended it, if any."""

    CSS = f"Screen {{ background: {_BACKGROUND}; }}"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = []
    TITLE = "ublkpool top"

    def __init__(
        self,
        session: Session,
        on_choice: Callable[[Session], None] = lambda session: None,
        on_taken: Callable[[], None] = lambda: None,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_choice` is called after each key, `on_taken` when the pump may hand over the next reading.

        `on_begin` is called once on the application's loop, before anything else.
        """
        super().__init__()
        self.session = session
        self.view = BoardView(session)
        self._on_choice = on_choice
        self._on_taken = on_taken
        self._on_begin = on_begin
        self._in: asyncio.AbstractEventLoop | None = None

    def compose(self) -> ComposeResult:
        """The board is all of it."""
        yield self.view

    def on_mount(self) -> None:
        """Let the board have the keys."""
        self._in = asyncio.get_running_loop()
        self.view.focus()
        self._on_begin()

    def end_soon(self) -> None:
        """End in order; for signal handlers, which run between any two steps of the loop."""
        if self._in is not None:
            # A loop that has ended already needs no telling.
            with suppress(RuntimeError):
                self._in.call_soon_threadsafe(self.exit)

    def on_handed(self, message: Handed) -> None:
        """Show the reading, or why there is none."""
        found = message.found
        if isinstance(found, Reading):
            self.session.take(found)
        elif isinstance(found, DaemonUnreachable | RemoteError):
            self.session.lose(str(found), has_failed=True)
        else:
            self.exit(found)
        self.view.show()
        self._on_taken()

    def on_said(self, message: Said) -> None:
        """Show why the daemon is silent."""
        self.session.lose(message.text)
        self.view.show()

    async def on_event(self, event: events.Event) -> None:
        """Take the keys before textual gives them a meaning of its own."""
        if isinstance(event, events.Key):
            self._press(event)
        elif isinstance(event, events.Paste):
            self.session.paste(event.text)
            self.view.show()
        else:
            await super().on_event(event)

    def _press(self, event: events.Key) -> None:
        if event.key == "ctrl+z":
            self.action_suspend_process()
            return
        self.session.press(event.key, event.character)
        if self.session.has_ended:
            self.exit()
            return
        self.view.show()
        self._on_choice(self.session)
