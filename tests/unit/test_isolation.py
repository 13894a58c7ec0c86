"""Isolation none: what it refuses, how a store is opened for workers, and what an epoch's end leaves of it."""

import asyncio
import fcntl
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.fakes.device_parts import DISK, FakeHolder, FakeKernel, FakeParts, FakeTeam, fake_context
from support.fakes.native_rig import EPOCH, NativeRig
from ublkpool.backends._cow_format import read_head
from ublkpool.bufpool.engine.cow import DATA, CowFiles, CowMap
from ublkpool.bufpool.engine.native import FileStorage, MemoryStorage, NullStorage
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk import store_users
from ublkpool.bufpool.sdk.inside import Connect, ConnectsInside, open_for_workers
from ublkpool.bufpool.sdk.properties import Hint
from ublkpool.bufpool.wire import SEGMENT_POOL, Descriptor, Kind, Op
from ublkpool.daemon.device.inside import InsideStore, StoreAway
from ublkpool.daemon.device.opening import connect, hint_of, open_store, reopen_store
from ublkpool.daemon.errors import DaemonError, is_shortage
from ublkpool.daemon.kernel.control_process import ControlRunner
from ublkpool.daemon.processes.held_names import disk_memory_name
from ublkpool.daemon.settings.config import BackendConfig, Conflict, DeviceConfig

MIB = 1 << 20


def config_of(kind: str, options: dict[str, str | list[str]], **more: Any) -> DeviceConfig:
    return DeviceConfig(
        name="vol", backend=BackendConfig(kind=kind, options=options), isolation="none", **more
    )


class OpenParts(FakeParts):
    """A device that has a real store and a made-up kernel."""

    def __init__(self, config: DeviceConfig) -> None:
        super().__init__(config, fake_context())
        self.holder = KeepingHolder()
        self.store = InsideStore(config, ControlRunner(), self.holder)
        self.inside = self.store


class KeepingHolder(FakeHolder):
    """Keeps a descriptor by its name, as the real one does."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, int] = {}

    def hold(self, name: str, fd: int) -> None:
        self.kept[name] = os.dup(fd)

    def descriptor(self, name: str) -> int | None:
        return self.kept.get(name)

    def drop(self, name: str) -> None:
        os.close(self.kept.pop(name))


def in_loop(run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(run())


def is_locked(path: Path) -> bool:
    """Whether an open file of another process, or of this one, has the lock."""
    with path.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"backend": None}, "no backend is given"),
        ({"backend": BackendConfig(kind="http")}, "http runs only in a process"),
        ({"backend": BackendConfig(kind="null", user="daemon")}, "its user needs"),
        ({"backend": BackendConfig(kind="null", python="/usr/bin/python3")}, "its python needs"),
        ({"backend": BackendConfig(kind="null", layers=("readonly",))}, "its layers needs"),
        ({"placement": "backend"}, "use placement pool"),
        ({"client_buffers_bytes": 8 * MIB}, "use isolation process"),
        ({"on_timeout": "fail"}, "use on_timeout wait"),
        ({"backend": BackendConfig(kind="memory"), "need_get_data": False}, "turn it on"),
        ({"backend": BackendConfig(kind="rbd"), "queues": 2}, "serve a rbd store: use one queue"),
        ({"answers": "worker"}, "remove backend"),
        (
            {"backend": BackendConfig(kind="cow"), "queues": 2},
            "one alone can serve a cow store: use one queue",
        ),
    ],
)
def test_what_needs_a_process_is_refused(fields: dict[str, Any], names: str) -> None:
    plain = config_of("file", {"path": "/x"})
    with pytest.raises(Conflict, match=names):
        msgspec.structs.replace(plain, **fields)


def test_a_file_is_opened_and_locked_as_its_backend_would(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    hint = Hint("vol", tmp_path, max_io_bytes=MIB)
    opened = open_for_workers("file", {"path": str(path), "size": "1M"}, hint)
    assert isinstance(opened.storage, FileStorage) and opened.descriptors == (opened.storage.file,)
    assert (opened.attach.kind, opened.attach.size_bytes, opened.attach.placement) == ("file", MIB, "pool")
    assert opened.attach.identity is not None and opened.attach.identity.value.startswith("file:")
    assert is_locked(path)
    os.close(opened.storage.file)
    assert not is_locked(path)


def write(files: CowFiles, content: bytes) -> None:
    """What a worker does with its engine: write the disk's first bytes, and end without a word."""
    opened = files.opened()
    rig = NativeRig(opened, size_bytes=MIB, own_bytes=MIB, depth=1)
    rig.pool.view[: len(content)] = content
    request = Descriptor(
        Kind.REQUEST, Op.WRITE, tag=0, device=7, epoch=EPOCH, segment=SEGMENT_POOL, length=len(content)
    )
    answers = rig.say([request])
    while not answers:
        answers = rig.hear()
    assert [each.result for each in answers] == [len(content)]
    rig.close()
    opened.map.close()


