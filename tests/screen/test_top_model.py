"""What readings leave behind: devices, their histories, CPU shares, and the same numbers as `stats --watch`."""

from collections.abc import Sequence

import pytest
from msgspec import structs

from support.fakes.top_readings import LOADS, reading
from ublkpool.daemon.cli.top.device_columns import DEVICE_COLUMNS, backend, state
from ublkpool.daemon.cli.top.model import HISTORY, KINDS, Device, Model
from ublkpool.daemon.cli.top.reading import Reading, Share, Shares
from ublkpool.daemon.cli.top.session import Session
from ublkpool.daemon.cli.watch_views import rates_table
from ublkpool.daemon.latency import merge, quantile
from ublkpool.daemon.metrics.usage import Owner, ProcessUsage
from ublkpool.daemon.rates import Meter
from ublkpool.daemon.status import BackendStatus, Latencies

CELLS = {each.name: each for each in DEVICE_COLUMNS}


def model(readings: Sequence[Reading]) -> Model:
    made = Model()
    for each in readings:
        made.take(each)
    return made


def without(reading: Reading, name: str) -> Reading:
    """The reading without the numbers of this device, as if it was added after they were asked for."""
    interval = reading.interval
    kept = [each for each in interval.devices if each.stats.name != name]
    return reading._replace(interval=interval._replace(devices=kept))


def shown(device: Device, column: str) -> str:
    text, _ = CELLS[column].cell(device, 10, Session("").marks)
    return text


def test_the_numbers_are_those_of_stats_watch(minute: Sequence[Reading]) -> None:
    last = minute[-1]
    table = rates_table(last.interval)
    rows = {each[0]: dict(zip(table.headers, each, strict=True)) for each in table.rows}
    made = model(minute)
    for name, device in made.devices.items():
        for column in ("R P50", "R P99", "W P50", "W P99", "ACTIVE"):
            assert shown(device, column) == rows[name][column], (name, column)
        rates = device.rates
        assert rates is not None and rates.name == name
        if rates.requests_per_s.read < 99_999:
            assert shown(device, "R/S") == rows[name]["R/S"]


def test_quantiles_of_the_whole_request_are_of_all_operations(minute: Sequence[Reading]) -> None:
    device = model(minute).devices["db-data"]
    before, now = minute[-2].interval.devices[0].stats, device.stats
    assert device.latencies is not None and before.name == now.name
    whole = merge((device.latencies.read, device.latencies.write, device.latencies.other))
    assert (device.p50_s, device.p99_s) == (quantile(whole, 0.5), quantile(whole, 0.99))
    grown = sum(getattr(now.latency, kind).count - getattr(before.latency, kind).count for kind in KINDS[:3])
    assert whole.count == grown > 0


def test_queues_by_themselves_add_up_to_the_device(minute: Sequence[Reading]) -> None:
    made = model(minute)
    queues, device = made.queues("db-data"), made.devices["db-data"]
    assert device.rates is not None and len(queues) == 4
    rates = [each.device.rates for each in queues]
    assert sum(each.requests_per_s.read for each in rates if each) == pytest.approx(
        device.rates.requests_per_s.read
    )
    assert sum(each.in_flight for each in rates if each) == device.in_flight
    assert [each.pid for each in queues] == [2100, 2101, 2102, 2103]
    assert [each.share for each in queues] == [
        minute[-1].shares[Owner("worker", "db-data", str(queue))] for queue in range(4)
    ]
    assert made.queues("no such") == []


def test_a_first_reading_has_no_rates_but_everything_else() -> None:
    made = model(reading(1))
    device = made.devices["db-data"]
    assert (device.rates, device.p99_s, device.in_flight) == (None, None, 0)
    assert [shown(device, name) for name in ("R/S", "P99", "SIZE", "QUEUES")] == ["", "", "512G", "4"]
    assert [each.device.rates for each in made.queues("db-data")] == [None] * 4


def test_what_is_not_known_is_a_gap_and_what_is_known_is_summed(minute: Sequence[Reading]) -> None:
    made = model(reading(2))
    assert [each.reads is None for each in made.totals] == [True, False]
    assert [each.writes is None for each in made.devices["db-data"].history] == [True, False]
    made.take(without(minute[-1], "images"))
    made.take(minute[0])
    made.take(
        minute[-1]._replace(interval=minute[-1].interval._replace(devices=minute[0].interval.devices[:1]))
    )
    assert made.totals[-1].reads is None and made.totals[-2].reads is None
    mixed = [*minute[-1].interval.devices[1:], minute[0].interval.devices[0]]
    made.take(minute[-1]._replace(interval=minute[-1].interval._replace(devices=mixed)))
    known = [each.rates.requests_per_s.read for each in minute[-1].interval.devices[1:] if each.rates]
    assert made.totals[-1].reads == pytest.approx(sum(known))
    made.take(reading(1, loads=())[0])
    assert made.totals[-1].reads == 0


