"""A request that is never answered does not keep a backend alive, and the log names it."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.fakes.worker import DEVICE, FakeWorker, finish
from ublkpool.bufpool.sdk import blame, ending
from ublkpool.bufpool.wire import Kind, Op

pytestmark = pytest.mark.usefixtures("transport")
MAIN = """
import logging, sys; from pathlib import Path
from ublkpool.bufpool.sdk import ending, loader
from ublkpool.bufpool.sdk.serving import serve
logging.basicConfig(level=logging.INFO)
plugin, run_dir, patience_s = sys.argv[1:]
ending.STUCK_PATIENCE_S = float(patience_s)
backend = loader.load(plugin, {})
sys.exit(serve(backend, device="testdisk", run_dir=Path(run_dir), wait_s=10, end_patience_s=float(patience_s)))
"""
FUNCTIONS = """
import hashlib, sys, threading
def get_size(): return 1 << 20
def pread(buf, offset): pass
def pwrite(buf, offset):
    print("begun", file=sys.stderr, flush=True)
    {}
"""
IN_PYTHON, LINE_IN_PYTHON = FUNCTIONS.format("threading.Event().wait()"), 7
IN_C = FUNCTIONS.format("hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)")
POOL = "parallel = 2" + IN_PYTHON
COROUTINE = FUNCTIONS.replace("def pwrite", "async def pwrite").format("await asyncio.Event().wait()")
HELD = """
import sys
from ublkpool.bufpool.sdk.backend import Backend, Properties
held = []
class Mine(Backend):
    def open(self, hint): return Properties(size_bytes=1 << 20)
    def submit(self, batch):
        held.extend(batch)
        print("begun", file=sys.stderr, flush=True)
"""


@contextmanager
def hanging(
    tmp_path: Path, code: str, patience_s: float = 0.2
) -> Iterator[tuple[FakeWorker, "subprocess.Popen[str]"]]:
    """A backend whose write is executing, and the worker that sent it."""
    plugin = tmp_path / "mine.py"
    plugin.write_text("import asyncio\n" + code.lstrip())
    with FakeWorker(tmp_path) as worker:
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, str(plugin), str(tmp_path), str(patience_s)],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            worker.accept()
            worker.send(0, [worker.describe(Kind.REQUEST, Op.WRITE, 8192, 4096)])
            assert process.stderr is not None
            for line in process.stderr:
                if "begun" in line:
                    break
            yield worker, process
        finally:
            process.kill()
            with process:
                pass


@pytest.mark.parametrize("code", [IN_PYTHON, IN_C, POOL, COROUTINE, HELD])
def test_sigterm_ends_it_with_status_1_and_names_the_request(tmp_path: Path, code: str) -> None:
    with hanging(tmp_path, code) as (_, process):
        process.send_signal(signal.SIGTERM)
        status, log = finish(process)
    assert status == ending.STATUS_UNANSWERED
    said = f"{DEVICE}: 0.2 s after SIGTERM, no answer to 1 requests: write of 4096 at 8192 (queue 0)"
    assert said in log, log
    if code == IN_PYTHON:
        assert f"(at {tmp_path}/mine.py:{LINE_IN_PYTHON}): ending; the next backend executes them" in log


def test_the_daemon_s_detach_does_so_too(tmp_path: Path) -> None:
    with hanging(tmp_path, HELD) as (worker, process):
        worker.detach()
        status, log = finish(process)
    assert status == ending.STATUS_UNANSWERED
    assert "no answer to 1 requests: write of 4096 at 8192" in log


@pytest.mark.parametrize("code", [IN_PYTHON, HELD])
def test_the_end_of_the_daemon_and_its_workers_does_so_too(tmp_path: Path, code: str) -> None:
    with hanging(tmp_path, code) as (worker, process):
        worker.hang_up()
        worker.end_workers()
        status, log = finish(process)
    assert status == ending.STATUS_UNANSWERED
    assert "no answer to 1 requests: write of 4096 at 8192" in log


def test_a_loop_that_turns_outlives_the_daemon_while_there_are_workers(tmp_path: Path) -> None:
    code = HELD.replace(
        "held.extend(batch)", "held.extend(batch)\n        held[1:] and [each.complete() for each in held]"
    )
    with hanging(tmp_path, code, patience_s=1.0) as (worker, process):
        assert worker.connection is not None
        worker.connection.close()
        assert process.stderr is not None
        for line in process.stderr:
            if "the daemon is gone" in line:
                break
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        worker.send(0, [worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096, tag=1)])
        assert {worker.receive().result for _ in range(2)} == {4096}


def test_no_thread_of_the_author_s_is_nothing_to_name() -> None:
    assert blame.lines_of_threads() == ""
