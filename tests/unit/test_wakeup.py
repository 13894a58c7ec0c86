"""A wake-up that one thread sends while another closes its descriptor."""

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from ublkpool.backends._objects.client import Ending
from ublkpool.bufpool.sdk.ending import EndWatch
from ublkpool.bufpool.sdk.requests import Outbox
from ublkpool.bufpool.sdk.wakeup import Wakeup

GRACE_S = 0.2
"""How long the closing thread gets to close too early; the sound code never does."""


def is_readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def test_a_signal_makes_the_descriptor_readable_until_it_is_drained() -> None:
    each = Wakeup()
    each.signal()
    each.signal()
    assert is_readable(each.descriptor)
    each.drain()
    assert not is_readable(each.descriptor)
    each.drain()
    each.close()


def test_a_closed_wakeup_writes_into_no_other_file() -> None:
    each = Wakeup()
    each.close()
    each.close()
    other = os.eventfd(0)
    os.dup2(other, each.descriptor)
    try:
        each.signal()
        assert not is_readable(other)
    finally:
        for number in {other, each.descriptor}:
            os.close(number)


def outbox() -> tuple[Callable[[], None], Callable[[], None]]:
    made = Outbox()
    return made.wake, made.close


def ending() -> tuple[Callable[[], None], Callable[[], None]]:
    device: Any = SimpleNamespace(watch=lambda descriptor, callback: None)
    made = Ending(device)

    def end() -> None:
        # It sleeps for ever after its signal, which needs a loop.
        with suppress(RuntimeError):
            made.end("the store is gone").send(None)

    return end, made.close


def end_watch() -> tuple[Callable[[], None], Callable[[], None]]:
    loop: Any = SimpleNamespace(stopping="", name="disk", has_turned=True, unanswered=lambda: "")
    readable, writable = os.pipe()
    watch = EndWatch(loop, readable, readable)
    watch.__enter__()

    def close() -> None:
        watch.__exit__()
        os.close(readable)
        os.close(writable)

    return watch.told, close


@pytest.mark.parametrize("make", [outbox, ending, end_watch])
def test_a_descriptor_is_not_closed_under_a_thread_that_signals_it(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], tuple[Callable[[], None], Callable[[], None]]]
) -> None:
    """The signalling thread stops between its look and its write, as whenever it gives up the interpreter's lock."""
    signal, close = make()
    closer = threading.Thread(target=close)
    errors: list[OSError] = []
    real = os.eventfd_write
    first = threading.Lock()

    def interrupted(descriptor: int, value: int) -> None:
        if first.acquire(blocking=False):
            closer.start()
            closer.join(GRACE_S)
        try:
            real(descriptor, value)
        except OSError as error:
            errors.append(error)

    monkeypatch.setattr(os, "eventfd_write", interrupted)
    thread = threading.Thread(target=signal)
    thread.start()
    thread.join()
    closer.join()
    assert not errors
