"""The pictures of the documents: a terminal as an SVG, and the lines of text in one.

`make pictures` writes them; everywhere else a test compares each with what the command shows now.
"""

import asyncio
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.text import Text

from support.screen import IS_WRITING
from ublkpool.daemon.cli.top.app import Top
from ublkpool.daemon.cli.top.session import Session

PICTURES = Path(__file__).resolve().parents[2] / "docs/pictures"
_SVG = "{http://www.w3.org/2000/svg}"
_CELL_WIDTH = 12.2
_REMOTE = re.compile(r"\s*(@font-face \{.*?\}|<!--.*?-->)", re.DOTALL)
"""Fonts from a web server, which a picture in a document must not ask for, and the address of the library."""


def as_document(svg: str) -> str:
    """The library's SVG as the documents have it: every reader has its fonts."""
    return _REMOTE.sub("", svg).replace("Fira Code", "DejaVu Sans Mono, Menlo, Consolas")


def terminal_lines(command: str, output: str, width: int) -> list[str]:
    """A command after its prompt, and its output, on a terminal of this width, which wraps longer lines."""
    lines = [f"$ {command}", *output.splitlines()]
    return [line[at : at + width] for line in lines for at in range(0, max(1, len(line)), width)]


def terminal_picture(lines: Sequence[str], width: int) -> str:
    """A terminal with these lines, the first of which has a prompt."""
    console = Console(
        record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor", width=width
    )
    for number, line in enumerate(lines):
        console.print(Text(line, style="" if number else "bold"), no_wrap=True, crop=False)
    return as_document(console.export_svg(title=lines[0].removeprefix("$ ")))


def screen_picture(session: Session, size: tuple[int, int]) -> str:
    """The screen of `ublkpool top`, of this width and height, by textual."""
    app = Top(session)

    async def run() -> str:
        async with app.run_test(size=size):
            return app.export_screenshot(title="ublkpool top")

    return as_document(asyncio.run(run()))


def compare(name: str, draw: Callable[[], str], shown: Sequence[str]) -> None:
    """Write the picture with this name if that was asked for; it must show these lines."""
    path = PICTURES / f"{name}.svg"
    if IS_WRITING:
        path.parent.mkdir(exist_ok=True)
        path.write_text(draw())
    found = [line for line in lines_in(path.read_text()) if line]
    assert found == [line.rstrip() for line in shown if line.strip()], "if the change is meant: make pictures"


def lines_in(svg: str) -> list[str]:
    """The text in a picture of a terminal, where each piece has its place."""
    lines: dict[float, dict[int, str]] = {}
    for each in ElementTree.fromstring(svg).iter(f"{_SVG}text"):
        if each.text and "clip-path" in each.attrib:
            at = round(float(each.attrib["x"]) / _CELL_WIDTH)
            lines.setdefault(float(each.attrib["y"]), {})[at] = each.text.replace("\xa0", " ")
    return [_line(lines[y]) for y in sorted(lines)]


def _line(pieces: dict[int, str]) -> str:
    line = ""
    for at in sorted(pieces):
        line = line.ljust(at) + pieces[at]
    return line.rstrip()