def test_a_cow_disk_is_locked_with_its_base_and_read_again_by_the_next_worker(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    base.write_bytes(os.urandom(MIB))
    hint, options = Hint("vol", tmp_path, max_io_bytes=MIB), {"base": str(base), "overlay": str(overlay)}
    opened = open_for_workers("cow", options, hint)
    assert isinstance(opened.storage, CowFiles)
    assert opened.descriptors == (opened.storage.overlay, opened.storage.base)
    assert (opened.attach.size_bytes, opened.attach.placement) == (MIB, "pool")
    assert is_locked(overlay) and is_locked(base), "the base against writers"
    write(opened.storage, b"\x17" * 4096)
    for each in opened.descriptors:
        os.close(each)
    assert not is_locked(overlay) and not is_locked(base)
    again = open_for_workers("cow", options, hint._replace(may_create=False))
    assert isinstance(again.storage, CowFiles)
    found = again.storage.opened().map
    assert found.count_bytes(DATA) == 4096
    found.close()
    for each in again.descriptors:
        os.close(each)


def durable_bytes(overlay: Path) -> int:
    """What of the disk a power failure would leave in the overlay."""
    file = os.open(overlay, os.O_RDONLY)
    found = CowMap(file, read_head(file, overlay).layout, trusts_live=False)
    count = found.count_bytes(DATA)
    found.close()
    os.close(file)
    return count


def test_what_the_workers_of_a_cow_disk_wrote_is_durable_when_it_is_gone(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    base.write_bytes(bytes(MIB))

    async def run() -> None:
        parts = OpenParts(config_of("cow", {"base": str(base), "overlay": str(overlay)}))
        await parts.store.settle()
        assert not overlay.exists(), "nothing was served"
        await open_store(parts, parts.store)
        spec = parts.store.engine(DISK, 1)
        assert isinstance(spec.storage, CowFiles)
        assert spec.descriptors() == [spec.storage.overlay, spec.storage.base]
        write(spec.storage, b"\x17" * 8192)
        assert durable_bytes(overlay) == 0
        await parts.store.settle()
        assert durable_bytes(overlay) == 8192
        assert not is_locked(overlay)
        base.unlink()
        with pytest.raises(DaemonError, match=r"^vol: making its store durable: base=.*[Nn]o such file"):
            await parts.store.settle()

    in_loop(run)


@pytest.mark.parametrize("kind", ["file", "cow"])
def test_a_store_grows_while_workers_have_it_open_and_no_other_in_its_place(
    kind: str, tmp_path: Path
) -> None:
    path, base, options = tmp_path / "store", tmp_path / "base", {"path": "store", "size": "1M"}
    base.write_bytes(bytes(MIB))
    if kind == "cow":
        options = {"base": "base", "overlay": "store"}

    async def run() -> None:
        backend = BackendConfig(kind=kind, options=options, cwd=str(tmp_path))
        parts = OpenParts(msgspec.structs.replace(config_of(kind, {}), backend=backend))
        attach = await open_store(parts, parts.store)
        assert attach.identity is not None and is_locked(path)
        await parts.store.grow(attach.identity, MIB, 3 * MIB)
        assert served_bytes(path, kind) == 3 * MIB
        with pytest.raises(DaemonError, match=r"fewer than the device|its map has room for"):
            await parts.store.grow(attach.identity, 4 * MIB, 1 << 50)
        parts.store.forked()
        aside = path.rename(tmp_path / "aside")
        path.write_bytes(aside.read_bytes())
        with pytest.raises(DaemonError, match=rf"^vol: growing its store: .*=store: .*{path.stat().st_ino}"):
            await parts.store.grow(attach.identity, MIB, 4 * MIB)
        assert served_bytes(path, kind) == 3 * MIB

    in_loop(run)


def served_bytes(path: Path, kind: str) -> int:
    """The size of the disk in a store."""
    file = os.open(path, os.O_RDONLY)
    size_bytes = read_head(file, path).layout.size_bytes if kind == "cow" else os.fstat(file).st_size
    os.close(file)
    return size_bytes


def test_memory_that_workers_have_mapped_does_not_grow(tmp_path: Path) -> None:
    async def run() -> None:
        parts = OpenParts(config_of("memory", {"size": "1M"}))
        attach = await open_store(parts, parts.store)
        assert attach.identity is not None
        await parts.store.grow(attach.identity, MIB, MIB)
        with pytest.raises(DaemonError, match=r"sealed memory of 1M and cannot grow"):
            await parts.store.grow(attach.identity, MIB, 2 * MIB)
        parts.store.end(keep=False)

    in_loop(run)


@pytest.mark.parametrize(("size", "problem"), [("1M", ""), ("odd", "option size")])
def test_no_process_opens_what_has_no_store(
    size: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ControlRunner, "look", lambda *_: pytest.fail("a process was asked"))

    async def run() -> None:
        parts = OpenParts(config_of("null", {"size": size}))
        opening = parts.store.open(Hint("vol", tmp_path, max_io_bytes=MIB))
        if problem:
            with pytest.raises(DaemonError, match=f"^vol: null: {problem}"):
                await opening
            return
        assert (await opening).size_bytes == MIB
        assert parts.store.engine(DISK, 1).storage == NullStorage()

    in_loop(run)


def test_a_kept_memory_disk_is_opened_again_with_its_content_and_identity(tmp_path: Path) -> None:
    hint = Hint("vol", tmp_path, max_io_bytes=MIB)
    first = open_for_workers("memory", {"size": "1M"}, hint)
    assert isinstance(first.storage, MemoryStorage)
    served = hint._replace(may_create=False)
    again = open_for_workers("memory", {"size": "1M"}, served, os.dup(first.descriptors[0]))
    assert again.attach == first.attach and again.attach.segment_bytes == MIB
    with pytest.raises(BackendError, match=r"ended with the daemon that kept it.*rebind vol"):
        open_for_workers("memory", {"size": "1M"}, served)
    assert not (tmp_path / "memory-vol.keep").exists()


@pytest.mark.parametrize("kind", ["s3", "nbd"])
def test_another_kind_is_no_kind_for_workers(kind: str, tmp_path: Path) -> None:
    options = {"s3": {"url": "s3://bucket/x"}, "nbd": {"uri": "nbd://localhost"}}[kind]
    with pytest.raises(BackendError, match=rf"^{kind}: "):
        open_for_workers(kind, options, Hint("vol", tmp_path))


def test_the_lock_ends_with_the_workers_that_inherited_the_file(tmp_path: Path) -> None:
    path = tmp_path / "disk"

    async def run() -> None:
        parts = OpenParts(config_of("file", {"path": str(path), "size": "1M"}))
        await open_store(parts, parts.store)
        (file,) = parts.store.engine(parts.resources.disk or DISK, 1).descriptors()
        inherited = os.dup(file)
        parts.store.forked()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)
        assert is_locked(path)
        os.close(inherited)
        assert not is_locked(path)

    in_loop(run)


def test_a_store_that_is_away_or_another_one_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "disk"

    async def run() -> None:
        parts = OpenParts(config_of("file", {"path": str(path), "size": "1M"}))
        attach = await open_store(parts, parts.store)
        parts.resources.disk = msgspec.structs.replace(DISK, volatile_cache=True)
        await parts.binding.bind(attach, MIB)
        parts.binding.served()
        parts.store.forked()
        aside = path.rename(tmp_path / "aside")
        with pytest.raises(StoreAway, match=r"^vol: its store cannot be opened: path=.*no such file") as away:
            await reopen_store(parts, parts.store)
        assert is_shortage(away.value)
        path.write_bytes(bytes(MIB))
        with pytest.raises(StoreAway, match=r"is served from .*rebind vol"):
            await reopen_store(parts, parts.store)
        assert not is_locked(path), "a store that was refused is let go of"
        aside.rename(path)
        before = parts.binding.generation
        await reopen_store(parts, parts.store)
        assert is_locked(path) and parts.binding.generation == before + 1
        parts.store.forked()

    in_loop(run)


def test_a_memory_disk_stays_with_the_holder_until_its_device_is_gone(tmp_path: Path) -> None:
    async def run() -> None:
        parts = OpenParts(config_of("memory", {"size": "1M"}))
        await open_store(parts, parts.store)
        held = parts.holder.kept[disk_memory_name("vol")]
        os.pwrite(held, b"kept", 0)
        parts.store.end(keep=True)
        successor = InsideStore(parts.config, ControlRunner(), parts.holder)
        await successor.open(Hint("vol", tmp_path, may_create=False))
        (memory,) = successor.engine(DISK, 1).descriptors()
        assert os.pread(memory, 4, 0) == b"kept"
        successor.end(keep=False)
        assert parts.holder.kept == {}

    in_loop(run)


def test_a_store_that_cannot_be_opened_says_so_in_one_line(tmp_path: Path) -> None:
    async def run() -> None:
        parts = OpenParts(config_of("file", {"path": str(tmp_path / "none")}))
        with pytest.raises(DaemonError, match=r"^vol: path=.*no such file; with size=SIZE it is created$"):
            await open_store(parts, parts.store)

    in_loop(run)


CONNECTED = config_of("rbd", {"pool": "p", "image": "i"})


class AskedTeam(FakeTeam):
    """A worker that connects to its store, or says why it cannot."""

    def __init__(self, parts: OpenParts, reason: str = "") -> None:
        super().__init__()
        self._parts, self._reason = parts, reason
        self.owner_when_served = ""

    async def connect(self) -> str:
        if self._reason:
            raise DaemonError(f"vol: {self._reason}")
        return "10.0.0.1:0/9"

    async def serve(self) -> None:
        self.owner_when_served = self._parts.binding.owner


def test_a_worker_serves_once_the_name_under_which_it_has_locked_the_store_is_on_record() -> None:
    async def run() -> None:
        parts = OpenParts(CONNECTED)
        team = AskedTeam(parts)
        await connect(parts, team)
        assert team.owner_when_served == parts.binding.owner == "10.0.0.1:0/9"

    in_loop(run)


@pytest.mark.parametrize("is_started", [False, True])
def test_a_store_to_which_no_worker_can_connect_is_waited_for_once_there_is_a_disk(is_started: bool) -> None:
    async def run() -> None:
        parts = OpenParts(CONNECTED)
        kernel = FakeKernel()
        kernel.is_started = is_started
        parts.resources.kernel = kernel
        with pytest.raises(DaemonError, match=r"^vol: .*no monitor") as failed:
            await connect(parts, AskedTeam(parts, "no monitor"))
        assert is_shortage(failed.value) is is_started

    in_loop(run)


def test_a_worker_connects_with_what_is_on_record_and_to_no_other_kind_of_store() -> None:
    async def run() -> None:
        parts = OpenParts(CONNECTED)
        await parts.binding.locked_as("10.0.0.1:0/8")
        hint = hint_of(parts)
        assert (hint.former_owner, hint.takes_over) == ("10.0.0.1:0/8", False)
        parts.store._hint = hint
        spec = parts.store.engine(DISK, 3)
        assert spec.storage == Connect(
            "rbd", CONNECTED.backend.options if CONNECTED.backend else {}, None, hint, 3
        )
        assert spec.descriptors() == []
        plain = OpenParts(config_of("null", {"size": "1M"}))
        team = AskedTeam(plain)
        await connect(plain, team)
        assert team.owner_when_served == "" and not plain.store.connects

    in_loop(run)


def test_a_directory_that_the_workers_user_may_not_enter_keeps_no_worker_from_connecting(
    tmp_path: Path,
) -> None:
    before = Path.cwd()
    try:
        made = Connect("rbd", {"pool": "p", "image": "i"}, str(tmp_path / "gone"), Hint("vol", tmp_path), 1)
        assert isinstance(made.backend(), ConnectsInside) and Path.cwd() == before
        assert made._replace(cwd=str(tmp_path)).backend() and Path.cwd() == tmp_path
    finally:
        os.chdir(before)


def test_the_process_that_locked_a_store_has_ended_so_that_the_lock_names_none_that_lives(
    tmp_path: Path,
) -> None:
    """A lock names the process that took it.  A recovery that waits for a dead worker's I/O must not find it alive."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))

    async def run() -> None:
        parts = OpenParts(config_of("file", {"path": str(path)}))
        await parts.store.open(Hint("vol", tmp_path, max_io_bytes=MIB))
        (locker,) = store_users.lockers(path)
        assert store_users.is_dying(locker)
        parts.store.close()
        assert not is_locked(path)

    in_loop(run)
