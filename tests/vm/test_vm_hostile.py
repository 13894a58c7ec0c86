"""Backends that break the protocol are cut off: their request fails or waits, and other devices do not notice."""

import errno
import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from support.fakes.liar import CUT, REGIONS, REJECTS, RESULTS, STALE
from support.vm import hostile_backend as hostile
from support.vm.daemon import Daemon, eventually, total
from support.vm.fio import drop_fio, finish_fio, start_fio
from support.vm.hostile_backend import Conduct, Victim, attach_by_hand, start_hostile, telling
from support.vm.process import Forked, read_block, write_block
from ublkpool.bufpool import wire
from ublkpool.bufpool.sdk.client import OwnSegment
from ublkpool.bufpool.wire import Op

MIB = 1 << 20
CHUNK = 64 * 1024
DISK_BYTES = 8 * MIB
DEPTH = 8
KILLED = -signal.SIGKILL
NOBODY = 65534
FLOOD = 30
UNSEALED_FLAGS = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
# Of tests in which worker and daemon judge, and the driver sees ordinary answers and errors.
ON_ONE_KERNEL = pytest.mark.one_kernel("6.12")


class Breach(NamedTuple):
    """One breach of the protocol, and the client's result: an error, or the answer of the next backend."""

    name: str
    conduct: Conduct
    op: Op
    error: int
    end: int = KILLED


def _breaches_with_pool() -> list[Breach]:
    breaches = [Breach(name, telling(lie), Op.WRITE, 0) for name, lie in CUT.items()]
    breaches += [Breach(name, telling(lie), Op.WRITE, errno.EIO) for name, lie in RESULTS.items()]
    breaches += [Breach(name, telling(lie), Op.READ, errno.EIO) for name, lie in RESULTS.items()]
    breaches.append(Breach("posts where the pool is the place", hostile.posting(""), Op.WRITE, 0))
    breaches.append(Breach("two answers", hostile.answering_twice, Op.WRITE, 0))
    breaches.append(Breach("death", hostile.dying, Op.WRITE, 0, hostile.DEATH_STATUS))
    return breaches


def _breaches_with_own_segment() -> list[Breach]:
    lies = {**REGIONS, **REJECTS}
    breaches = [Breach(name, telling(lie), Op.WRITE, errno.EIO) for name, lie in lies.items()]
    breaches += [Breach(name, telling(lie), Op.READ, errno.EIO) for name, lie in REGIONS.items()]
    breaches += [Breach(name, telling(CUT[name]), Op.WRITE, 0) for name in ("other kind", "no such tag")]
    posts = ("half past the end", "no size that buffers have")
    breaches += [Breach(f"posts {name}", hostile.posting(name), Op.WRITE, 0) for name in posts]
    breaches.append(Breach("death", hostile.dying, Op.WRITE, 0, hostile.DEATH_STATUS))
    breaches.append(Breach("late death", hostile.dying_with_the_data, Op.WRITE, 0, hostile.DEATH_STATUS))
    return breaches


