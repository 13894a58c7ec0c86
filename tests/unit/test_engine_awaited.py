"""A prepared worker: it ends with its supervisor until a device takes it, then opens the engine that it is told."""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from support.fakes.loop_rig import DEVICE, NoRing
from support.fakes.queue_rig import Plan
from support.fakes.worker_spec import queue_config, worker_spec
from ublkpool.bufpool.engine.cow import CowFiles, CowLayout
from ublkpool.bufpool.engine.native import FileStorage, MemoryStorage, NullStorage
from ublkpool.bufpool.pool.arena import Arena, arena_prefix
from ublkpool.bufpool.pool.limits import Geometry
from ublkpool.bufpool.sdk.inside import Connect, open_for_workers
from ublkpool.bufpool.sdk.properties import Hint
from ublkpool.ublk import _native
from ublkpool.ublk.queue import LinkState
from ublkpool.workers import messages, queue_loop
from ublkpool.workers.engine_awaited import AWAITED, _spec_of, told
from ublkpool.workers.engine_inside import EngineInside, EngineSpec
from ublkpool.workers.queue_loop import QueueLoop, buffer_classes

MIB = 1 << 20
LAYOUT = CowLayout(size_bytes=MIB, capacity_bytes=MIB, live_at=1, durable_at=2, data_at=3, base_bytes=4)
DEADLINES = messages.SetDeadlines(7000, False, 0)


class EngineRing(NoRing):
    """Notes the engine."""

    engine = (0, 0)

    def use_engine(self, calls: int, engine: int) -> None:
        self.engine = calls, engine


class Prepared:
    """A prepared worker's loop, turned by the test, and the supervisor's end of its socket."""

    def __init__(self, directory: Path, arena: Arena, spec: EngineSpec | None = AWAITED) -> None:
        self.supervisor, worker = messages.pair()
        self.loop = QueueLoop(
            worker_spec(
                queue_config(buffer_classes(arena)),
                directory / "q0",
                name="_prepared.1",
                pool_endpoint=f"ipc://{directory}/pool",
                engine=spec,
                is_prepared=True,
            ),
            -1,
            _native.ffi.new("struct uq_iod[]", 4),
            arena,
            worker,
        )
        self._worker = worker
        assert self.loop.turn() is None and self.said() == [messages.Fetched()]

    def said(self) -> list[messages.FromWorker]:
        """What the worker has said since."""
        found: list[messages.FromWorker] = []
        while True:
            try:
                packet = self.supervisor.recv(messages.MESSAGE_BYTES_MAX)
            except BlockingIOError:
                return found
            found.append(messages.decode_from_worker(packet))

    def become(self, spec: EngineSpec, hand_over: int | None = None) -> list[messages.FromWorker]:
        """Tell it this engine, with so many of its descriptors or all; what it says."""
        for fd in spec.descriptors()[:hand_over]:
            messages.send(self.supervisor, messages.HandOver(), fd)
        messages.send(
            self.supervisor, messages.Become(name="vol", deadlines=DEADLINES, engine=told(spec), id=5)
        )
        assert self.loop.turn() is None and self.loop.turn() is None
        return self.said()

    def close(self) -> None:
        self.supervisor.close()
        self.loop.close()
        self._worker.close()


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prepared]:
    monkeypatch.setattr(queue_loop, "IoUring", EngineRing)
    monkeypatch.setattr(QueueLoop, "_patience_ms", lambda _: 0)
    monkeypatch.setattr(QueueLoop, "_has_reserve", lambda _: True)
    geometry = Geometry.build([(4096, 4), (Plan().max_io_bytes, 4)])
    prefix = arena_prefix(f"test-awaited-{os.getpid()}", DEVICE)
    with Arena.create(prefix, geometry, queues=1, device_number=DEVICE, reserve=(1, 1)) as arena:
        made = Prepared(tmp_path, arena)
        try:
            yield made
        finally:
            made.close()
            arena.unlink()


