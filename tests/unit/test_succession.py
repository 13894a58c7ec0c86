"""What a supervisor writes down for the next one, and when that is enough to go on with."""

import os

import msgspec
import pytest

from ublkpool.daemon.client_area import AreaRecord, slice_name
from ublkpool.daemon.clients import client_name
from ublkpool.daemon.config import DeviceConfig
from ublkpool.daemon.disk import Disk
from ublkpool.daemon.records import Process, Record, Worker, identify
from ublkpool.daemon.succession import may_go_on, record_of, session_names, worker_name

DISK = Disk(size_bytes=1 << 20, block_bytes=512, volatile_cache=False, read_only=False)


def living() -> Process:
    found = identify("worker", os.getpid())
    assert found is not None
    return found


def record(**changes: object) -> Record:
    whole = Record(
        config=DeviceConfig(name="vol0"),
        device_number=3,
        disk=DISK,
        live=True,
        workers=(Worker(living(), 0), Worker(living(), 1)),
    )
    return msgspec.structs.replace(whole, **changes)


HELD = {worker_name("vol0", queue): 100 + queue for queue in range(2)}


def test_a_served_device_whose_workers_live_and_can_be_reached_goes_on() -> None:
    assert may_go_on(record(), HELD)


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({"live": False}, HELD),
        ({"workers": ()}, HELD),
        ({}, {worker_name("vol0", 0): 100}),
        ({}, {}),
    ],
    ids=["not served", "nobody", "one queue out of reach", "nothing held"],
)
def test_anything_less_is_recovered(changes: dict[str, object], held: dict[str, int]) -> None:
    assert not may_go_on(record(**changes), held)


def test_another_process_with_the_number_of_a_dead_worker_is_not_that_worker() -> None:
    other = msgspec.structs.replace(living(), start_ticks=1)
    assert not may_go_on(record(workers=(Worker(living(), 0), Worker(other, 1))), HELD)


@pytest.mark.parametrize(("state", "going"), [("recovering", False), ("quiesced", False), ("live", True)])
def test_a_device_that_changes_is_not_written_down_as_served(state: str, going: bool) -> None:
    found = record_of(
        DeviceConfig(name="vol0"),
        None,
        DISK,
        None,
        None,
        None,
        state=state,  # type: ignore[arg-type]
        going=going,
        broker_pid=os.getpid(),
        segments=1,
        clients=AreaRecord(4096, ((1, 2), None)),
        build="x",
    )
    assert not found.live
    assert msgspec.json.decode(msgspec.json.encode(found), type=Record) == found


def test_no_two_held_names_meet() -> None:
    numbered = (worker_name, slice_name, client_name)
    names = [*session_names("a"), *(name("a", number) for name in numbered for number in range(3))]
    assert len(set(names)) == len(names)
