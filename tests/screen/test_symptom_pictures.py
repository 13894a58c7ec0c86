"""The pictures in docs/symptoms show what the commands print in these situations; `make pictures` draws them."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from support.fakes import symptoms
from support.pictures import PICTURES, compare, screen_picture, terminal_lines, terminal_picture
from support.screen import press, text_of
from ublkpool.daemon.cli.top.reading import Reading
from ublkpool.daemon.cli.top.session import Session

WIDTH = 126
SCREEN = (112, 22)
DOCUMENTS = [
    path for path in (PICTURES.parent.parent / "README.md", *PICTURES.parent.rglob("*.md")) if path.is_file()
]
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]*)\)")
_SENTENCE_MIN = 30
"""Characters; a shorter text in place of a picture says too little to those who do not see it."""


@pytest.mark.parametrize(
    ("name", "command", "output"),
    [
        ("io-hangs-list", "ublkpool list", lambda scratch: symptoms.waiting_devices(WIDTH)),
        (
            "device-failed",
            "ublkpool events vol0 --since 10m",
            lambda scratch: symptoms.killed_workers(),
        ),
        ("backend-flaps", "ublkpool events vol0 --since 1h", lambda scratch: symptoms.flapping_backend()),
        ("store-full", "ublkpool doctor | grep -A1 -e ^warn -e ^fail", symptoms.full_directories),
    ],
)
def test_the_picture_shows_what_the_command_prints(
    tmp_path: Path, name: str, command: str, output: Callable[[Path], str]
) -> None:
    lines = terminal_lines(command, output(tmp_path), WIDTH)
    compare(name, lambda: terminal_picture(lines, WIDTH), lines)


@pytest.mark.parametrize(
    ("name", "readings", "interval_s"),
    [("io-hangs-top", symptoms.silent_backend, 1.0), ("memory-grows", symptoms.growing_backend, 60.0)],
)
def test_the_picture_shows_the_page_of_the_device(
    name: str, readings: Callable[[], list[Reading]], interval_s: float
) -> None:
    session = Session("/run/ublkpool", interval_s)
    for each in readings():
        session.take(each)
    press(session, "enter")
    compare(name, lambda: screen_picture(session, SCREEN), text_of(session, *SCREEN))


def _pictures() -> list[tuple[Path, str, Path]]:
    """Each picture in a document: the document, the text in its place, the file."""
    return [
        (document, text, (document.parent / address).resolve())
        for document in DOCUMENTS
        for text, address in _PICTURE.findall(document.read_text())
        if "://" not in address
    ]


def test_each_picture_is_in_a_document_with_a_text_in_its_place() -> None:
    shown = {path for _, _, path in _pictures()}
    assert shown == set(PICTURES.iterdir())
    assert not [(document, text) for document, text, _ in _pictures() if len(text) < _SENTENCE_MIN]


def test_each_symptom_has_a_picture() -> None:
    with_pictures = {document for document, _, _ in _pictures()}
    assert set(PICTURES.parent.glob("symptoms/*.md")) <= with_pictures


def _names() -> Sequence[str]:
    return sorted(each.name for each in PICTURES.glob("*.svg"))


@pytest.mark.parametrize("name", _names())
def test_a_picture_asks_no_server_for_anything(name: str) -> None:
    addresses = re.findall(r"\w+://[^\s\"]+", (PICTURES / name).read_text())
    assert addresses == ["http://www.w3.org/2000/svg"]
