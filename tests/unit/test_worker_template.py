"""Workers that the daemon's template forks."""

import asyncio
import errno
import functools
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from support.fakes.device_parts import FakeKernel
from support.fakes.worker_spec import queue_config, worker_spec
from ublkpool.bufpool.engine.native import FileStorage, NullStorage
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.daemon.device import forks
from ublkpool.daemon.device.forks import Forks
from ublkpool.daemon.processes import worker_template
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.worker_template import WorkerTemplate
from ublkpool.workers import template
from ublkpool.workers.engine_inside import EngineSpec
from ublkpool.workers.queue_loop import WorkerSpec
from ublkpool.workers.record_gate import RecordGate
from ublkpool.workers.template import PACKET_BYTES_MAX, TITLE

DEADLINE_S = 60.0
QUEUES = 3
GEOMETRY = Geometry.build([(4096, 4)])


def spec_of(
    queue: int, engine: EngineSpec | None = None, name: str = "vol", gate: int | None = None
) -> WorkerSpec:
    return worker_spec(
        queue_config(queue=queue, queues=QUEUES, max_io_bytes=4096),
        Path("/nonexistent/7.0"),
        name=name,
        engine=engine,
        hold_gate=gate,
    )


def _live(spec: WorkerSpec, char: int, mapped: Any, pool: Any, sock: socket.socket, gate: RecordGate) -> int:
    """In the place of `run_worker`: tell what this worker has, then wait for the gate and for a signal."""
    files = {"char": char, "data": pool.data_fd, "control": pool.control_fd}
    if spec.engine is not None and isinstance(spec.engine.storage, FileStorage):
        files["store"] = spec.engine.storage.file
    if spec.hold_gate is not None:
        files["hold"] = spec.hold_gate
    told = {name: os.pread(fd, 64, 0).decode() for name, fd in files.items() if name != "hold"}
    told["queue"], told["mapped"] = str(spec.queue.queue), str(mapped[spec.queue.queue])
    told["open"] = str(len(os.listdir("/proc/self/fd")) - 1)  # noqa: PTH208
    told["own_kib"] = str(_private_kib())
    # A request that was given up has no other end.
    with suppress(BrokenPipeError):
        sock.send(json.dumps(told).encode())
    if not gate.passes():
        return 1
    sock.send(b"passed")
    signal.pause()
    return 0


def _private_kib() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(each.split()[1]) for each in lines if each.startswith("Private_"))


