"""Plugins of nbdkit: their requests, what a failure answers, and a device served by one."""

import errno
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from support.fakes.worker import FakeWorker, finish, serving, spawn
from support.nbdkit.plugins import (
    FIRST_VERSION,
    FLUSHES,
    NEEDED,
    SIZE,
    WRITES,
    ZERO,
    Plugin,
    calls,
    failure_of,
    opened,
)
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.nbdkit.plugin import CALLBACKS_IGNORED
from ublkpool.bufpool.wire import Flag, Kind, Op

# Requests.


def test_pread_and_pwrite_get_the_memory_of_the_request(plugin: Plugin) -> None:
    keeps = "".join(f"def {each}(h, buf, offset, flags): calls.append(buf)\n" for each in ("pread", "pwrite"))
    backend = plugin(NEEDED, keeps)
    opened(backend)
    calls()
    memory = bytearray(4096)
    backend.pread(memoryview(memory), 0)
    backend.pwrite(memoryview(memory), 0, False)
    to_fill, to_store = calls()
    assert to_fill.obj is memory and to_store.obj is memory
    assert not to_fill.readonly and to_store.readonly


def test_the_return_value_of_pread_and_pwrite_means_nothing(plugin: Plugin) -> None:
    backend = plugin(
        NEEDED, "def pread(h, buf, offset, flags): return 3\ndef pwrite(h, buf, offset, flags): return 'x'\n"
    )
    opened(backend)
    backend.pread(memoryview(bytearray(512)), 0)
    backend.pwrite(memoryview(bytes(512)), 0, True)


