"""Slices of a client area: their clients, and when they may be lent again."""

import asyncio
import errno
import mmap
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import TypeVar, cast

import msgspec
import pytest

from support.fakes.attach_door import DEADLINE_S, DEVICE, PAGE, Door
from support.fakes.descriptors import open_descriptors
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import AttachRefused, WireError
from ublkpool.bufpool.sdk.client_buffers import ClientBuffer
from ublkpool.bufpool.seals import is_sealed
from ublkpool.daemon.backends.peer import Peer
from ublkpool.daemon.device import client_buffers
from ublkpool.daemon.device import clients as module
from ublkpool.daemon.device.clients import ClientContext, Clients, rested
from ublkpool.daemon.device.parts import DeviceParts
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.kernel import client_area
from ublkpool.daemon.kernel.block_device import BlockDevice
from ublkpool.daemon.kernel.client_area import USER_UNKNOWN, AreaRecord, ClientArea
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.kernel.disk_parameters import wanted_flags
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.held_names import client_name, slice_name
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.open_files import reopened
from ublkpool.daemon.settings.config import CLIENT_SLICES, DeviceConfig
from ublkpool.ublk import mappings
from ublkpool.ublk.abi import Feature

T = TypeVar("T")
AREA_BYTES = CLIENT_SLICES * PAGE
USER, OTHER_USER = 1000, 1001


def created() -> ClientArea:
    return asyncio.run(ClientArea.create(ControlRunner(), "vol", AREA_BYTES))


@pytest.fixture
def area() -> Iterator[ClientArea]:
    made = created()
    yield made
    made.close()