class Scenes:
    """A device to which the tests attach one backend after another; all share one disk."""

    def __init__(self, daemon: Daemon, placement: str) -> None:
        self.daemon = daemon
        self.disk = mmap.mmap(-1, DISK_BYTES)
        self.segment_bytes = DEPTH * CHUNK if placement == "backend" else 0
        daemon.add("victim", size_bytes=DISK_BYTES, depth=DEPTH, max_io_bytes=CHUNK, placement=placement)
        self._path: str | None = None

    @property
    def path(self) -> str:
        self._path = self._path or self.daemon.wait_live("victim").path
        assert self._path is not None
        return self._path

    def attach(self, conduct: Conduct = hostile.honest, *victims: Victim) -> Forked:
        """The next backend."""
        eventually(lambda: not self.daemon.status("victim").backend.attached, "the last backend is gone")
        run_dir = self.daemon.run_dir
        backend = start_hostile(run_dir, "victim", self.disk, victims, conduct, self.segment_bytes)
        eventually(lambda: self.daemon.status("victim").backend.pid == backend.pid, "the backend attaches")
        return backend

    def request(self, op: Op, offset: int, data: bytes) -> Forked:
        """A client's request, in a process whose exit status is the errno."""
        path = self.path
        if op == Op.WRITE:
            return Forked(lambda: write_block(path, offset, data))
        return Forked(lambda: _read_error(path, offset, len(data)))

    def commit(self, breach: Breach, index: int) -> tuple[Forked, bytes]:
        """Let a backend break the protocol and end; returns the request, which may still wait, and its data."""
        offset, data = index * CHUNK, os.urandom(CHUNK)
        backend = self.attach(breach.conduct, Victim(offset, breach.op))
        request = self.request(breach.op, offset, data)
        assert backend.wait() == breach.end, breach.name
        if breach.error:
            assert request.wait() == breach.error, breach.name
        return request, data

    def workers(self) -> set[int]:
        """The pids of the device's workers."""
        return {each.pid for each in self.daemon.status("victim").workers}

    def count(self, counter: str) -> int:
        return total(self.daemon.stats("victim"), counter)


def _read_error(path: str, offset: int, length: int) -> int:
    try:
        read_block(path, offset, length)
    except OSError as error:
        return error.errno or -1
    return 0


def _reads(daemon: Daemon, name: str) -> int:
    return sum(queue.requests.read for queue in daemon.stats(name).queues)


@contextmanager
def _bystander(daemon: Daemon) -> Iterator[None]:
    """Another device of the same daemon, under verified I/O for the length of the block."""
    with daemon.device("bystander", "memory", options={"size": "16M"}) as status:
        assert status.path is not None
        # Paced, so that the tests have the CPUs; it only has to go on.
        pace: dict[str, Any] = {"time_based": 1, "runtime": 3600, "rate_iops": 200}
        before = _reads(daemon, "bystander")
        fio = start_fio(status.path, size="16M", iodepth=8, verify_backlog=32, **pace)
        try:
            yield
            eventually(lambda: _reads(daemon, "bystander") > before + 64, "fio verifies what it wrote")
            assert fio.poll() is None
            fio.send_signal(signal.SIGINT)
            result = finish_fio(fio, may_fail=True)
        finally:
            drop_fio(fio)
        assert result.errors == 0 and result.written_bytes and result.read_bytes, result.text
        stats = daemon.rest("bystander")
        assert total(stats, "errors") == total(stats, "violations") == 0


# With pool placement the backend uses frames whatever the kernel is.
@pytest.mark.parametrize(
    "placement",
    [pytest.param("pool", marks=ON_ONE_KERNEL), pytest.param("backend", marks=pytest.mark.one_kernel("7.3"))],
)
def test_every_breach_cuts_its_backend_off_and_harms_at_most_its_own_request(
    daemon: Daemon, placement: str
) -> None:
    breaches = _breaches_with_own_segment() if placement == "backend" else _breaches_with_pool()
    with _bystander(daemon):
        said = len(daemon.said())
        scenes = Scenes(daemon, placement)
        done = [(breach, *scenes.commit(breach, index)) for index, breach in enumerate(breaches)]
        last = scenes.attach()
        for index, (breach, request, data) in enumerate(done):
            if not breach.error:
                assert request.wait() == 0, breach.name
                assert breach.op == Op.READ or scenes.disk[index * CHUNK :][:CHUNK] == data, breach.name
        cuts = sum(breach.end == KILLED for breach in breaches)
        # ZeroMQ ends the connection of a frame that is too large, so the worker sees a hang-up and no violation.
        assert cuts - 1 <= scenes.count("violations") <= cuts
        assert cuts <= scenes.count("violations") + scenes.count("hangups") <= len(breaches)
        assert daemon.said()[said:].count("backend cut off") == cuts
        assert scenes.count("errors") == sum(breach.error != 0 for breach in breaches)
        # A dead backend has no mappings any more, so the next one gets the same memory.
        assert daemon.said()[said:].count("gets other memory") < cuts / 2
        daemon.delete("victim")
        assert last.wait() == 0