def spec_of(storage: object, **more: object) -> EngineSpec:
    return EngineSpec(storage, MIB, **{"read_only": False, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    [
        spec_of(NullStorage()),
        spec_of(FileStorage(10), read_only=True),
        spec_of(FileStorage(10, True)),
        spec_of(MemoryStorage(names_reads=True), own_fd=10, own_bytes=MIB),
        spec_of(CowFiles(10, 11, LAYOUT)),
    ],
    ids=["null", "file", "block device", "memory", "cow"],
)
def test_an_engine_arrives_as_it_was_told(spec: EngineSpec) -> None:
    message = messages.Become(name="vol", deadlines=DEADLINES, engine=told(spec))
    packet = msgspec.json.encode(message)
    assert len(packet) < messages.MESSAGE_BYTES_MAX
    heard = msgspec.json.decode(packet, type=messages.ToWorker)
    assert heard == message and isinstance(heard, messages.Become) and heard.engine is not None
    assert _spec_of(heard.engine, spec.descriptors()) == spec


def test_a_store_that_is_a_connection_is_not_told() -> None:
    connect = Connect("rbd", {}, None, Hint("vol", Path("/run"), max_io_bytes=MIB), 1)
    with pytest.raises(AssertionError):
        told(spec_of(connect))


def test_a_prepared_worker_ends_with_its_supervisor(prepared: Prepared) -> None:
    prepared.supervisor.close()
    assert prepared.loop.turn() == 1


def test_one_that_serves_a_device_goes_on_without_it(prepared: Prepared) -> None:
    assert prepared.become(spec_of(NullStorage())) == [messages.Became("", 5), messages.Linked()]
    prepared.supervisor.close()
    assert prepared.loop.turn() is None and prepared.loop.turn() is None
    assert prepared.loop._spec.name == "vol"


def test_no_request_is_served_before_the_engine_is_told(prepared: Prepared) -> None:
    assert prepared.loop._queue.link is LinkState.NONE
    prepared.become(spec_of(NullStorage()))
    link: LinkState = prepared.loop._queue.link
    assert link is LinkState.UP


@pytest.mark.parametrize("kind", ["file", "cow"])
def test_the_engine_gets_the_descriptors_that_were_handed_over(
    prepared: Prepared, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "base").write_bytes(os.urandom(MIB))
    if kind == "file":
        options = {"path": str(tmp_path / "disk"), "size": "1M"}
    else:
        options = {"base": str(tmp_path / "base"), "overlay": str(tmp_path / "overlay")}
    opened = open_for_workers(kind, options, Hint("vol", tmp_path, max_io_bytes=MIB))
    assert opened.storage is not None
    spec = EngineSpec(opened.storage, MIB, False)
    assert prepared.become(spec) == [messages.Became("", 5), messages.Linked()]
    engine, ring = prepared.loop._backend, prepared.loop._ring
    assert isinstance(engine, EngineInside) and isinstance(ring, EngineRing)
    assert ring.engine == engine._engine.addresses
    for fd in opened.descriptors:
        os.close(fd)


@pytest.mark.parametrize("handed_over", [0, 1])
def test_a_descriptor_that_has_not_come_is_named_and_nothing_is_served(
    prepared: Prepared, handed_over: int
) -> None:
    reader, writer = os.pipe()
    (answer,) = prepared.become(spec_of(CowFiles(reader, writer, LAYOUT)), handed_over)
    assert isinstance(answer, messages.Became)
    assert f"queue 0: {handed_over} of 2 descriptors of its store have come" in answer.reason
    assert prepared.loop._queue.link is LinkState.NONE
    os.close(reader)
    os.close(writer)
    # No device has taken the worker, so it ends with its supervisor.
    prepared.supervisor.close()
    assert prepared.loop.turn() == 1


def test_a_damaged_store_is_the_reason(prepared: Prepared, tmp_path: Path) -> None:
    overlay = os.open(tmp_path / "short", os.O_RDWR | os.O_CREAT)
    base = os.dup(overlay)
    (answer,) = prepared.become(spec_of(CowFiles(overlay, base, LAYOUT)))
    assert isinstance(answer, messages.Became) and answer.reason.startswith("queue 0: ")
    os.close(overlay)
    os.close(base)