class Scene:
    """A device's clients, a kernel that drains on command, and slices that a process may have open."""

    def __init__(self, area: ClientArea, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: dict[str, int] = {}
        self.used: set[int] = set()
        self.user = USER
        self.looks = 0
        self.connections: list[socket.socket] = []
        self.draining, self.drained = asyncio.Event(), asyncio.Event()
        self.drained.set()
        holder = SimpleNamespace(hold=self.held.__setitem__, drop=self.held.pop)
        self.clients = Clients("vol", cast(Holder, holder), Background("vol"))
        self.client_context = ClientContext(area, cast(BlockDevice, self))
        monkeypatch.setattr(module, "rested", self._rested)
        monkeypatch.setattr(module, "peer_of", lambda _: Peer(1, self.user, frozenset()))

    def _rested(self, slices: dict[int, int]) -> list[int]:
        self.looks += 1
        return [number for number in slices if number not in self.used]

    async def pass_requests(self) -> None:
        self.draining.set()
        await self.drained.wait()

    def connect(self) -> tuple[socket.socket, int | None]:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.connections.append(ours)
        number = self.clients.lend(theirs)
        if number is None:
            theirs.close()
        return ours, number


async def _until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not check():
            await asyncio.sleep(0)


def played(
    play: Callable[[Scene], Awaitable[None]], area: ClientArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        scene = Scene(area, monkeypatch)
        await play(scene)
        scene.clients.close()
        for each in scene.connections:
            each.close()

    asyncio.run(run())


def test_each_client_gets_its_own_slice_until_none_is_left(
    area: ClientArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(scene: Scene) -> None:
        assert scene.connect()[1] is None
        scene.clients.begin(scene.client_context)
        connections = [scene.connect() for _ in range(CLIENT_SLICES)]
        assert sorted(number for _, number in connections if number is not None) == list(range(CLIENT_SLICES))
        assert scene.connect()[1] is None
        assert scene.clients.counts() == (CLIENT_SLICES, 0, 0)
        assert set(scene.held) == {client_name("vol", number) for number in range(CLIENT_SLICES)}

    played(play, area, monkeypatch)


def test_a_slice_rests_until_the_requests_of_its_lease_are_answered(
    area: ClientArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(scene: Scene) -> None:
        scene.clients.begin(scene.client_context)
        scene.drained.clear()
        ours, number = scene.connect()
        ours.close()
        await asyncio.wait_for(scene.draining.wait(), DEADLINE_S)
        assert scene.clients.counts() == (0, 1, CLIENT_SLICES - 1)
        others = [scene.connect()[1] for _ in range(CLIENT_SLICES)]
        assert number not in others and others.count(None) == 1
        scene.drained.set()
        await _until(lambda: scene.clients.counts() == (CLIENT_SLICES - 1, 0, 1))
        assert scene.connect()[1] == number

    played(play, area, monkeypatch)


def test_a_lease_that_ends_during_a_drain_waits_for_the_next_drain(
    area: ClientArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(scene: Scene) -> None:
        scene.clients.begin(scene.client_context)
        first, second = scene.connect()[0], scene.connect()[0]
        scene.drained.clear()
        first.close()
        await asyncio.wait_for(scene.draining.wait(), DEADLINE_S)
        second.close()
        await _until(lambda: scene.clients.counts()[0] == 0)
        scene.draining.clear()
        scene.drained.set()
        await _until(scene.draining.is_set)
        await _until(lambda: scene.clients.counts() == (0, 0, CLIENT_SLICES))

    played(play, area, monkeypatch)


@pytest.mark.parametrize("goes", [True, False])
def test_a_drain_that_fails_is_an_error_unless_the_device_has_gone(
    area: ClientArea, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, goes: bool
) -> None:
    async def play(scene: Scene) -> None:
        async def fail() -> None:
            if goes:
                scene.clients.close()
            scene.draining.set()
            raise DaemonError("vol: no such file")

        monkeypatch.setattr(scene, "pass_requests", fail)
        scene.clients.begin(scene.client_context)
        scene.connect()[0].close()
        await _until(scene.draining.is_set)
        await _until(lambda: not scene.clients._settling)
        assert scene.clients.counts() == ((0, 0, 0) if goes else (0, 1, CLIENT_SLICES - 1))

    played(play, area, monkeypatch)
    assert ("no such file" in caplog.text) != goes


def test_a_slice_still_open_elsewhere_rests_and_is_checked_again_when_no_other_is_free(
    area: ClientArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(scene: Scene) -> None:
        scene.clients.begin(scene.client_context)
        ours, number = scene.connect()
        assert number is not None
        scene.used = {number}
        ours.close()
        await _until(lambda: scene.clients.counts()[1] == 1)
        await _until(lambda: scene.looks == 1)
        others = [scene.connect() for _ in range(CLIENT_SLICES - 1)]
        assert number not in [each for _, each in others]
        scene.used = set()
        await asyncio.sleep(0)
        assert scene.connect()[1] is None
        await _until(lambda: scene.clients.counts() == (CLIENT_SLICES - 1, 0, 1))

    played(play, area, monkeypatch)


def test_a_client_that_sends_something_ends_its_lease(
    area: ClientArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(scene: Scene) -> None:
        scene.clients.begin(scene.client_context)
        ours, _ = scene.connect()
        ours.send(b"?")
        await _until(lambda: scene.clients.counts() == (0, 0, CLIENT_SLICES))
        assert ours.recv(1) == b""

    played(play, area, monkeypatch)


def test_the_next_daemon_goes_on_with_the_connections_that_were_held(
    area: ClientArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(scene: Scene) -> None:
        ours, theirs = socket.socketpair()
        # Slice 3 has only a process left, whose connection was not held.
        scene.used = {3}
        scene.clients.resume(scene.client_context, {client_name("vol", 5): theirs.fileno()})
        theirs.close()
        await _until(lambda: scene.clients.counts() == (1, 1, CLIENT_SLICES - 2))
        ours.close()
        await _until(lambda: scene.clients.counts() == (0, 1, CLIENT_SLICES - 1))

    played(play, area, monkeypatch)


def test_a_slice_is_lent_to_one_user_only(area: ClientArea, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(scene: Scene) -> None:
        scene.clients.begin(scene.client_context)
        ours, number = scene.connect()
        ours.close()
        await _until(lambda: scene.clients.counts() == (0, 0, CLIENT_SLICES))
        scene.user = OTHER_USER
        others = [scene.connect()[1] for _ in range(CLIENT_SLICES)]
        assert number not in others and others.count(None) == 1
        scene.user = USER
        assert scene.connect()[1] == number

    played(play, area, monkeypatch)


def test_a_user_gets_a_slice_that_it_had_before_a_new_one(
    area: ClientArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(scene: Scene) -> None:
        scene.clients.begin(scene.client_context)
        for user in (USER, OTHER_USER):
            scene.user = user
            scene.connect()
        scene.connections[1].close()
        await _until(lambda: scene.clients.counts() == (1, 0, CLIENT_SLICES - 1))
        assert scene.connect()[1] == 1
        assert area.users == {0: USER, 1: OTHER_USER}

    played(play, area, monkeypatch)


def test_a_slice_whose_users_are_unknown_is_never_lent(
    area: ClientArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version noted no user, and gave its clients open files that the kernel does not count."""
    old = msgspec.structs.replace(area.record(), users=())
    found = _find(old, {slice_name("vol", number): fd for number, fd in area.files.items()})

    async def play(scene: Scene) -> None:
        scene.user = USER_UNKNOWN
        scene.clients.resume(scene.client_context, {})
        await _until(lambda: not scene.clients._settling)
        assert scene.clients.counts() == (0, CLIENT_SLICES, 0) and scene.connect()[1] is None

    played(play, found, monkeypatch)
    found.close()


@pytest.mark.parametrize("how", ["held", "mapped", "in flight"])
def test_a_slice_rests_as_long_as_a_client_has_it_in_any_way(area: ClientArea, how: str) -> None:
    """A descriptor in flight belongs to no process in /proc, and can be received at any time."""
    mine = {0: area.files[0]}
    handed = reopened(area.files[0])
    ours, theirs = socket.socketpair()
    mapping = None
    if how == "mapped":
        mapping = mmap.mmap(handed, PAGE)
    if how == "in flight":
        socket.send_fds(ours, [b"x"], [handed])
    if how != "held":
        os.close(handed)
    assert rested(mine) == []
    if mapping is not None:
        mapping.close()
    if how == "held":
        os.close(handed)
    ours.close()
    theirs.close()
    assert rested(mine) == [0]


def _find(record: AreaRecord, held: dict[str, int]) -> ClientArea:
    return asyncio.run(ClientArea.find(ControlRunner(), record, "vol", held))


def test_slices_are_found_again_through_the_holder_or_a_client_and_are_lost_otherwise(
    area: ClientArea,
) -> None:
    record = area.record()
    os.pwrite(area.files[2], b"x", 0)
    client = os.fork()
    if not client:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(client, os.WUNTRACED)
    found = _find(record, {slice_name("vol", 1): area.files[1]})
    try:
        assert found.bits == (1 << CLIENT_SLICES) - 1 and found.record().files == record.files
        # A slice found through a client is never lent again.
        assert found.users == {n: USER_UNKNOWN for n in range(CLIENT_SLICES) if n != 1}
        assert os.pread(found.files[2], 1, 0) == b"x"
        assert [each.number for each in found.segments()] == [
            wire.SEGMENT_CLIENTS + number for number in range(CLIENT_SLICES)
        ]
    finally:
        found.close()
        os.kill(client, signal.SIGKILL)
        os.waitpid(client, 0)
    lost = _find(record, {slice_name("vol", 1): area.files[1]})
    assert (lost.bits, len(lost.segments())) == (1 << 1, 1)
    assert lost.record().files[1] == record.files[1] and lost.record().files[0] is None
    lost.close()


def test_all_slices_are_looked_for_in_one_search(area: ClientArea, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a search takes long, and the requests of its disk's clients wait for it."""
    searches: list[str] = []

    def count(name: str, spared: Sequence[int]) -> list[Path]:
        searches.append(name)
        return []

    monkeypatch.setattr(client_area, "open_memfds", count)
    wanted = {number: file for number, file in enumerate(area.record().files) if file is not None}
    assert client_area._open_elsewhere(wanted, area.slice_bytes, os.getpid()) == {}
    assert searches == [client_area.NAME]


@pytest.mark.parametrize("at_once_bytes_max", [0, 1 << 30])
def test_a_large_area_is_allocated_by_another_process_than_the_supervisor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at_once_bytes_max: int
) -> None:
    """Allocating a gigabyte takes seconds, in which the supervisor would serve no other device."""
    allocate = mappings.allocate_sealed

    def noted(fd: int, size_bytes: int) -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        allocate(fd, size_bytes)

    monkeypatch.setattr(mappings, "allocate_sealed", noted)
    monkeypatch.setattr(client_area, "AT_ONCE_BYTES_MAX", at_once_bytes_max)
    area = created()
    assert ((tmp_path / "pid").read_text() == str(os.getpid())) == (at_once_bytes_max > 0)
    for fd in area.files.values():
        assert is_sealed(fd) and os.fstat(fd).st_size == AREA_BYTES // CLIENT_SLICES
        assert os.fstat(fd).st_blocks * 512 == AREA_BYTES // CLIENT_SLICES
    area.close()


@pytest.mark.parametrize("at_once_bytes_max", [0, 1 << 30])
def test_an_area_without_enough_memory_is_named_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, at_once_bytes_max: int
) -> None:
    before = open_descriptors()

    def scarce(fd: int, size_bytes: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mappings, "allocate_sealed", scarce)
    monkeypatch.setattr(client_area, "AT_ONCE_BYTES_MAX", at_once_bytes_max)
    words = r"no memory for client_buffers of 32768 bytes \(Cannot allocate memory\): lower it"
    with pytest.raises(DaemonError, match=words):
        created()
    assert open_descriptors() == before


def test_the_flag_is_asked_for_only_if_it_is_offered_and_wanted() -> None:
    wants = DeviceConfig(name="a", client_buffers_bytes=AREA_BYTES)
    assert wanted_flags(wants, (1 << 64) - 1) & Feature.SHMEM_ZC
    assert not wanted_flags(wants, 0x1FE) & Feature.SHMEM_ZC
    assert not wanted_flags(DeviceConfig(name="a"), (1 << 64) - 1) & Feature.SHMEM_ZC


async def _leased(door: Door, device: str) -> ClientBuffer:
    run_dir = door.server._path.parent
    door.server.start()
    return await asyncio.to_thread(ClientBuffer.open, device, 2 * PAGE, run_dir=run_dir)


def test_a_client_gets_the_memory_that_the_daemon_has_for_it(tmp_path: Path) -> None:
    async def play() -> None:
        door = Door(tmp_path)
        door.buffer_fd = os.memfd_create("slice")
        os.truncate(door.buffer_fd, PAGE)
        with await _leased(door, DEVICE) as buffer:
            assert (buffer.path, buffer.size_bytes, buffer.is_shared) == ("/dev/ublkb7", PAGE, True)
            buffer.view[:1] = b"y"
            assert os.pread(door.buffer_fd, 1, 0) == b"y"
            (theirs,) = door.clients
            with pytest.raises(BlockingIOError):
                theirs.recv(1)
        assert theirs.recv(1) == b""
        os.close(door.buffer_fd)
        theirs.close()
        door.server.close()

    asyncio.run(play())


def test_the_command_lends_a_program_the_buffer_while_it_runs(tmp_path: Path) -> None:
    async def play() -> None:
        door = Door(tmp_path)
        door.buffer_fd = os.memfd_create("slice")
        os.truncate(door.buffer_fd, PAGE)
        door.server.start()
        words = 'printf here 1<>"$UBLKPOOL_BUFFER"; echo $UBLKPOOL_DISK $UBLKPOOL_BUFFER_BYTES; read line'
        command = [
            sys.executable,
            "-m",
            "ublkpool.daemon",
            "client",
            "--run-dir",
            str(tmp_path),
            DEVICE,
            "--",
        ]
        process = await asyncio.create_subprocess_exec(*command, "sh", "-c", words, stdin=PIPE, stdout=PIPE)
        assert process.stdout is not None
        assert await process.stdout.readline() == f"/dev/ublkb7 {PAGE}\n".encode()
        assert os.pread(door.buffer_fd, 4, 0) == b"here"
        (theirs,) = door.clients
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
        await process.communicate(b"\n")
        assert theirs.recv(1) == b""
        os.close(door.buffer_fd)
        theirs.close()
        door.server.close()

    asyncio.run(play())


def test_without_shared_memory_a_client_gets_memory_of_its_own(tmp_path: Path) -> None:
    async def play() -> None:
        door = Door(tmp_path)
        with await _leased(door, DEVICE) as buffer:
            assert (len(buffer.view), buffer.is_shared) == (2 * PAGE, False)
            buffer.view[:1] = b"y"
        door.server.close()

    asyncio.run(play())


def test_a_client_without_a_disk_is_told_why(tmp_path: Path) -> None:
    async def play() -> None:
        door = Door(tmp_path)
        with pytest.raises(AttachRefused, match="no device 'other'"):
            await _leased(door, "other")
        door.server.close()

    asyncio.run(play())


def test_a_nonsensical_answer_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        door = Door(tmp_path)
        monkeypatch.setattr(
            door.server, "_lend_buffer", lambda *_: (wire.BufferLeased(path="x", size_bytes=PAGE), None)
        )
        with pytest.raises(WireError, match="makes no sense"):
            await _leased(door, DEVICE)
        door.server.close()

    asyncio.run(play())


def test_a_slice_whose_user_cannot_be_recorded_is_free_again(area: ClientArea) -> None:
    async def run() -> None:
        errors: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: errors.append(context))
        holder = cast(Holder, SimpleNamespace(hold=lambda *_: None, drop=lambda *_: None))
        clients = Clients(DEVICE, holder, Background(DEVICE))
        clients.begin(ClientContext(area, cast(BlockDevice, None)))

        def full() -> None:
            raise DaemonError("no space for the record")

        parts = SimpleNamespace(
            resources=SimpleNamespace(kernel=SimpleNamespace(node="/dev/ublkb7"), area=area),
            life=SimpleNamespace(state="live", is_stopping=False),
            clients=clients,
            save=full,
        )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, ours, pytest.raises(DaemonError):
            client_buffers.lend(cast(DeviceParts, parts), ours)
        await asyncio.sleep(0.05)
        assert clients.counts() == (0, 0, CLIENT_SLICES) and not errors

    asyncio.run(run())
