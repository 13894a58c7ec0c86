"""The questions that a reading asks, of a real admin server: few, over the lives of several daemons."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs

from support.fakes.daemon import FakeDaemon, running_daemon
from ublkpool.daemon.admin import followers
from ublkpool.daemon.admin.client import Client
from ublkpool.daemon.cli.top.source import Source
from ublkpool.daemon.errors import DaemonError, DaemonUnreachable
from ublkpool.daemon.events.event import Event, decode
from ublkpool.daemon.events.kinds import BackendDied
from ublkpool.daemon.events.tell import Events
from ublkpool.daemon.metrics.usage import Owner
from ublkpool.daemon.settings.config import DeviceConfig
from ublkpool.daemon.status import DaemonStatus

DIED = BackendDied(kind="file", pid=1, was_cut_off=False)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running_daemon(tmp_path) as made:
        add(made, "vol0")
        yield made


def add(daemon: FakeDaemon, *names: str) -> None:
    for name in names:
        daemon.service.configs[name], daemon.service.states[name] = DeviceConfig(name=name), "live"


def record(daemon: FakeDaemon, *texts: str) -> None:
    async def go() -> None:
        for text in texts:
            daemon.service.events.record(DIED, text, device="vol0")

    daemon.call(go())


def test_a_reading_has_devices_numbers_processes_and_events(daemon: FakeDaemon) -> None:
    record(daemon, "one", "two")
    source = Source(daemon.run_dir)
    first, second = source.read("vol0"), source.read("vol0")
    assert [each.name for each in first.statuses] == ["vol0"] and first.daemon is not None
    assert first.interval.devices[0].rates is None and second.interval.devices[0].rates is not None
    assert [each.text for each in first.events] == ["one", "two"] and second.events == []
    share = second.shares[Owner("supervisor")]
    assert share.cpu is not None and share.resident_bytes > 1 << 20


def test_the_processes_of_the_device_that_is_looked_at_are_measured(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = daemon.service.list()[0]
    worker = structs.replace(status.workers[0], pid=os.getpid())
    monkeypatch.setattr(daemon.service, "list", lambda: [structs.replace(status, workers=(worker,))])
    source = Source(daemon.run_dir)
    assert Owner("worker", "vol0", "0") in source.read("vol0").shares
    assert Owner("worker", "vol0", "0") not in source.read("").shares


def test_the_number_of_questions_does_not_depend_on_the_number_of_devices(daemon: FakeDaemon) -> None:
    source = Source(daemon.run_dir)

    def questions() -> int:
        before = daemon.server.statistics()["requests"]
        source.read("vol0")
        return daemon.server.statistics()["requests"] - before

    few = questions()
    add(daemon, *(f"vol{number}" for number in range(1, 300)))
    assert questions() == few == 4


def test_no_event_is_told_twice_nor_lost_with_the_next_daemon(tmp_path: Path) -> None:
    source, events, texts = Source(tmp_path), Events(), []
    for life in range(3):
        with running_daemon(tmp_path, events) as daemon:
            record(daemon, f"{life} a")
            texts += [each.text for each in source.read("").events]
            record(daemon, f"{life} b")
        with pytest.raises(DaemonUnreachable):
            source.read("")
        lines = events.after(0, most=100).lines
        events = Events(earlier=[event for line in lines if (event := decode(line.rstrip()))])
    assert texts == ["0 a", "0 b", "1 a", "1 b", "2 a"]


def test_no_interval_spans_the_absence_of_the_daemon(tmp_path: Path) -> None:
    source = Source(tmp_path)
    rates = []
    for _ in range(2):
        with running_daemon(tmp_path) as daemon:
            add(daemon, "vol0")
            rates += [source.read("").interval.devices[0].rates is not None for _ in range(2)]
        with pytest.raises(DaemonUnreachable):
            source.read("")
    assert rates == [False, True, False, True]


def test_a_daemon_of_an_earlier_version_is_shown_without_its_own_processes(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> DaemonStatus:
        raise DaemonError("bad request: Invalid value 'daemon'")

    monkeypatch.setattr(daemon.service, "daemon", unknown)
    found = Source(daemon.run_dir).read("")
    assert found.daemon is None and [each.name for each in found.statuses] == ["vol0"]
    assert found.shares == {}


def test_an_answer_of_another_version_names_the_way_out(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon.service, "list", lambda: [{"name": 7}])
    with pytest.raises(DaemonError, match=r"makes no sense.*start the `ublkpool top` of its installation"):
        Source(daemon.run_dir).read("")


def test_events_that_are_refused_are_no_reason_to_show_nothing(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(daemon, "one")
    monkeypatch.setattr(followers, "FOLLOWERS_MAX", 0)
    source = Source(daemon.run_dir)
    assert source.read("").events == []
    monkeypatch.setattr(followers, "FOLLOWERS_MAX", 1)
    assert [each.text for each in source.read("").events] == ["one"]


def test_the_daemon_is_asked_only_for_events_that_are_new(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    events = Client.events

    def noting(self: Client, after: int = 0) -> Iterator[Event]:
        asked.append(after)
        return events(self, after)

    monkeypatch.setattr(Client, "events", noting)
    record(daemon, "one", "two")
    source = Source(daemon.run_dir)
    told = source.read("").events
    source.read("")
    assert asked == [0, told[-1].seq]
