"""An image that grows: what the backend tells by itself, and what only as the answer to a resize."""

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from ublkpool.backends.rbd.backend import RbdBackend
from ublkpool.backends.rbd.options import RbdOptions

MIB = 1 << 20


class Growing:
    """A backend on an image in memory; `pulse` is a turn of its pulse, which may come while the image grows."""

    def __init__(self) -> None:
        self.size_bytes = MIB
        self.error: OSError | None = None
        self.announced: list[int] = []
        self.device: Any = SimpleNamespace(size_bytes=MIB, resized=self.announced.append)
        self.backend = RbdBackend(RbdOptions(pool="p", image="i"))
        image: Any = self
        self.backend._image = image

    def resize(self, size_bytes: int) -> None:
        """Of the image."""
        if self.error is None:
            self.size_bytes = size_bytes
        self.pulse()
        if self.error is not None:
            raise self.error

    def pulse(self) -> None:
        self.backend._look_at_size(self.device)


def test_what_a_resize_has_done_is_told_by_its_answer_alone() -> None:
    growing = Growing()
    growing.backend.resize(2 * MIB)
    growing.pulse()
    assert growing.size_bytes == 2 * MIB and growing.announced == []


def test_an_image_that_has_grown_by_itself_is_told_once() -> None:
    growing = Growing()
    growing.size_bytes = 2 * MIB
    growing.pulse()
    growing.pulse()
    assert growing.announced == [2 * MIB]


def test_an_image_that_another_client_makes_as_large_as_a_failed_resize_asked_is_told() -> None:
    growing = Growing()
    growing.error = OSError(errno.EDQUOT, "resize")
    with pytest.raises(OSError, match="resize"):
        growing.backend.resize(2 * MIB)
    assert growing.announced == []
    growing.size_bytes = 2 * MIB
    growing.pulse()
    assert growing.announced == [2 * MIB]