@ON_ONE_KERNEL
def test_a_stale_answer_is_dropped_and_its_backend_stays(daemon: Daemon) -> None:
    scenes = Scenes(daemon, "pool")
    for index, lie in enumerate(STALE.values()):
        backend = scenes.attach(hostile.telling_then_honest(lie), Victim(index * CHUNK))
        assert scenes.request(Op.WRITE, index * CHUNK, bytes(CHUNK)).wait() == 0
        assert scenes.count("stale_answers") == index + 1
        assert backend.running
        backend.kill()
    assert scenes.count("violations") == 0
    daemon.delete("victim")


@pytest.mark.parametrize(
    "placement",
    [pytest.param("pool", marks=ON_ONE_KERNEL), pytest.param("backend", marks=pytest.mark.one_kernel("7.3"))],
)
def test_a_write_that_was_stored_in_part_fails_and_a_read_goes_on(daemon: Daemon, placement: str) -> None:
    scenes = Scenes(daemon, placement)
    half_hearted = scenes.attach(hostile.answering_half, Victim(0), Victim(CHUNK, Op.READ))
    # 7.x would report the whole write as done.
    assert write_block(scenes.path, 0, os.urandom(CHUNK)) == errno.EIO
    scenes.disk[CHUNK : 2 * CHUNK] = data = os.urandom(CHUNK)
    assert read_block(scenes.path, CHUNK, CHUNK) == data
    assert (scenes.count("errors"), scenes.count("violations")) == (1, 0)
    daemon.delete("victim")
    assert half_hearted.wait() == 0


@pytest.mark.one_kernel("7.3")
def test_a_region_named_twice_fails_the_second_write_and_saves_the_first(daemon: Daemon) -> None:
    scenes = Scenes(daemon, "backend")
    thief = scenes.attach(hostile.placing_at_zero, Victim(0), Victim(CHUNK))
    first_data = os.urandom(CHUNK)
    first = scenes.request(Op.WRITE, 0, first_data)
    eventually(lambda: scenes.count("kernel_write_bytes") == CHUNK, "the first write has its region")
    second = scenes.request(Op.WRITE, CHUNK, os.urandom(CHUNK))
    assert thief.wait() == KILLED
    assert second.wait() == errno.EIO
    assert first.running
    successor = scenes.attach()
    assert first.wait() == 0
    assert scenes.disk[:CHUNK] == first_data
    assert (scenes.count("rescues"), scenes.count("own_copy_bytes")) == (1, CHUNK)
    daemon.delete("victim")
    assert successor.wait() == 0


@ON_ONE_KERNEL
def test_after_a_hostile_backend_a_correct_one_serves(daemon: Daemon) -> None:
    scenes = Scenes(daemon, "pool")
    request, data = scenes.commit(Breach("kind", telling(CUT["unknown kind"]), Op.WRITE, 0), 1)
    # The hostile one told no identity, so that another kind is accepted only on purpose.
    daemon.client.rebind("victim")
    daemon.backend("memory", "victim", size=DISK_BYTES)
    assert request.wait() == 0
    assert read_block(scenes.path, CHUNK, CHUNK) == data
    assert scenes.count("replays") == 1
    daemon.delete("victim")


def _segment(size_bytes: int, seal: bool) -> int:
    if seal:
        return os.dup(OwnSegment.create(size_bytes).descriptor)
    descriptor = os.memfd_create("unsealed", UNSEALED_FLAGS)
    os.posix_fallocate(descriptor, 0, size_bytes)
    return descriptor


def _refused(daemon: Daemon, message: wire.Attach | bytes, files: list[int]) -> str:
    try:
        answer = attach_by_hand(daemon.run_dir, message, files)
    finally:
        for file in files:
            os.close(file)
    assert isinstance(answer, wire.Refused)
    return answer.reason


