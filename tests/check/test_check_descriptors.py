"""The check's own loop watches no descriptor that is closed: a new one with the same number would not be heard."""

import asyncio
import os
from contextlib import suppress
from typing import Any

import pytest

from ublkpool.daemon.check import round as round_module
from ublkpool.daemon.check.host import Host
from ublkpool.testing import report_on


def _closed_ones() -> list[int]:
    """The descriptors that the running loop watches and that are closed."""
    selector: Any = getattr(asyncio.get_running_loop(), "_selector")  # noqa: B009 - a private attribute
    return [fd for fd in selector.get_map() if not _is_open(fd)]


def _is_open(fd: int) -> bool:
    with suppress(OSError):
        os.fstat(fd)
        return True
    return False


class Looked(Host):
    """A host that is looked at after each turn and end, before anything else can use a number."""

    looks = 0

    def _bury(self) -> None:
        super()._bury()
        self._look()

    def worker_death(self) -> None:
        super().worker_death()
        self._look()

    def _judge(self) -> None:
        self._look()
        super()._judge()

    def _look(self) -> None:
        Looked.looks += 1
        assert _closed_ones() == []


@pytest.mark.parametrize("transport", ["ring", "zeromq"])
def test_no_closed_descriptor_is_watched(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    monkeypatch.setattr(round_module, "Host", Looked)
    monkeypatch.setattr(Looked, "looks", 0)
    report = report_on("null", {"size": "1M"}, seconds=0, seed=1, deadline_s=60, transport=transport)
    assert report.is_kept, report.lines()
    assert Looked.looks > report.counts["kill"] + report.counts["fence"] > 1
