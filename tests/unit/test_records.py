"""Records that a killed daemon leaves, and the processes on them that are still the same."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

import ublkpool
from support.fakes.descriptors import no_descriptor_left
from ublkpool.daemon.device import records
from ublkpool.daemon.device.disk import Disk
from ublkpool.daemon.device.records import Record, Records, end_left
from ublkpool.daemon.doctor.leftovers import read_records
from ublkpool.daemon.errors import DaemonError
from ublkpool.daemon.processes import children, left_behind
from ublkpool.daemon.processes.children import Child
from ublkpool.daemon.processes.left_behind import Process, Role, identify
from ublkpool.daemon.settings.config import DeviceConfig

DISK = Disk(size_bytes=1 << 20, block_bytes=512, volatile_cache=False, read_only=False)
STUBBORN = (
    "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
)


def record(*processes: Process, name: str = "vol0", epoch: int = 1) -> Record:
    return Record(
        config=DeviceConfig(name=name), device_number=3, disk=DISK, epoch=epoch, processes=processes
    )


@contextmanager
def process(program: str) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        try:
            yield running
        finally:
            running.kill()


def known(role: Role, pid: int) -> Process:
    found = identify(role, pid)
    assert found is not None
    return found


DEFAULTS = {
    "size_bytes": None,
    "queues": 1,
    "depth": 128,
    "id": None,
    "max_io_bytes": 512 << 10,
    "need_get_data": True,
    "placement": "pool",
    "answers": "backend",
    "recovery": "reissue",
    "read_only": False,
    "partitions": True,
    "rings": True,
    "spin_us": None,
    "pool_bytes": None,
    "huge_pages": "auto",
    "affinity": "auto",
    "client_buffers_bytes": 0,
    "io_timeout_s": 30.0,
    "on_timeout": "wait",
    "absent_timeout_s": 60.0,
    "on_absent": "wait",
    "iops_max": 0,
    "bytes_per_s_max": 0,
    "burst_s": 0.1,
    "backend": None,
    "isolation": "process",
    "zero_copy": False,
}
"""Records leave these out: one that changed would change the devices of earlier versions."""


def test_a_record_has_only_the_fields_of_its_config_that_differ_from_the_defaults() -> None:
    """An earlier version refuses fields that it does not know, and with them the device."""
    written = msgspec.json.decode(msgspec.json.encode(Record(config=DeviceConfig(name="vol0", depth=64))))
    assert written["config"] == {"name": "vol0", "depth": 64}
    assert msgspec.structs.asdict(DeviceConfig(name="vol0")) == {"name": "vol0", **DEFAULTS}


def test_a_record_comes_back_as_it_was_and_the_last_one_counts(tmp_path: Path) -> None:
    store = Records(tmp_path / "devices")
    store.save(record())
    store.save(record(Process("worker", 7, 8), epoch=2))
    assert store.load() == [record(Process("worker", 7, 8), epoch=2)]


def test_records_that_cannot_be_listed_are_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Records(tmp_path / "devices")
    assert store.load() == []
    store.save(record())

    def refuse(*_: object) -> object:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DaemonError, match=r"devices: Permission denied"):
        store.load()


def test_a_full_file_system_keeps_no_record_from_being_replaced_and_names_the_first_that_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Records(tmp_path / "devices")
    store.save(record())

    def full(fd: int, offset: int, length: int) -> None:
        if os.fstat(fd).st_size < offset + length:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    for epoch in range(2, 6):
        store.save(record(epoch=epoch))
        assert store.load() == [record(epoch=epoch)]
    with pytest.raises(
        DaemonError, match=r"vol1.json: cannot be written: No space left .* its file system is full"
    ):
        store.save(record(name="vol1"))
    assert store.load() == [record(epoch=5)]
    for name in ("vol0", "vol1"):
        store.forget(name)
    assert list((tmp_path / "devices").iterdir()) == []


def test_where_files_cannot_be_exchanged_a_record_is_replaced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Records(tmp_path / "devices")
    monkeypatch.setattr(records, "_libc", SimpleNamespace(renameat2=lambda *_: -1))
    for epoch in range(1, 4):
        store.save(record(epoch=epoch))
        assert store.load() == [record(epoch=epoch)]


def test_a_forgotten_device_has_no_record(tmp_path: Path) -> None:
    store = Records(tmp_path / "devices")
    store.save(record())
    store.forget("vol0")
    store.forget("never was")
    assert store.load() == []


BAD = msgspec.json.encode(record(name="bad"))
DAMAGED = {
    "cut": BAD[:-9],
    "no text": BAD.replace(b"bad", b"b\xffd"),
    "nested": b'{"processes":' + b'[{"x":' * 100_000,
    "nested where fields are skipped": b'{"disk":{"x":' + b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_does_not_hide_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    store = Records(tmp_path / "devices")
    store.save(record(name="good"))
    (tmp_path / "devices" / "bad.json").write_bytes(content)
    assert read_records(tmp_path).unreadable == ["bad.json"]
    assert [each.config.name for each in store.load()] == ["good"]
    assert "bad.json: not a record" in caplog.text


def test_a_recorded_worker_is_killed_at_once() -> None:
    with process(STUBBORN) as worker:
        asyncio.run(end_left([record(known("worker", worker.pid))]))
        assert worker.wait() == -signal.SIGKILL


def test_a_recorded_backend_may_finish_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_behind, "PATIENCE_S", 60.0)
    # Blocked, because a signal just before `signal.pause` would be handled after it.
    polite = (
        "import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {15}); print(1, flush=True); "
        "signal.sigwait({15}); sys.exit(5)"
    )
    with process(polite) as backend:
        asyncio.run(end_left([record(known("backend", backend.pid))]))
        assert backend.wait() == 5


def test_a_backend_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_behind, "PATIENCE_S", 0.01)
    with process(STUBBORN) as backend:
        asyncio.run(end_left([record(known("backend", backend.pid))]))
        assert backend.wait() == -signal.SIGKILL


def test_another_process_with_the_same_number_is_left_alone() -> None:
    with process(STUBBORN) as stranger:
        before = known("worker", stranger.pid)
        asyncio.run(end_left([record(Process("worker", before.pid, before.start_ticks - 1))]))
        assert stranger.poll() is None


def test_a_process_that_is_gone_counts_as_ended() -> None:
    with process("print(1)") as gone:
        gone.wait()
        asyncio.run(end_left([record(Process("worker", gone.pid, 1))]))
    assert identify("worker", gone.pid) is None
    assert identify("worker", os.getpid()) == identify("worker", os.getpid())


def test_a_child_is_looked_at_once_and_is_on_no_record_when_its_end_was_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        with process(STUBBORN) as left:
            child = Child(left.pid)
            assert child.identified("worker") == identify("worker", left.pid)
            with monkeypatch.context() as closed:
                closed.setattr(children, "identify", lambda *_: pytest.fail("read again"))
                assert child.identified("worker") == identify("worker", left.pid)
            await child.kill()
            assert child.identified("worker") is None

    asyncio.run(run())


def test_a_process_that_cannot_be_looked_at_is_not_taken_for_dead() -> None:
    """Its store would get a second server."""

    async def end(left: Process) -> None:
        with no_descriptor_left(), pytest.raises(DaemonError, match="cannot be ended"):
            await end_left([record(left)])
        with no_descriptor_left(), pytest.raises(OSError, match="Too many open files"):
            identify("backend", left.pid)

    with process(STUBBORN) as backend:
        asyncio.run(end(known("backend", backend.pid)))
        assert backend.poll() is None


def test_any_module_that_changes_makes_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an upgrade would keep the old workers."""
    root = Path(ublkpool.__file__).parent
    modules = [
        each.relative_to(root)
        for kind in ("py", "so")
        for folder in (each for each in root.iterdir() if each.is_dir())
        for each in folder.rglob(f"*.{kind}")
    ]
    assert {Path("daemon/device/device.py"), Path("bufpool/wire/descriptors.py")} < set(modules)
    for each in modules:
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_text("")
    monkeypatch.setattr(ublkpool, "__file__", str(tmp_path / "__init__.py"))
    builds = {records.build_id()}
    for each in modules:
        (tmp_path / each).write_text("changed")
        builds.add(records.build_id())
    assert len(builds) == 1 + len(modules)


def test_a_folder_that_a_user_may_not_read_is_not_a_part_of_the_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as `__pycache__` of a root with another umask."""
    scan, closed = os.scandir, str(Path(ublkpool.__file__).parent / "ublk")

    def refuse(path: str) -> object:
        if str(path) == closed:
            raise PermissionError
        return scan(path)

    whole = records.build_id()
    monkeypatch.setattr(os, "scandir", refuse)
    assert records.build_id() != whole