@ON_ONE_KERNEL
def test_a_backend_that_cannot_be_trusted_or_does_not_fit_is_refused_with_the_reason(daemon: Daemon) -> None:
    daemon.add("guarded", size_bytes=MIB, placement="backend")
    good = wire.Attach(v=1, device="guarded", kind="x", placement="backend", segment_bytes=MIB)

    def but(**changes: object) -> wire.Attach:
        return msgspec.structs.replace(good, **changes)

    sealed, short = _segment(MIB, True), _segment(MIB // 2, True)
    assert "version 9" in _refused(daemon, but(v=9), [sealed])
    assert "no device 'nobody'" in _refused(daemon, but(device="nobody"), [_segment(MIB, True)])
    assert "F_SEAL_SHRINK" in _refused(daemon, good, [_segment(MIB, False)])
    assert f"has {MIB // 2} bytes" in _refused(daemon, good, [short])
    assert "go together" in _refused(daemon, good, [])
    assert "only 4096" in _refused(daemon, but(size_bytes=4096), [_segment(MIB, True)])
    assert "placement" in _refused(daemon, but(placement="pool", segment_bytes=0), [])
    assert "attach:" in _refused(daemon, b'{"type":"attach"}', [])
    assert "attach:" in _refused(daemon, b"\xff\xfe garbage", [])
    assert daemon.status("guarded").state == "waiting"
    daemon.delete("guarded")


@ON_ONE_KERNEL
def test_a_second_backend_is_refused_while_the_first_serves(daemon: Daemon) -> None:
    scenes = Scenes(daemon, "pool")
    first = scenes.attach()
    attach = wire.Attach(v=1, device="victim", kind="second")
    assert "has a backend already (hostile, process" in _refused(daemon, attach, [])
    assert write_block(scenes.path, 0, bytes(4096)) == 0
    daemon.delete("victim")
    assert first.wait() == 0


@ON_ONE_KERNEL
def test_a_backend_that_hangs_up_on_its_queue_and_lives_on_is_ended_long_before_its_request_is_overdue(
    daemon: Daemon,
) -> None:
    scenes = Scenes(daemon, "pool")
    request, data = scenes.commit(Breach("hang-up", hostile.hanging_up, Op.WRITE, 0), 0)
    assert request.running
    successor = scenes.attach()
    assert request.wait() == 0 and scenes.disk[:CHUNK] == data
    assert (scenes.count("hangups"), scenes.count("violations"), scenes.count("timeouts")) == (1, 0, 0)
    assert "has hung up on a queue and stays" in daemon.said()
    daemon.delete("victim")
    assert successor.wait() == 0


@ON_ONE_KERNEL
def test_a_backend_that_closes_its_attach_connection_and_lives_on_is_killed_before_the_next_one_serves(
    daemon: Daemon,
) -> None:
    scenes = Scenes(daemon, "pool")
    request, data = scenes.commit(Breach("closed door", hostile.closing_the_door, Op.WRITE, 0), 0)
    assert request.running
    successor = scenes.attach()
    assert request.wait() == 0 and scenes.disk[:CHUNK] == data
    assert "has closed its connection and lives on" in daemon.said()
    daemon.delete("victim")
    assert successor.wait() == 0


@ON_ONE_KERNEL
def test_a_child_that_keeps_a_dead_backends_memory_neither_changes_nor_wedges_what_its_successor_serves(
    daemon: Daemon,
) -> None:
    scenes, said = Scenes(daemon, "pool"), len(daemon.said())
    # At an offset that the partition scan does not read.
    half = DISK_BYTES // 2
    backend = scenes.attach(hostile.leaving_a_child, Victim(half, Op.READ))
    workers, waiting = scenes.workers(), scenes.request(Op.READ, half, bytes(CHUNK))
    # The child inherits the memory, the connections and the pipe that `Forked.wait` reads.
    os.waitid(os.P_PID, backend.pid, os.WEXITED | os.WNOWAIT)
    successor = scenes.attach()
    for n in range(4 * DEPTH):
        data = os.urandom(CHUNK)
        assert write_block(scenes.path, n * CHUNK, data) == 0
        assert scenes.disk[n * CHUNK :][:CHUNK] == data and read_block(scenes.path, n * CHUNK, CHUNK) == data
    hostile.end_children(scenes.disk)
    assert waiting.wait() == 0 and scenes.workers() == workers
    assert "ended and another has its connection" in daemon.said()[said:]
    assert "gets other memory for the next backend: a process still has it" in daemon.said()[said:]
    daemon.delete("victim")
    assert successor.wait() == 0


def _resize_the_pool(daemon: Daemon) -> None:
    scenes = Scenes(daemon, "pool")
    backend = scenes.attach(hostile.resizing_the_pool, Victim(0))
    data = os.urandom(CHUNK)
    assert write_block(scenes.path, 0, data) == 0 and read_block(scenes.path, 0, CHUNK) == data
    daemon.delete("victim")
    assert backend.wait() == 0


def _punch_the_pool(daemon: Daemon) -> None:
    """Punching holes harms only the backend's own device, whose data the backend could have changed anyway."""
    scenes = Scenes(daemon, "pool")
    victims = [Victim(n * CHUNK, op) for n in range(DEPTH) for op in (Op.WRITE, Op.READ)]
    vandal = scenes.attach(hostile.punching_the_pool, *victims)
    path, workers = scenes.path, scenes.workers()
    for op in (Op.WRITE, Op.READ):
        requests = [scenes.request(op, n * CHUNK, bytes(CHUNK)) for n in range(DEPTH)]
        assert [each.wait() for each in requests] == [0] * DEPTH
    assert scenes.count("requeues") == 0
    vandal.kill()
    successor = scenes.attach()
    data = os.urandom(CHUNK)
    assert write_block(path, 0, data) == 0 and read_block(path, 0, CHUNK) == data
    assert scenes.workers() == workers
    daemon.delete("victim")
    assert successor.wait() == 0


def _flood(daemon: Daemon) -> None:
    scenes, said = Scenes(daemon, "pool"), len(daemon.said())
    request, _ = scenes.commit(Breach("flood", hostile.flooding, Op.WRITE, 0), 0)
    files = Path(f"/proc/{daemon.pid}/fd")
    eventually(lambda: not daemon.status("victim").backend.attached, "the flooder is gone")
    before = len(list(files.iterdir()))
    for _ in range(FLOOD):
        _refused(daemon, b"{}", [os.memfd_create("flood")])
    # Descriptors of the flooding backend may still have been open before.
    eventually(lambda: len(list(files.iterdir())) <= before, "no descriptor of a refused caller is kept")
    # The daemon logs this once per minute, and a guest may need more than one.
    refused = daemon.said()[said:].count("backend refused: attach: Object missing required field")
    assert 1 <= refused < FLOOD / 2
    successor = scenes.attach()
    assert request.wait() == 0 and scenes.count("violations") == 1
    daemon.delete("victim")
    assert successor.wait() == 0


@pytest.mark.one_kernel("7.3")
def test_neither_holes_in_the_pool_nor_a_flood_disturb_another_device(daemon: Daemon) -> None:
    with _bystander(daemon):
        _resize_the_pool(daemon)
        _punch_the_pool(daemon)
        _flood(daemon)


def _ask_as_nobody(run_dir: Path) -> int:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    answer = attach_by_hand(run_dir, wire.Describe(v=1, device="any"))
    return 0 if isinstance(answer, wire.Refused) and "may not attach" in answer.reason else 1


@ON_ONE_KERNEL
def test_a_run_directory_open_to_all_lets_no_other_user_attach(daemon: Daemon) -> None:
    opened = [daemon.run_dir.parent, daemon.run_dir, daemon.run_dir / "attach.sock"]
    modes = [each.stat().st_mode for each in opened]
    try:
        for each in opened:
            each.chmod(0o777)
        assert Forked(lambda: _ask_as_nobody(daemon.run_dir)).wait() == 0
    finally:
        for each, mode in zip(opened, modes, strict=True):
            each.chmod(mode)
    assert f"of user {NOBODY} may not attach" in daemon.said()
