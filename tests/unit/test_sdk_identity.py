"""Identities: the stores that the SDK and the built-in backends name, and stores that are not made twice."""

from pathlib import Path

import msgspec
import pytest

from support.fakes.plain_backend import Plain
from support.fakes.worker import BackendThread, FakeWorker, finish, serving, spawn
from ublkpool.backends.file import FileBackend, FileOptions
from ublkpool.backends.memory import MemoryBackend, MemoryOptions
from ublkpool.backends.null import NullBackend, NullOptions
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Device, Hint, Properties
from ublkpool.bufpool.sdk.keeper import Keeper, keeper_path
from ublkpool.bufpool.sdk.serving import attach_message

EXAMPLES = Path(__file__).parents[2] / "examples"
MIB = 1 << 20


class Named(Plain):
    """Notes what it was told."""

    def __init__(self, **properties: object) -> None:
        super().__init__()
        self.properties = msgspec.structs.replace(self.properties, **properties)
        self.hint: Hint | None = None
        self.generation = 0

    def open(self, hint: Hint) -> Properties:
        self.hint = hint
        return super().open(hint)

    def started(self, device: Device) -> None:
        self.generation = device.generation


def attach_of(run_dir: Path, backend: Backend, **world: object) -> wire.Attach:
    with FakeWorker(run_dir) as worker:
        for name, value in world.items():
            setattr(worker, name, value)
        with serving(worker, backend):
            assert worker.attach is not None
            return worker.attach


def test_a_backend_is_told_its_generation_and_whether_it_may_make_a_store(tmp_path: Path) -> None:
    backend = Named()
    attach_of(tmp_path, backend, may_create=False, generation=42)
    assert backend.hint is not None
    assert (backend.hint.may_create, backend.generation) == (False, 42)
    assert Hint("vol0", tmp_path).may_create


@pytest.mark.parametrize(
    "properties",
    [{"identity": 7}, {"identity": b"abc"}, {"size_bytes": 4096.5}, {"identity": "latin-\udce9"}],
)
def test_properties_of_a_wrong_type_are_one_clear_line(properties: dict[str, object]) -> None:
    made = msgspec.structs.replace(Properties(size_bytes=4096), **properties)
    with pytest.raises(BackendError, match="mine") as refused:
        attach_message(made, "vol0", "mine")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        ("uuid-1", wire.Identity(value="uuid-1", store="uuid-1")),
        (wire.Identity(in_boot="x", strength="weak"), wire.Identity(in_boot="x", strength="weak")),
        (None, wire.Identity(value="kind:named", strength="weak", store="backend named")),
    ],
)
def test_a_backend_says_which_store_it_serves_or_of_which_kind_it_is(
    tmp_path: Path, identity: object, said: wire.Identity
) -> None:
    attach = attach_of(tmp_path, Named(identity=identity, generation_seen=7))
    assert (attach.identity, attach.generation_seen) == (said, 7)


def test_an_older_daemon_gets_no_field_that_it_does_not_know(tmp_path: Path) -> None:
    backend = Named(identity="uuid-1", generation_seen=7)
    attach = attach_of(tmp_path, backend, may_create=None)
    assert (attach.identity, attach.generation_seen) == (None, 0)
    assert b"identity" not in wire.encode_message(attach)
    assert b"generation" not in wire.encode_message(attach)
    assert backend.hint is not None and backend.hint.may_create


def hint(run_dir: Path, may_create: bool) -> Hint:
    return Hint("vol0", run_dir, size_bytes=MIB, may_create=may_create)


def file_backend(path: Path) -> FileBackend:
    return FileBackend(FileOptions(path=path, size=MIB))


def test_a_file_is_made_for_a_device_that_was_never_served_and_later_never_again(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    backend = file_backend(path)
    first = backend.open(hint(tmp_path, True))
    backend.close()
    assert path.stat().st_size == MIB
    again = backend.open(hint(tmp_path, False))
    backend.close()
    assert again.identity == first.identity
    path.unlink()
    with pytest.raises(BackendError, match=r"a\.img: no such file, and this device has been served before"):
        file_backend(path).open(hint(tmp_path, False))
    assert not path.exists()


@pytest.mark.parametrize("left", [0, 1, MIB - 1])
def test_a_file_that_is_empty_or_short_is_not_grown(tmp_path: Path, left: int) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(left))
    with pytest.raises(BackendError, match=r"a\.img: "):
        file_backend(path).open(hint(tmp_path, False))
    assert path.stat().st_size == left