@pytest.fixture(autouse=True)
def _no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (template, forks):
        monkeypatch.setattr(module, "map_descriptors", lambda char, queue, depth: f"mapped {queue}")
        monkeypatch.setattr(module, "unmap_descriptors", lambda *_: None)
        monkeypatch.setattr(module, "run_worker", _live)


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("ublkpool"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Opens a file that has its own name as content."""
    opened = []

    def opened_file(name: str) -> int:
        (tmp_path / name).write_text(name)
        opened.append(os.open(tmp_path / name, os.O_RDWR | os.O_CLOEXEC))
        return opened[-1]

    yield opened_file
    for each in opened:
        os.close(each)


class OpenKernel(FakeKernel):
    """A kernel's device whose node is a file."""

    def __init__(self, node: Path) -> None:
        super().__init__()
        self._node, self.opened = node, 0
        self._node.write_text("char")

    async def open_char(self) -> int:
        self.opened += 1
        return os.open(self._node, os.O_RDWR | os.O_CLOEXEC)


class Worker:
    """A forked worker."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid, self.sock, self.child = pid, sock, Child(pid)

    async def hears(self) -> Any:
        """What it says next; "" at its end."""
        said = await asyncio.get_running_loop().sock_recv(self.sock, 4096)
        return said.decode()

    async def told(self) -> dict[str, str]:
        """What it has."""
        return dict(json.loads(await self.hears()))


class Scene:
    """A template, and the workers of one device."""

    def __init__(self, place: Path, files: Callable[[str], int]) -> None:
        self.template = WorkerTemplate()
        self.kernel = OpenKernel(place / "char")
        self.arena = cast(
            Any, SimpleNamespace(data_fd=files("data"), control_fd=files("control"), geometry=GEOMETRY)
        )
        self.workers: list[Worker] = []
        self.gate = RecordGate()

    def forks(self, specs: list[WorkerSpec]) -> Forks:
        begun = lambda spec, pid, sock: self.workers.append(Worker(pid, sock))  # noqa: E731
        return Forks(self.kernel, self.arena, specs, self.gate, begun)

    async def fork(self, engine: EngineSpec | None = None) -> bool:
        return await self.forks([spec_of(queue, engine) for queue in range(QUEUES)]).by_template(
            self.template
        )

    async def end(self) -> None:
        self.gate.close()
        for each in self.workers:
            await each.child.kill()
            each.sock.close()
        await self.template.stop()


def in_scene(test: Callable[[Scene, Callable[[str], int]], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test with a template that has been started, and check that no descriptor is left."""

    async def run(place: Path, files: Callable[[str], int]) -> None:
        scene = Scene(place, files)
        scene.template.start()
        try:
            await asyncio.wait_for(test(scene, files), DEADLINE_S)
        finally:
            await scene.end()

    @functools.wraps(test)
    def plain(tmp_path: Path, files: Callable[[str], int]) -> None:
        asyncio.run(run(tmp_path, files))

    del plain.__wrapped__
    return plain


def _open_files(pid: int) -> list[str]:
    return [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()]


@in_scene
async def test_each_queue_gets_its_worker_and_its_descriptors(
    scene: Scene, files: Callable[[str], int]
) -> None:
    engine = EngineSpec(FileStorage(files("store")), size_bytes=4096, read_only=False)
    assert await scene.fork(engine)
    for queue, worker in enumerate(scene.workers):
        told = await worker.told()
        assert {name: told[name] for name in ("char", "data", "control", "store")} == {
            name: name for name in ("char", "data", "control", "store")
        }
        assert (told["queue"], told["mapped"]) == (str(queue), f"mapped {queue}")
        # 0 to 2, the four files, socket and gate; the directory that is listed was counted.
        assert int(told["open"]) == 3 + 4 + 2
        assert Path(f"/proc/{worker.pid}/comm").read_text().strip() == f"ublkpool-7.{queue}"
        stat = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(") ")[2].split()
        assert int(stat[1]) == os.getpid(), "the daemon reaps it"
    scene.gate.open(QUEUES)
    for worker in scene.workers:
        assert await worker.hears() == "passed"
        worker.child.send(signal.SIGTERM)
        assert await worker.child.wait() == 128 + signal.SIGTERM


@in_scene
async def test_the_template_keeps_nothing_and_its_workers_survive_it(
    scene: Scene, files: Callable[[str], int]
) -> None:
    assert await scene.fork()
    template_pid = scene.template.pid
    assert template_pid is not None
    assert Path(f"/proc/{template_pid}/comm").read_text().strip() == TITLE
    kept = await asyncio.to_thread(_open_files, template_pid)
    assert [each for each in kept if each.endswith(("char", "data", "control"))] == []
    await scene.template.stop()
    assert scene.template.pid is None
    for worker in scene.workers:
        await worker.told()
        assert worker.child.exit_status is None


@in_scene
async def test_workers_end_if_their_daemon_ends_before_the_record(
    scene: Scene, files: Callable[[str], int]
) -> None:
    assert await scene.fork()
    scene.gate.close()
    for worker in scene.workers:
        assert await worker.child.wait() == 1


@in_scene
async def test_workers_of_one_template_share_what_the_daemon_has_written_to_since(
    scene: Scene, files: Callable[[str], int]
) -> None:
    """Counting references, the daemon writes to its objects; a worker that it forks keeps copies of what it had."""
    has_forked = await scene.fork()
    own_kib = [int((await worker.told())["own_kib"]) for worker in scene.workers]
    # One after the other, as devices are added: the daemon goes on in between.
    held = list(_OBJECTS)
    assert has_forked
    assert await scene.fork()
    own_kib += [int((await worker.told())["own_kib"]) for worker in scene.workers[QUEUES:]]
    assert len(held) == len(_OBJECTS)
    assert max(own_kib) < OWN_KIB_MAX, own_kib


_OBJECTS = [bytes(64) for _ in range(100_000)]
"""More than a worker may have of its own."""
OWN_KIB_MAX = 4 << 10


def test_without_the_template_the_daemon_forks_and_says_so(
    tmp_path: Path, files: Callable[[str], int], heard: pytest.LogCaptureFixture
) -> None:
    @in_scene
    async def test(scene: Scene, _: Callable[[str], int]) -> None:
        os.kill(cast(int, scene.template.pid), signal.SIGKILL)
        while scene.template.pid is not None:
            await asyncio.sleep(0.01)
        assert not await scene.fork()
        assert scene.kernel.opened == 0
        await scene.forks([spec_of(queue) for queue in range(2)]).here()
        for queue, worker in enumerate(scene.workers):
            assert (await worker.told())["queue"] == str(queue)

    test(tmp_path, files)
    said = [each.getMessage() for each in heard.records]
    assert said == [
        "the template of workers ended: killed by SIGKILL; "
        "until the daemon is restarted, a new worker takes more memory"
    ]


def test_a_template_that_is_stuck_is_killed_and_keeps_no_device(
    tmp_path: Path, files: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_template, "ANSWER_S", 0.2)

    @in_scene
    async def test(scene: Scene, _: Callable[[str], int]) -> None:
        pid = cast(int, scene.template.pid)
        os.kill(pid, signal.SIGSTOP)
        assert not await scene.fork()
        assert scene.workers == []

    test(tmp_path, files)


def test_the_workers_of_a_request_that_was_given_up_are_killed(
    tmp_path: Path, files: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[Child] = []

    def watch(pid: int) -> Child:
        watched.append(Child(pid))
        return watched[-1]

    @in_scene
    async def test(scene: Scene, _: Callable[[str], int]) -> None:
        pid = cast(int, scene.template.pid)
        monkeypatch.setattr(worker_template, "Child", watch)
        os.kill(pid, signal.SIGSTOP)
        asking = asyncio.ensure_future(scene.fork())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        os.kill(pid, signal.SIGCONT)
        while len(watched) < QUEUES:
            await asyncio.sleep(0.01)
        # The pipe's end of their gate is still open: they wait for it.
        assert [await each.wait() for each in watched] == [128 + signal.SIGKILL] * QUEUES
        assert scene.workers == []

    test(tmp_path, files)


def _failing(char: int, queue: int, depth: int) -> object:
    raise OSError(errno.ENOMEM, "no memory")


def test_a_failure_names_its_reason_and_leaves_no_child(
    tmp_path: Path,
    files: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
    heard: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(template, "map_descriptors", _failing)

    @in_scene
    async def test(scene: Scene, _: Callable[[str], int]) -> None:
        assert not await scene.fork()
        # The first queue's failed, is known and is reaped.
        (first,) = scene.workers
        assert await first.child.wait() == 1
        assert "queue 0 cannot start: no memory" in await first.hears()

    test(tmp_path, files)
    assert [each.getMessage() for each in heard.records] == [
        "vol: the template of workers cannot fork: Cannot allocate memory"
    ]


@in_scene
async def test_a_request_that_is_too_large_is_the_daemons_own_to_fork(
    scene: Scene, files: Callable[[str], int]
) -> None:
    specs = [spec_of(0, name="x" * PACKET_BYTES_MAX)]
    assert not await scene.forks(specs).by_template(scene.template)
    scene.gate = RecordGate()
    assert await scene.fork()


def test_the_descriptors_of_a_worker_are_renumbered() -> None:
    numbers = {5: 50, 6: 60, 7: 70}
    spec = spec_of(0, EngineSpec(FileStorage(5, is_block_device=True), 4096, read_only=True), gate=6)
    assert sorted(spec.descriptors()) == [5, 6]
    moved = spec.renumbered(numbers)
    assert moved.hold_gate == 60
    assert moved.engine == EngineSpec(FileStorage(50, is_block_device=True), 4096, read_only=True)
    memory = EngineSpec(NullStorage(), 4096, read_only=False, own_fd=7, own_bytes=4096)
    assert memory.renumbered(numbers).own_fd == 70