def test_version_1_has_no_flags_and_pread_returns_the_data(plugin: Plugin) -> None:
    backend = plugin(FIRST_VERSION, "def can_fua(h): return 2\n")
    opened(backend)
    data = bytes(range(256)) * 2
    backend.pwrite(memoryview(data), 1024, True)
    read = bytearray(512)
    backend.pread(memoryview(read), 1024)
    backend.flush()
    backend.trim(0, 512)
    backend.zero(512, 512, True)
    assert read == data
    assert calls() == [
        ("pwrite", 512, 1024),
        ("flush",),
        ("pread", 512, 1024),
        ("flush",),
        ("trim", 512, 0),
        ("zero", 512, 512, True),
    ]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("None", "returned None, not a buffer"),
        ("bytes(count - 1)", "returned 511 bytes, 512 were asked for"),
        ("'x' * 512", "not a buffer"),
    ],
)
def test_version_1_must_return_enough_data(
    plugin: Plugin, answer: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = plugin(FIRST_VERSION, f"def pread(h, count, offset): return {answer}\n")
    opened(backend)
    assert failure_of(lambda: backend.pread(memoryview(bytearray(512)), 0)) == errno.EIO
    assert said in caplog.text


def test_version_1_may_return_more_data_than_asked_for(plugin: Plugin) -> None:
    backend = plugin(FIRST_VERSION, "def pread(h, count, offset): return b'ab' * count\n")
    opened(backend)
    read = bytearray(512)
    backend.pread(memoryview(read), 0)
    assert read == b"ab" * 256


@pytest.mark.parametrize(
    ("can_fua", "made"),
    [
        ("", [("pwrite", 512, 0, 0), ("flush", 0)]),
        ("def can_fua(h): return nbdkit.FUA_NONE\n", [("pwrite", 512, 0, 0), ("flush", 0)]),
        ("def can_fua(h): return False\n", [("pwrite", 512, 0, 0), ("flush", 0)]),
        ("def can_fua(h): return nbdkit.FUA_EMULATE\n", [("pwrite", 512, 0, 0), ("flush", 0)]),
        ("def can_fua(h): return True\n", [("pwrite", 512, 0, 0), ("flush", 0)]),
        ("def can_fua(h): return nbdkit.FUA_NATIVE\n", [("pwrite", 512, 0, 2)]),
    ],
)
def test_can_fua_decides_between_the_flag_and_a_flush(plugin: Plugin, can_fua: str, made: list[Any]) -> None:
    backend = plugin(NEEDED, WRITES, FLUSHES, can_fua)
    opened(backend)
    calls()
    backend.pwrite(memoryview(bytes(512)), 0, True)
    assert calls() == made
    backend.pwrite(memoryview(bytes(512)), 0, False)
    assert calls() == [("pwrite", 512, 0, 0)]


def test_a_plugin_with_fua_and_without_flush_gets_the_flag_with_each_write(plugin: Plugin) -> None:
    """Such a disk has no volatile cache, so the kernel asks for no FUA: every answer promises to survive power loss."""
    trims = "def trim(h, count, offset, flags): calls.append(('trim', flags))\n"
    backend = plugin(NEEDED, WRITES, trims, "def can_fua(h): return nbdkit.FUA_NATIVE\n")
    assert not opened(backend).volatile_cache
    calls()
    backend.pwrite(memoryview(bytes(512)), 0, False)
    backend.trim(0, 512)
    assert calls() == [("pwrite", 512, 0, 2), ("trim", 2)]


@pytest.mark.parametrize("answer", ["3", "-1", "'x'", "None"])
def test_a_can_fua_that_is_no_constant_is_refused(plugin: Plugin, answer: str) -> None:
    with pytest.raises(BackendError, match=r"can_fua\(\)"):
        opened(plugin(NEEDED, WRITES, f"def can_fua(h): return {answer}\n"))


def test_trim_gets_lengths_of_32_bits(plugin: Plugin) -> None:
    backend = plugin(
        NEEDED, WRITES, "def trim(h, count, offset, flags): calls.append((count, offset, flags))\n"
    )
    opened(backend)
    calls()
    backend.trim(512, 5 << 30)
    made = calls()
    assert sum(count for count, _, _ in made) == 5 << 30
    assert [offset for _, offset, _ in made] == [512, *(n << 30 for n in range(1, 6))]
    assert all(count <= 1 << 30 and flags == 0 for count, _, flags in made)


@pytest.mark.parametrize(("may_unmap", "flags"), [(True, 1), (False, 0)])
def test_zero_gets_may_trim(plugin: Plugin, may_unmap: bool, flags: int) -> None:
    backend = plugin(NEEDED, WRITES, ZERO)
    opened(backend)
    calls()
    backend.zero(512, 4096, may_unmap)
    assert calls() == [("zero", 4096, 512, flags)]


@pytest.mark.parametrize(
    ("can_fua", "made"), [("1", [("zero", 512, 0, 1), ("flush", 0)]), ("2", [("zero", 512, 0, 3)])]
)
def test_zero_with_fua_gets_the_flag_or_a_flush(plugin: Plugin, can_fua: str, made: list[Any]) -> None:
    backend = plugin(NEEDED, WRITES, FLUSHES, ZERO, f"def can_fua(h): return {can_fua}\n")
    opened(backend)
    calls()
    backend.zero_durably(0, 512, True)
    assert calls() == made


@pytest.mark.parametrize(
    "refusal",
    [
        "nbdkit.set_error(errno.EOPNOTSUPP); raise Exception",
        "nbdkit.set_error(errno.ENOTSUP); raise RuntimeError('no')",
        "nbdkit.set_error(errno.EOPNOTSUPP)",
        "raise OSError(errno.EOPNOTSUPP, 'no')",
    ],
)
def test_a_zero_that_is_not_supported_becomes_writes(
    plugin: Plugin, refusal: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = plugin(NEEDED, WRITES, f"def zero(h, count, offset, flags): {refusal}\n")
    opened(backend)
    backend.pwrite(memoryview(b"x" * SIZE), 0, False)
    calls()
    backend.zero(512, (1 << 20) - 1024, True)
    disk = sys.modules["__main__"].__dict__["disk"]
    assert disk == b"x" * 512 + bytes(SIZE - 1024) + b"x" * 512
    assert {each[0] for each in calls()} == {"pwrite"} and caplog.text == ""


def test_a_zero_that_fails_otherwise_writes_nothing(plugin: Plugin) -> None:
    backend = plugin(
        NEEDED,
        WRITES,
        "def zero(h, count, offset, flags):\n    nbdkit.set_error(errno.ENOSPC)\n    raise Exception\n",
    )
    opened(backend)
    calls()
    assert failure_of(lambda: backend.zero(0, 512, True)) == errno.ENOSPC
    assert calls() == []


@pytest.mark.parametrize("name", CALLBACKS_IGNORED)
def test_callbacks_that_no_disk_needs_are_accepted_and_not_called(plugin: Plugin, name: str) -> None:
    backend = plugin(NEEDED, WRITES, FLUSHES, ZERO, f"def {name}(*arguments): calls.append('ignored')\n")
    opened(backend)
    backend.pread(memoryview(bytearray(512)), 0)
    backend.pwrite(memoryview(bytes(512)), 0, True)
    backend.zero(0, 512, True)
    assert "ignored" not in calls()


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ("SERIALIZE_CONNECTIONS", False),
        ("SERIALIZE_ALL_REQUESTS", False),
        ("SERIALIZE_REQUESTS", False),
        ("PARALLEL", True),
    ],
)
def test_thread_model_decides_how_many_requests_run_at_once(
    plugin: Plugin, model: str, parallel: bool
) -> None:
    backend = plugin(NEEDED, f"def thread_model(): return nbdkit.THREAD_MODEL_{model}\n")
    assert (backend.parallel > 1) is parallel
    assert plugin(NEEDED).parallel <= 1


