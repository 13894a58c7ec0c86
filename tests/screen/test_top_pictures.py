"""The pictures of the documents show the screen as it is now; `make pictures` draws them."""

from collections.abc import Sequence

import pytest

from support.pictures import compare, screen_picture
from support.screen import press, text_of
from ublkpool.daemon.cli.top.session import Session

SIZE = (112, 27)


@pytest.mark.parametrize(("name", "keys"), [("top", ()), ("top-device", ("down", "down", "enter"))])
def test_the_picture_shows_the_screen_as_it_is(session: Session, name: str, keys: Sequence[str]) -> None:
    press(session, *keys)
    compare(name, lambda: screen_picture(session, SIZE), text_of(session, *SIZE))