def test_a_memory_disk_is_made_for_a_device_that_was_never_served_and_adopted_later(tmp_path: Path) -> None:
    backends = [MemoryBackend(MemoryOptions(size=MIB)) for _ in range(3)]
    try:
        first = backends[0].open(hint(tmp_path, True))
        assert first.identity == backends[1].open(hint(tmp_path, False)).identity
    finally:
        Keeper(keeper_path(tmp_path, "vol0")).drop()
    with pytest.raises(BackendError, match=r"ended with its keeper.*ublkpool rebind vol0"):
        backends[2].open(hint(tmp_path, False))


def test_a_memory_disk_is_made_anew_after_the_rebind_that_its_refusal_names(tmp_path: Path) -> None:
    try:
        assert MemoryBackend(MemoryOptions(size=MIB)).open(hint(tmp_path, False)._replace(takes_next=True))
    finally:
        Keeper(keeper_path(tmp_path, "vol0")).drop()


def test_the_daemons_rebind_reaches_the_next_backend(tmp_path: Path) -> None:
    backend = Named()
    attach_of(tmp_path, backend, may_create=False, takes_next=True)
    assert backend.hint is not None
    assert backend.hint.takes_next and not backend.hint.may_create


def test_rebind_makes_no_file_where_one_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"a\.img: no such file"):
        file_backend(tmp_path / "a.img").open(hint(tmp_path, False)._replace(takes_next=True))
    assert not keeper_path(tmp_path, "vol0").exists(), "an empty one is not even kept"


@pytest.mark.parametrize(
    "backend", [NullBackend(NullOptions(size=MIB)), MemoryBackend(MemoryOptions(size=MIB, keep=False))]
)
def test_a_backend_that_stores_nothing_always_has_the_same_identity(tmp_path: Path, backend: Backend) -> None:
    opened = [backend.open(hint(tmp_path, False)) for _ in range(2)]
    first, second = (each.identity for each in opened if isinstance(each, Properties))
    assert isinstance(first, wire.Identity) and first == second and first.value and not first.in_boot


def test_functions_may_name_their_store(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    seen = []
    for _ in range(2):
        path.write_bytes(bytes(8192))
        with FakeWorker(tmp_path) as worker:
            process = spawn(tmp_path, EXAMPLES / "file_functions.py", {"path": str(path)})
            identity = worker.accept().identity
            worker.detach()
            assert finish(process)[0] == 0
        assert identity is not None
        seen.append(identity)
        path.rename(tmp_path / "away.img")
    assert (seen[0].value, seen[0].in_boot) != (seen[1].value, seen[1].in_boot)


def test_an_example_makes_its_file_once(tmp_path: Path) -> None:
    options = {"path": str(tmp_path / "disk"), "size": "1M"}
    with FakeWorker(tmp_path) as worker:
        process = spawn(tmp_path, EXAMPLES / "demo_batch.py", options)
        worker.accept()
        worker.detach()
        assert finish(process)[0] == 0
    (tmp_path / "disk").unlink()
    with FakeWorker(tmp_path) as worker:
        worker.may_create = False
        process = spawn(tmp_path, EXAMPLES / "demo_batch.py", options)
        worker.answer_question()
        status, said = finish(process)
    assert status != 0 and "No such file" in said and not (tmp_path / "disk").exists()


def test_a_refusal_ends_the_backend_with_the_reason(tmp_path: Path) -> None:
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(Named(), tmp_path)
        worker.receive_attach()
        worker.tell(wire.Refused(reason="device vol0 is served from A, this backend brings B"))
        with pytest.raises(Exception, match="served from A, this backend brings B"):
            thread.join()


@pytest.mark.parametrize(
    ("found", "option", "size", "served"),
    [(4, 2, 2, 3), (3, 2, 2, 3), (2, 2, 2, 2), (2, 0, 0, 2), (2, 0, 1, 1), (2, 1, 1, 1)],
)
def test_after_rebind_a_copy_is_served_as_the_device_was_grown_and_an_earlier_store_as_it_is(
    tmp_path: Path, found: int, option: int, size: int, served: int
) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(found * MIB))
    known = hint(tmp_path, False)._replace(resized_bytes=3 * MIB, size_bytes=size * MIB)
    backend = FileBackend(FileOptions(path=path, size=option * MIB))
    if found < 3:
        with pytest.raises(BackendError, match=f"has {found * MIB} bytes, fewer than size=3M"):
            backend.open(known)
    properties = backend.open(known._replace(takes_next=True))
    assert isinstance(properties, Properties) and properties.size_bytes == served * MIB
    backend.close()
    assert path.stat().st_size == found * MIB


def test_rebind_accepts_no_file_that_is_shorter_than_its_own_option(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(MIB))
    known = hint(tmp_path, False)._replace(resized_bytes=3 * MIB, takes_next=True)
    with pytest.raises(BackendError, match=f"has {MIB} bytes, fewer than size=2M"):
        FileBackend(FileOptions(path=path, size=2 * MIB)).open(known)