@pytest.mark.parametrize("model", ["4", "-1", "'PARALLEL'"])
def test_a_thread_model_that_is_no_constant_is_refused(plugin: Plugin, model: str) -> None:
    with pytest.raises(BackendError, match=r"thread_model\(\)"):
        plugin(NEEDED, f"def thread_model(): return {model}\n")


# Failures.


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("raise RuntimeError('broken')", errno.EIO),
        ("raise OSError(errno.ENOSPC, 'full')", errno.ENOSPC),
        ("raise OSError('no number')", errno.EIO),
        ("nbdkit.set_error(errno.EROFS); raise RuntimeError", errno.EROFS),
        ("nbdkit.set_error(errno.EROFS); raise OSError(errno.ENOSPC, 'full')", errno.EROFS),
        ("nbdkit.set_error(errno.ETIMEDOUT)", errno.ETIMEDOUT),
        ("nbdkit.set_error(0); raise RuntimeError", errno.EIO),
        ("nbdkit.set_error(-5); raise RuntimeError", errno.EIO),
        ("nbdkit.set_error(99999); raise RuntimeError", errno.EIO),
        ("raise SystemExit(1)", errno.EIO),
    ],
)
def test_a_failed_callback_answers_its_errno(plugin: Plugin, body: str, code: int) -> None:
    backend = plugin(NEEDED, f"def pread(h, buf, offset, flags):\n    {body}\n")
    opened(backend)
    assert failure_of(lambda: backend.pread(memoryview(bytearray(512)), 0)) == code


def test_an_error_of_one_callback_is_not_that_of_the_next(plugin: Plugin) -> None:
    code = "nbdkit.set_error(errno.EPERM)\ndef pwrite(h, buf, offset, flags): raise RuntimeError\n"
    backend = plugin(
        NEEDED, "def open(readonly):\n    nbdkit.set_error(errno.EPERM)\n    return {'fd': 7}\n", code
    )
    opened(backend)
    backend.pread(memoryview(bytearray(512)), 0)
    assert failure_of(lambda: backend.pwrite(memoryview(bytes(512)), 0, False)) == errno.EIO


@pytest.mark.parametrize(
    ("body", "code"), [("deep()", errno.EIO), ("nbdkit.set_error(28); deep()", errno.ENOSPC)]
)
def test_a_failure_is_logged_once_with_its_file_and_line(
    tmp_path: Path, plugin: Plugin, caplog: pytest.LogCaptureFixture, body: str, code: int
) -> None:
    broken = f"def deep(): raise RuntimeError('short write')\ndef pwrite(h, buf, offset, flags): {body}\n"
    backend = plugin("import nbdkit\n", broken, NEEDED)
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        results = {worker.write(each * 4096, bytes(512)) for each in range(3)}
    lines = [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]
    assert results == {-code} and len(lines) == 1
    assert "RuntimeError: short write" in lines[0] and "plugin.py:2" in lines[0] and "write" in lines[0]


# Over the wire.


def test_a_plugin_serves_a_device(tmp_path: Path, plugin: Plugin, transport: str) -> None:
    backend = plugin(NEEDED, WRITES, FLUSHES, ZERO, "def can_fua(h): return nbdkit.FUA_NATIVE\n")
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        assert worker.attach is not None and worker.attach.volatile_cache
        calls()
        assert worker.write(4096, b"d" * 4096, flags=int(Flag.FUA)) == 4096
        assert worker.read(4096, 4096) == b"d" * 4096
        assert worker.do(Op.FLUSH) == 0
        assert worker.do(Op.WRITE_ZEROES, 0, 8192, flags=int(Flag.FUA)) == 0
        assert calls() == [
            ("pwrite", 4096, 4096, 2),
            ("pread", 4096, 4096, 0),
            ("flush", 0),
            ("zero", 8192, 0, 3),
        ]


