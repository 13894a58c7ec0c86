"""A million malformed messages from other processes: each is counted as rejected, and service goes on.

`UBLKPOOL_FUZZ_FACTOR=N` sends N times as many, `UBLKPOOL_FUZZ_SEED=K` begins at another seed.
"""

import asyncio
import fcntl
import logging
import os
import random
import socket
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import zmq

from support.fakes.attach_door import ATTACH, DEVICE, PAGE, Door, at_the_door
from support.fakes.descriptors import open_descriptors
from support.fakes.link_wire import Wire
from support.fakes.queue_rig import Plan
from support.fuzz.broker import BrokerFuzz
from support.fuzz.bytes import spoil
from support.fuzz.core import CoreFuzz
from support.fuzz.link import LinkFuzz
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import WireError
from ublkpool.bufpool.pool import device_leases
from ublkpool.bufpool.pool.arena import Arena, arena_prefix
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.daemon.admin import wire as admin
from ublkpool.daemon.errors import ConfigError
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig
from ublkpool.workers.queue_gate import user_of

FACTOR = float(os.environ.get("UBLKPOOL_FUZZ_FACTOR", "1"))
SEED = int(os.environ.get("UBLKPOOL_FUZZ_SEED", "0"))
CORE_INPUTS = int(700_000 * FACTOR)
WIRE_INPUTS = int(220_000 * FACTOR)
LINK_INPUTS = int(40_000 * FACTOR)
BROKER_INPUTS = int(30_000 * FACTOR)
COMMANDS = int(5_000 * FACTOR)
ATTACHES = int(5_000 * FACTOR)
ROADS = ("off", "pool", "backend")
SHAPES = tuple(product(ROADS, (False, True), (512, 4096)))
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@pytest.mark.parametrize(("number", "shape"), tuple(enumerate(SHAPES)))
def test_descriptors_at_the_queue_core(number: int, shape: tuple[str, bool, int]) -> None:
    road, reads_own, block_bytes = shape
    rng = random.Random(SEED + number)
    plan = Plan(
        depth=rng.randint(2, 6),
        block_bytes=block_bytes,
        need_get_data=road != "off",
        place_in_backend=road == "backend",
        reads_own=reads_own,
        spare=4,
    )
    fuzz = CoreFuzz(rng, plan)
    fuzz.play(-(-CORE_INPUTS // len(SHAPES)))
    counted = fuzz.side.statistics
    # Of each kind something came: what was rejected, what was dropped, and what was believed.
    assert counted.violations and counted.stale_answers and sum(counted.requests)


def test_messages_at_the_backend_link(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = Wire(context, tmp_path / "q0")
    try:
        LinkFuzz(random.Random(SEED), link).play(LINK_INPUTS)
    finally:
        link.close()
        context.term()


DESCRIBED = wire.Described(
    v=1, device=DEVICE, size_bytes=0, max_io_bytes=PAGE, need_get_data=True, placement="pool", read_only=False
)
ANSWERS: tuple[wire.DaemonMessage, ...] = (
    DESCRIBED,
    wire.Refused(reason="no"),
    wire.Live(path="/dev/ublkb0"),
    wire.Detach(reason="bye"),
    wire.Attached(
        v=1,
        device=DEVICE,
        device_number=3,
        size_bytes=1 << 30,
        logical_block_bytes=512,
        queues=1,
        depth=8,
        max_io_bytes=PAGE,
        need_get_data=True,
        placement="backend",
        read_only=False,
        epoch=1,
        token="01" * 16,
        endpoints=("ipc:///run/q0",),
        segments=(wire.Segment(number=1, size_bytes=PAGE),),
        own_segment=2,
    ),
)
FRAME = wire.Descriptor(wire.Kind.DONE, 1, 2, 3, 4, 5, 6, 7, 8, 9, -10, 11, 12).pack()
REQUESTS: tuple[admin.Request, ...] = (
    admin.AddRequest(device=DeviceConfig(name="a", size_bytes=1 << 30, backend=BackendConfig(kind="memory"))),
    admin.DeleteRequest(names=["a"], force=True),
    admin.WaitRequest(name="a", timeout_s=1.5),
    admin.StatsRequest(name="a"),
    admin.StopRequest(leave=True),
    admin.ShutdownRequest(final=True),
)
QUESTIONS: tuple[wire.BackendMessage, ...] = (ATTACH, wire.Describe(v=1, device=DEVICE))


def _decode_again(decode: Callable[[bytes], Any]) -> Callable[[bytes], None]:
    def check(packet: bytes) -> None:
        message = decode(packet)
        assert decode(wire.encode_message(message)) == message

    return check


def _frame_again(frame: bytes) -> None:
    assert wire.pack_frame(wire.iter_frame(frame)) == frame


def _slots_again(frame: bytes) -> None:
    descriptor, slots = wire.unpack_slots(frame)
    assert wire.pack_slots(descriptor, slots)[64:] == frame[64:]


def _worker_again(name: bytes) -> None:
    device, owner = device_leases.parse_routing_id(name)
    assert device_leases.worker_routing_id(device, *owner) == name


def _user_again(address: bytes) -> None:
    user = user_of(address)
    if user is None:
        raise WireError("the address names no user")
    assert int(address.rsplit(b":", 3)[1]) == user


def _request_again(line: bytes) -> None:
    request = admin.decode_request(line)
    assert admin.decode_request(admin.encode_line(request)) == request


DECODERS: dict[str, tuple[Callable[[bytes], object], list[bytes]]] = {
    "frame": (_frame_again, [FRAME, FRAME * 3]),
    "slots": (_slots_again, [wire.pack_slots(wire.Descriptor(wire.Kind.GRANT), [1, 2, 3])]),
    "backend": (
        _decode_again(wire.decode_backend_message),
        [wire.encode_message(each) for each in QUESTIONS],
    ),
    "daemon": (_decode_again(wire.decode_daemon_message), [wire.encode_message(each) for each in ANSWERS]),
    "worker": (_worker_again, [device_leases.worker_routing_id(1, 2, 3)]),
    "address": (_user_again, [b"localhost:0:0:77"]),
    "admin": (_request_again, [admin.encode_line(each) for each in REQUESTS]),
}


@pytest.mark.parametrize("name", DECODERS)
def test_bytes_at_the_decoders(name: str) -> None:
    rng, (decode, true) = random.Random(SEED), DECODERS[name]
    inputs, refused = -(-WIRE_INPUTS // len(DECODERS)), 0
    for _ in range(inputs):
        try:
            decode(spoil(rng, rng.choice(true)))
        except (WireError, ConfigError):
            refused += 1
    assert 0 < refused < inputs


@pytest.fixture
def arena() -> Iterator[Arena]:
    prefix = arena_prefix(f"test-fuzz-{os.getpid()}", 5)
    geometry = Geometry.build([(4096, 10), (65536, 4)])
    with Arena.create(prefix, geometry, queues=2, device_number=5, reserve=(2, 1)) as arena:
        yield arena
        arena.unlink()


def test_frames_and_commands_at_the_broker(arena: Arena) -> None:
    files = open_descriptors()
    fuzz = BrokerFuzz(random.Random(SEED), arena)
    fuzz.frames(BROKER_INPUTS)
    fuzz.commands(COMMANDS)
    fuzz.close()
    assert open_descriptors() == files


def _files() -> list[int]:
    """Descriptors that a hostile backend might pass as a segment: valid, unsealed, too short, unallocated, no file."""
    made = [os.memfd_create(name, os.MFD_ALLOW_SEALING) for name in ("right", "unsealed", "short", "holes")]
    for file, size in zip(made, (PAGE, PAGE, 1, PAGE), strict=True):
        os.truncate(file, size)
    os.posix_fallocate(made[0], 0, PAGE)
    for file in (made[0], made[2], made[3]):
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)
    return [*made, os.open("/", os.O_RDONLY), os.open("/dev/null", os.O_RDWR), os.eventfd(0)]


COUNTS = (*(0,) * 28, 1, 1, 2, 5)
"""How many descriptors come with a packet; the daemon forks a helper for each packet that has any."""


def test_packets_and_descriptors_at_the_attach_socket(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(SEED)
    own = wire.Attach(v=1, device=DEVICE, kind="own", segment_bytes=PAGE, placement="backend")
    true = [wire.encode_message(each) for each in (*QUESTIONS, own, own)]
    files = _files()

    async def one(door: Door) -> None:
        with door.connect() as connection:
            chosen = [rng.choice(files) for _ in range(rng.choice(COUNTS))]
            packet = spoil(rng, rng.choice(true)) or b" "
            admitted, refused = len(door.sessions), door.server.refusals.count
            socket.send_fds(connection, [packet[:200_000]], chosen)
            while len(door.sessions) == admitted:
                said = await _said(connection)
                if said is not None:
                    assert isinstance(said, wire.Described) or door.server.refusals.count == refused + 1
                    break
            while door.sessions:
                door.sessions.pop().close()

    async def scene(door: Door) -> None:
        for _ in range(ATTACHES):
            await one(door)
        session, connection = await door.admit()
        connection.close()
        assert door.server.refusals.count and session.attach == ATTACH

    with caplog.at_level(logging.CRITICAL):
        at_the_door(tmp_path, scene)
    for each in files:
        os.close(each)


async def _said(connection: socket.socket) -> wire.DaemonMessage | None:
    """An answer if there is one after a turn of the loop."""
    await asyncio.sleep(0)
    try:
        packet = connection.recv(65536, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    return wire.decode_daemon_message(packet)