def test_a_device_of_which_only_one_answer_knows_waits_for_the_next_reading(
    minute: Sequence[Reading],
) -> None:
    made = model(minute)
    made.take(without(minute[-1], "images"))
    assert "images" not in made.devices and len(made.devices) == len(LOADS) - 1
    made.take(minute[-1])
    assert len(made.devices["images"].history) == 1, "another device may have its name"


def test_a_device_made_anew_under_its_name_has_no_rates(minute: Sequence[Reading]) -> None:
    meter = Meter()
    old, new = minute[-1].interval.devices, minute[0].interval.devices
    meter.read([each.stats for each in old], 0.0, "")
    interval = meter.read([each.stats for each in new], 1.0, "T")
    made = model([minute[-1]._replace(interval=interval)])
    assert made.devices["db-data"].rates is None
    assert [each.device.rates for each in made.queues("db-data")] == [None] * 4


def test_histories_are_bounded_and_kept_over_an_absence(minute: Sequence[Reading]) -> None:
    made = model([*minute, *minute])
    assert len(made.totals) == HISTORY and len(made.devices["images"].history) == HISTORY
    made.lose("gone")
    assert made.trouble == "gone" and len(made.devices) == len(LOADS)
    made.take(minute[0])
    assert made.trouble == "" and len(made.devices["images"].history) == HISTORY


@pytest.mark.parametrize(
    ("changed", "serves"),
    [
        ({}, True),
        ({"state": "recovering"}, False),
        ({"state": "failed"}, False),
        ({"reason": "no backend is attached"}, False),
        ({"drain": "drained"}, False),
    ],
)
def test_only_a_live_device_without_a_reason_serves(
    session: Session, changed: dict[str, str], serves: bool
) -> None:
    live = session.model.devices["db-data"]
    assert live._replace(status=structs.replace(live.status, **changed)).serves == serves


def test_the_state_is_a_word_and_says_when_a_live_device_does_not_serve(session: Session) -> None:
    words = {each.name: state(each) for each in session.devices}
    assert {words[name] for name in ("db-data", "vm-old", "mirror", "wiki")} == {
        "live",
        "waiting !",
        "recovering",
        "failed",
    }
    live = session.model.devices["db-data"]
    assert state(live._replace(status=structs.replace(live.status, reason="its store was cut"))) == "live !"
    assert state(live._replace(status=structs.replace(live.status, drain="drained"))) == "drained"


def test_a_backend_says_whether_it_is_attached(session: Session) -> None:
    device = session.model.devices["db-data"]

    def of(status: BackendStatus, answers: str = "backend") -> str:
        return backend(
            device._replace(status=structs.replace(device.status, backend=status, answers=answers))
        )

    assert of(BackendStatus(kind="file", pid=1, attached=True)) == "file"
    assert of(BackendStatus(kind="file", pid=1)) == "(file)"
    assert of(BackendStatus()) == "none" and of(BackendStatus(), "worker") == "workers"


def usage(cpu_s: float, start_s: float = 1.0) -> ProcessUsage:
    return ProcessUsage(Owner("broker"), cpu_s, 4096, start_s)


def test_cpu_is_that_of_the_interval_and_of_the_same_process() -> None:
    shares = Shares()
    assert shares.read([usage(7.0)], 10.0) == {Owner("broker"): Share(None, 4096)}
    assert shares.read([usage(7.5)], 12.0) == {Owner("broker"): Share(0.25, 4096)}
    assert shares.read([usage(0.1, start_s=2.0)], 13.0)[Owner("broker")].cpu is None, "its successor"
    assert shares.read([], 14.0) == {}
    assert shares.read([usage(0.3, start_s=2.0)], 15.0)[Owner("broker")].cpu is None
    assert shares.read([usage(0.4, start_s=2.0)], 15.0)[Owner("broker")].cpu is None, "no time has passed"


def test_each_kind_of_duration_has_a_row() -> None:
    assert Latencies.__struct_fields__ == KINDS