AT_ONCE = """
import threading
meeting = threading.Barrier(3)
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def pread(h, buf, offset, flags):
    if offset == 4096: nbdkit.set_error(errno.ENOSPC)
    meeting.wait(60)
    if offset == 8192: raise RuntimeError
"""


def test_parallel_requests_run_at_once_and_have_errors_of_their_own(
    tmp_path: Path, plugin: Plugin, transport: str
) -> None:
    backend = plugin(NEEDED, AT_ONCE)
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        requests = [worker.describe(Kind.REQUEST, Op.READ, tag * 4096, 512, tag=tag) for tag in range(3)]
        worker.send(0, requests)
        results = {answer.tag: answer.result for answer in (worker.receive() for _ in requests)}
    assert [results[tag] for tag in range(3)] == [512, -errno.ENOSPC, -errno.EIO]


def test_serial_requests_run_one_after_the_other_on_one_thread(tmp_path: Path, plugin: Plugin) -> None:
    code = "import threading\ndef pread(h, buf, offset, flags): calls.append(threading.get_ident())\n"
    backend = plugin(NEEDED, code, "def thread_model(): return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS\n")
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        calls()
        worker.send(0, [worker.describe(Kind.REQUEST, Op.READ, tag * 4096, 512, tag=tag) for tag in range(4)])
        for _ in range(4):
            assert worker.receive().result == 512
        assert len(set(calls())) == 1


@pytest.mark.parametrize("model", ["SERIALIZE_REQUESTS", "PARALLEL"])
def test_a_zero_with_fua_gets_the_flag_from_every_thread_model(
    tmp_path: Path, plugin: Plugin, model: str
) -> None:
    code = (
        f"def thread_model(): return nbdkit.THREAD_MODEL_{model}\ndef can_fua(h): return nbdkit.FUA_NATIVE\n"
    )
    backend = plugin(NEEDED, WRITES, FLUSHES, ZERO, code)
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        calls()
        assert worker.do(Op.WRITE_ZEROES, 0, 4096, flags=int(Flag.FUA | Flag.NOUNMAP)) == 0
        assert calls() == [("zero", 4096, 0, 2)]


def test_the_memory_that_a_plugin_gets_is_the_pool(tmp_path: Path, plugin: Plugin) -> None:
    code = "def pwrite(h, buf, offset, flags): calls.append(buf)\n"
    backend = plugin(NEEDED, code)
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        calls()
        assert worker.write(0, b"a" * 4096) == 4096
        (kept,) = calls()
        assert bytes(kept) == b"a" * 4096
        place = worker.buffer_of(0)
        worker.pool[place : place + 4096] = b"b" * 4096
        assert bytes(kept) == b"b" * 4096
        kept.release()


def test_an_odd_size_is_rounded_down_with_a_warning(
    tmp_path: Path, plugin: Plugin, caplog: pytest.LogCaptureFixture
) -> None:
    backend = plugin(NEEDED, "def get_size(h): return 1000\n")
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        assert worker.attach is not None and worker.attach.size_bytes == 512
    assert "the last 488 bytes are not a block and not served" in caplog.text


@pytest.mark.parametrize(
    "where", ["def get_ready(): nbdkit.shutdown()", "def flush(h, flags): nbdkit.shutdown()"]
)
def test_shutdown_ends_the_process_with_status_0(tmp_path: Path, where: str) -> None:
    path = tmp_path / "plugin.py"
    path.write_text(NEEDED + f"{where}\ndef cleanup(): print('cleaned up', file=__import__('sys').stderr)\n")
    with FakeWorker(tmp_path) as worker:
        process = spawn(tmp_path, path)
        if "flush" in where:
            worker.accept()
            assert worker.do(Op.FLUSH) == 0
        else:
            # It ends at once, and ZeroMQ drops a HELLO that it could not deliver within a second.
            worker.answer_attach()
        status, log = finish(process)
    assert status == 0 and "ending after nbdkit.shutdown()" in log and "cleaned up" in log
