"""A supervisor's record for the next one, and when the next one can go on by it."""

import asyncio
import errno
import os
import socket
from typing import Any, cast

import msgspec
import pytest

from support.fakes.descriptors import open_descriptors
from support.fakes.device_parts import FakeSession
from ublkpool.bufpool import wire
from ublkpool.daemon.backends.session import Session
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.records import Record, Served, Worker
from ublkpool.daemon.device.succession import AdoptedDevice, may_go_on, record_of
from ublkpool.daemon.kernel.client_area import AreaRecord
from ublkpool.daemon.processes.held_names import (
    client_name,
    pool_name,
    session_names,
    slice_name,
    worker_name,
)
from ublkpool.daemon.processes.left_behind import Process, identify
from ublkpool.daemon.settings.config import DeviceConfig

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
def test_a_device_that_lacks_one_of_these_is_recovered(
    changes: dict[str, object], held: dict[str, int]
) -> None:
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
        broker=identify("broker", os.getpid()),
        epoch=3,
        segments=1,
        clients=AreaRecord(4096, ((1, 2), None)),
        build="x",
    )
    assert not found.live
    assert msgspec.json.decode(msgspec.json.encode(found), type=Record) == found


def test_all_held_names_differ() -> None:
    numbered = (worker_name, slice_name, client_name)
    names = [*session_names("a"), *(name("a", number) for name in numbered for number in range(3))]
    assert len(set(names)) == len(names)


def test_a_backend_that_cannot_be_adopted_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pidfd(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Session, "adopt", no_pidfd)
    attach = wire.Attach(v=1, device="vol0", kind="memory", segment_bytes=4096)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    segment = os.memfd_create("segment")
    connection, own = session_names("vol0")
    left = record(served=Served(attach, "01" * 16, 7))
    adopted = AdoptedDevice(cast(Any, None), (), left, {connection: ours.fileno(), own: segment})
    before = open_descriptors()
    with pytest.raises(OSError, match="Too many"):
        adopted.session()
    assert open_descriptors() == before
    os.close(segment)
    ours.close()
    theirs.close()


def test_a_record_of_an_earlier_version_names_no_slice_s_user() -> None:
    packed = msgspec.json.encode({"slice_bytes": 4096, "files": [[1, 2], None]})
    assert msgspec.json.decode(packed, type=AreaRecord) == AreaRecord(4096, ((1, 2), None), users=())


def test_the_pool_s_descriptor_is_dropped_with_its_device() -> None:
    assert pool_name("a").startswith("a/") and pool_name("a") not in session_names("a")


async def _growing() -> FakeSession:
    session = FakeSession()
    session.attach = msgspec.structs.replace(session.attach, resizes=True)
    return session


def test_a_backend_that_can_grow_is_on_record_in_words_that_an_earlier_version_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = asyncio.run(_growing())
    found = record_of(
        DeviceConfig(name="vol0"), None, DISK, None, session, None, state="live", going=False,
        broker=None, epoch=1, segments=1, clients=None, build="x",
    )  # fmt: skip
    served = msgspec.json.decode(msgspec.json.encode(found), type=Record).served
    assert served is not None and served.resizes
    assert b"resizes" not in msgspec.json.encode(served.attach)
    adopted: list[wire.Attach] = []

    def adopt(sock: socket.socket, attach: wire.Attach, *_: object) -> None:
        sock.close()
        adopted.append(attach)

    monkeypatch.setattr(Session, "adopt", adopt)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    held = {session_names("vol0")[0]: ours.fileno()}
    with ours, theirs:
        AdoptedDevice(cast(Any, None), (), record(served=served), held).session()
    assert adopted[0] == session.attach
