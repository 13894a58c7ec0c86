"""What the log says about a store that fails and about the author's own exceptions."""

import errno
import logging
import os
import threading
from pathlib import Path

import pytest

from support.fakes.plain_backend import Plain
from support.fakes.worker import DEVICE, FakeWorker, serving
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk import loader
from ublkpool.bufpool.sdk.backend import Hint, check_properties
from ublkpool.bufpool.sdk.blame import PluginError, blamed
from ublkpool.bufpool.sdk.failures import KINDS_MAX, Failures, failures
from ublkpool.bufpool.sdk.serving import open_store
from ublkpool.bufpool.wire import Kind, Op


class DeadStore(Plain):
    def pread(self, buf: memoryview, offset: int) -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "the store at 10.0.0.1 refused")

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        raise OSError(errno.ENOSPC, "quota reached")


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.ERROR) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == level]


def test_the_first_failure_of_each_kind_is_logged_with_its_text_and_all_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, DeadStore()):
        for offset in range(0, 12 * 4096, 4096):
            request = worker.describe(Kind.REQUEST, Op.READ, offset, 4096)
            worker.send(0, [request])
            assert worker.answer_of(request).result == -errno.ECONNREFUSED
        assert worker.write(0, bytes(4096)) == -errno.ENOSPC
        counts = failures.counts()
    assert counts == {"read ECONNREFUSED": 12, "write ENOSPC": 1}
    assert lines(caplog) == [
        "read at 0 failed, answered ECONNREFUSED: the store at 10.0.0.1 refused (further ones are counted)",
        "read ECONNREFUSED: 10 failures so far",
        "write at 0 failed, answered ENOSPC: quota reached (further ones are counted)",
    ]
    summary = f"{DEVICE}: failed requests: read ECONNREFUSED 12, write ENOSPC 1"
    assert summary in lines(caplog, logging.WARNING)


class WithoutErrno(OSError):
    """As the exceptions of network libraries."""


@pytest.mark.parametrize(
    ("error", "number", "text"),
    [
        (WithoutErrno("no route to the bucket"), errno.EIO, "WithoutErrno: no route to the bucket"),
        (WithoutErrno("text", "text"), errno.EIO, "text"),
        (TimeoutError("timed out"), errno.EIO, "TimeoutError: timed out"),
        (
            OSError(errno.ENOENT, os.strerror(errno.ENOENT), "/store"),
            errno.ENOENT,
            "No such file or directory: /store",
        ),
        (OSError(100_000, "odd"), errno.EIO, "odd"),
        (BackendError("the bucket is gone"), errno.EINVAL, "BackendError: the bucket is gone"),
    ],
)
def test_a_store_s_error_is_no_bug_and_keeps_its_text(
    caplog: pytest.LogCaptureFixture, error: Exception, number: int, text: str
) -> None:
    assert Failures().answer(error, "write at 8192") == -number
    (record,) = caplog.records
    assert record.getMessage().startswith("write at 8192 failed, answered E") and text in record.getMessage()
    assert record.exc_info is None


def test_a_bug_in_a_request_names_the_author_s_file_and_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import json\ndef get_size(): return 8192\ndef pread(buf, offset):\n    json.loads('x')\n"
    )
    backend = loader.load(str(path), {})
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        for _ in range(2):
            request = worker.describe(Kind.REQUEST, Op.READ, 0, 4096)
            worker.send(0, [request])
            assert worker.answer_of(request).result == -errno.EIO
    (line,) = lines(caplog)
    assert f"{path}:4: JSONDecodeError: Expecting value" in line and "said once" in line


@pytest.mark.parametrize("threads", [1, 2])
def test_an_exception_whose_text_cannot_be_had_is_answered_and_the_device_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, threads: int
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        f"parallel = {threads}\nclass Odd(Exception):\n    def __str__(self): return self.nothing\n"
        "def get_size(): return 8192\ndef pread(buf, offset):\n    raise Odd\n"
    )
    backend = loader.load(str(path), {})
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        for _ in range(3):
            request = worker.describe(Kind.REQUEST, Op.READ, 0, 4096)
            worker.send(0, [request])
            assert worker.answer_of(request).result == -errno.EIO
    (line,) = lines(caplog)
    assert f"{path}:6: Odd: its __str__ raised AttributeError" in line


def test_kinds_and_log_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    counted = Failures()
    for number in range(1, 200):
        for _ in range(3):
            counted.answer(OSError(number, "x"), "read at 0")
    assert len(counted.counts()) == KINDS_MAX + 1
    assert sum(counted.counts().values()) == 3 * 199
    assert len(caplog.records) < 2 * KINDS_MAX


def test_failures_of_many_threads_are_all_counted() -> None:
    counted = Failures()

    def fail() -> None:
        for _ in range(1000):
            counted.answer(OSError(errno.EIO, "x"), "write at 0")

    threads = [threading.Thread(target=fail) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert counted.counts() == {"write EIO": 4000}


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("import os\n\n1 / 0", "{path}:3: ZeroDivisionError: division by zero"),
        ("x = 1\ndef f(:", "{path}:2: SyntaxError"),
        ("import no_such_module", "{path}:1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("import json\njson.loads('x\\n')", "{path}:2: JSONDecodeError"),
        ("raise SystemExit(3)", "{path}:1: SystemExit: 3"),
    ],
)
def test_an_exception_at_load_names_file_and_line(tmp_path: Path, code: str, line: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(BackendError) as caught:
        loader.load(str(path), {})
    assert str(caught.value).startswith(line.format(path=path))
    assert "\n" not in str(caught.value)


def test_an_exception_in_a_module_of_the_author_s_names_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    helper, path = tmp_path / "helper_of_mine.py", tmp_path / "mine.py"
    helper.write_text("\n{}['key']")
    path.write_text("import helper_of_mine")
    with pytest.raises(BackendError, match="KeyError: 'key'") as caught:
        loader.load(str(path), {})
    assert str(caught.value).startswith(f"{path}: {helper}:2: ")


OPENS = "def open():\n    {}\ndef get_size(): return 4096\ndef pread(buf, offset): pass\n"
CLASS = (
    "from ublkpool.bufpool.sdk.backend import Backend, Properties\n"
    "class Mine(Backend):\n"
    "    def open(self, hint):\n"
    "        {}\n"
)


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (OPENS.format("{}['bucket']"), "{path}:2: KeyError: 'bucket' (while the store was opened)"),
        (OPENS.format("open_it()"), "{path}:2: NameError"),
        (CLASS.format("raise RuntimeError('two\\nlines')"), "{path}:4: RuntimeError: two lines ("),
        (CLASS.format("return None"), "open() must return Properties, not None"),
        (
            CLASS.format("return Properties(size_bytes='1G')"),
            "the property size_bytes must be a whole number",
        ),
        (OPENS.replace("4096", "'1G'").format("pass"), "mine: get_size() must return bytes, not '1G'"),
        (OPENS.format("raise OSError(5, 'dead')"), "cannot open: [Errno 5] dead ({path}:2)"),
    ],
)
def test_an_exception_at_open_is_one_line_with_file_and_line(tmp_path: Path, code: str, line: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    backend = loader.load(str(path), {})
    with pytest.raises((PluginError, BackendError)) as caught:
        check_properties(open_store(backend, Hint("x", tmp_path)))
    shown = str(caught.value)
    assert shown.startswith(line.format(path=path)) and "\n" not in shown


def test_an_exception_without_a_line_is_still_named() -> None:
    assert blamed(KeyError("x")) == "KeyError: 'x'"
    assert blamed(RuntimeError()) == "RuntimeError"
