"""Records of earlier versions are taken over; those of a later one are refused, by the name of what is not known.

The files `earlier/record-*.json` were written by those versions' own code.  `earlier/fields-before-limits.json` has the
fields that the version before knows, and whether it refuses a structure with others.
"""

import asyncio
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.fakes.device_parts import fake_context
from ublkpool.bufpool import wire
from ublkpool.daemon import lifetime, replacement, takeover
from ublkpool.daemon.device.device import Device
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.records import Record, Records, Served, Worker, WrittenByLater
from ublkpool.daemon.device.succession import may_go_on
from ublkpool.daemon.doctor.daemon import DaemonAnswer
from ublkpool.daemon.doctor.leftovers import leftover_findings, read_records
from ublkpool.daemon.processes.held_names import worker_name
from ublkpool.daemon.processes.left_behind import Process, identify
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig, ServeConfig
from ublkpool.daemon.settings.run_directory import RunDirectory
from ublkpool.daemon.takeover import TakeOver

EARLIER = Path(__file__).parent / "earlier"
RECORDS = {each.stem.removeprefix("record-"): each for each in sorted(EARLIER.glob("record-*.json"))}
BACKEND = BackendConfig(kind="file", options={"path": "/var/lib/vol0.img", "size": "1G"}, cwd="/")
CONFIG = DeviceConfig(name="vol0", queues=2, depth=64, io_timeout_s=60.0, backend=BACKEND)
DISK = Disk(size_bytes=1 << 30, block_bytes=4096, volatile_cache=True, read_only=False)
WORKERS = (Process("worker", 4101, 90210), Process("worker", 4102, 90211))
SERVING = Process("backend", 4200, 90300)
FULL = Record(
    config=CONFIG,
    device_number=3,
    device_mark=77,
    disk=DISK,
    epoch=4,
    processes=(*WORKERS, Process("broker", 4050, 90100), SERVING),
    live=True,
    workers=tuple(Worker(each, None) for each in WORKERS),
    served=Served(wire.Attach(v=1, device="vol0", kind="file", size_bytes=1 << 30), "ab" * 16, 3, 7),
    managed=SERVING,
    segments=3,
    build="0123456789abcdef",
    added=CONFIG,
)
"""A record of the present version that uses nothing which the version before does not have."""


def loaded(directory: Path, content: bytes) -> Record:
    """The record that the present version reads in a file with this content."""
    directory.mkdir(exist_ok=True)
    (directory / "vol0.json").write_bytes(content)
    (record,) = Records(directory).load()
    return record


@pytest.mark.parametrize("earlier", RECORDS)
def test_a_record_of_an_earlier_version_says_the_same_to_this_one(tmp_path: Path, earlier: str) -> None:
    record = loaded(tmp_path, RECORDS[earlier].read_bytes())
    assert (record.config, record.disk, record.device_number, record.epoch) == (CONFIG, DISK, 3, 4)
    assert set(WORKERS) | {SERVING} <= set(record.processes)
    if earlier != "first":
        assert (record.live, record.workers, record.managed) == (True, FULL.workers, SERVING)
        assert (
            record.served is not None and record.served.attach.kind == "file" and record.build == FULL.build
        )


@pytest.mark.parametrize("earlier", [each for each in RECORDS if each != "first"])
def test_a_device_goes_on_with_the_workers_of_an_earlier_version_which_are_then_replaced(
    tmp_path: Path, earlier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = loaded(tmp_path, RECORDS[earlier].read_bytes())
    own = identify("worker", os.getpid())
    assert own is not None
    # The processes of that record ended long ago; this one stands for its workers.
    record = msgspec.structs.replace(record, workers=(Worker(own, None), Worker(own, None)), processes=())
    held = {worker_name("vol0", queue): -1 for queue in range(2)}
    assert may_go_on(record, held)
    assert not may_go_on(record, {})
    went_on: list[Record] = []

    async def go_on(_device: Device, left: Record, _held: Mapping[str, int]) -> None:
        went_on.append(left)

    monkeypatch.setattr(Device, "go_on", go_on)
    left = TakeOver(fake_context(), [record], held, [])
    assert asyncio.run(left.device(record, lambda _: None))
    assert went_on == [record]
    assert (left.adopted, left.outdated) == (["vol0"], ["vol0"])


def test_a_device_on_the_first_version_s_record_which_names_no_workers_is_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = loaded(tmp_path, RECORDS["first"].read_bytes())
    ended: list[Process] = []
    recovered: list[Record] = []

    async def end_left(records: list[Record], _spare: object) -> None:
        ended.extend(each for one in records for each in one.processes)

    async def recover_left(_device: Device, left: Record, _held: object) -> bool:
        recovered.append(left)
        return True

    monkeypatch.setattr(takeover, "end_left", end_left)
    monkeypatch.setattr(Device, "recover_left", recover_left)
    monkeypatch.setattr(Device, "save_or_retry", lambda _: None)
    context = fake_context()
    context.queue_dir = tmp_path
    left = TakeOver(context, [record], {}, [])
    assert asyncio.run(left.device(record, lambda _: None))
    assert set(ended) == {*WORKERS, SERVING}
    assert (recovered, left.recovered) == ([record], ["vol0"])


KNOWN: dict[str, dict[str, Any]] = json.loads((EARLIER / "fields-before-limits.json").read_text())
PLACES = {
    "config": "DeviceConfig",
    "added": "DeviceConfig",
    "backend": "BackendConfig",
    "disk": "Disk",
    "workers": "Worker",
    "process": "Process",
    "processes": "Process",
    "managed": "Process",
    "served": "Served",
    "attach": "Attach",
    "identity": "Identity",
}


def refused_before(written: dict[str, Any], structure: str = "Record") -> Iterator[str]:
    """The fields for which the version before refuses what was written."""
    known = KNOWN[structure]
    for field, value in written.items():
        is_tag = structure == "Attach" and field == "type"
        if field not in known["fields"]:
            if known["refuses_others"] and not is_tag:
                yield f"{structure}.{field}"
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict) and field in PLACES:
                yield from refused_before(each, PLACES[field])


def written(record: Record) -> dict[str, Any]:
    """The record as JSON."""
    found: dict[str, Any] = json.loads(msgspec.json.encode(record))
    return found


def test_the_version_before_reads_records_in_which_nothing_new_is_used() -> None:
    assert list(refused_before(written(FULL))) == []


def test_the_version_before_refuses_a_device_with_limits_which_is_set_back_before_a_downgrade() -> None:
    limited = msgspec.structs.replace(CONFIG, iops_max=500)
    assert list(refused_before(written(msgspec.structs.replace(FULL, config=limited)))) == [
        "DeviceConfig.iops_max"
    ]


LATER = {
    "a field": (lambda record: record["config"].update(mirrors=2), "`mirrors`"),
    "a value": (lambda record: record["config"].update(recovery="mirror"), "'mirror'"),
    "a field of the backend": (lambda record: record["config"]["backend"].update(mirror="vol1"), "`mirror`"),
}


@pytest.fixture(params=LATER)
def later(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A run directory with a damaged record and a later version's; and what that one has which is not known."""
    change, unknown = LATER[request.param]
    record = written(FULL)
    change(record)  # type: ignore[no-untyped-call]
    devices = tmp_path / "devices"
    Records(devices).save(FULL)
    (devices / "damaged.json").write_bytes(b"{")
    (devices / "vol0.json").write_text(json.dumps(record))
    return tmp_path, unknown


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a directory."""
    return {each.name: each.read_bytes() for each in directory.iterdir()}


def test_a_later_version_s_record_is_refused_in_one_line_and_nothing_is_changed(
    later: tuple[Path, str],
) -> None:
    run_dir, unknown = later
    before = contents(run_dir / "devices")
    with pytest.raises(WrittenByLater) as refusal:
        Records(run_dir / "devices").load()
    said = str(refusal.value)
    assert "\n" not in said and unknown in said and str(run_dir / "devices/vol0.json") in said
    assert "start the later version again" in said
    assert contents(run_dir / "devices") == before


def test_the_doctor_tells_a_later_version_s_record_from_a_damaged_one(later: tuple[Path, str]) -> None:
    run_dir, unknown = later
    recorded = read_records(run_dir)
    assert (list(recorded.later), list(recorded.unreadable)) == ([f"vol0.json ({unknown})"], ["damaged.json"])
    found = leftover_findings(run_dir, DaemonAnswer("answers"), recorded, lambda _: True)
    assert [each.level for each in found] == ["fail", "warn"]
    assert unknown in found[0].says and "start the daemon of that version again" in found[0].way_out


def test_a_replacing_start_is_refused_before_the_daemon_that_runs_is_asked_to_leave(
    later: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, _ = later
    for name in ("check_prepared", "check_sockets"):
        monkeypatch.setattr(replacement, name, lambda *_: None)
    with pytest.raises(WrittenByLater):
        replacement.check_before(ServeConfig(run_dir=run_dir, state_dir=run_dir / "state"))


def test_a_refused_start_leaves_what_serves_the_devices(
    later: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, _ = later
    removed: list[str] = []

    class Claimed:
        devices = run_dir / "devices"

        def remove(self) -> None:
            removed.append("the sockets of queues and broker")

    monkeypatch.setattr(RunDirectory, "claim", lambda _: Claimed())

    async def start() -> None:
        async with lifetime._Ending() as ending, AsyncExitStack() as leaving:
            config = ServeConfig(run_dir=run_dir)
            await lifetime._start(config, lifetime.Machine(None, -1), ending, leaving, asyncio.Event())

    with pytest.raises(WrittenByLater):
        asyncio.run(start())
    assert removed == []
