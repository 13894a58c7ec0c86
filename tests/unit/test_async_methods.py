"""`async def` methods on one asyncio loop, on the real wire."""

import asyncio
import errno
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from support.fakes.plain_backend import SIZE_BYTES
from support.fakes.worker import DEVICE, BackendThread, FakeWorker, finish, serving, spawn
from support.vm.daemon import eventually
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Backend, Device, Hint, Properties
from ublkpool.bufpool.sdk.blame import PluginError
from ublkpool.bufpool.sdk.loader import load
from ublkpool.bufpool.wire import Flag, Kind, Op

BLOCK = 4096
WAIT_S = 60.0


class Coroutines(Backend):
    """A disk in a bytearray with `async def` methods only; each says what it was called for, and on which loop."""

    properties = Properties(
        size_bytes=SIZE_BYTES,
        volatile_cache=True,
        discard_max_bytes=SIZE_BYTES,
        write_zeroes_max_bytes=SIZE_BYTES,
    )

    def __init__(self) -> None:
        super().__init__()
        self.disk = bytearray(SIZE_BYTES)
        self.calls: list[str] = []
        self.loops: set[asyncio.AbstractEventLoop] = set()

    async def say(self, what: str) -> None:
        """Note a call, after a turn of the loop."""
        await asyncio.sleep(0)
        self.calls.append(what)
        self.loops.add(asyncio.get_running_loop())

    async def open(self, hint: Hint) -> Properties:
        await self.say("open")
        return self.properties

    async def started(self, device: Device) -> None:
        await self.say(f"started {device.name}")

    async def pread(self, buf: memoryview, offset: int) -> int:
        await self.say("pread")
        buf[:] = self.disk[offset : offset + len(buf)]
        return len(buf)

    async def pwrite(self, buf: memoryview, offset: int, fua: bool) -> int | None:
        await self.say(f"pwrite {fua:d}")
        self.disk[offset : offset + len(buf)] = buf
        return None

    async def flush(self) -> None:
        await self.say("flush")

    async def trim(self, offset: int, length: int) -> None:
        await self.say(f"trim {offset} {length}")

    async def detached(self) -> None:
        await self.say("detached")

    async def close(self) -> None:
        await self.say("close")


class Zeroing(Coroutines):
    async def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        await self.say(f"zero {offset} {length} {may_unmap:d}")


def _do_everything(worker: FakeWorker) -> None:
    assert worker.write(BLOCK, b"a" * BLOCK) == BLOCK
    assert worker.write(2 * BLOCK, b"b" * BLOCK, flags=Flag.FUA) == BLOCK
    assert worker.read(BLOCK, BLOCK) == b"a" * BLOCK
    assert worker.do(Op.FLUSH) == 0
    assert worker.do(Op.DISCARD, 0, 2 * BLOCK) == 0
    assert worker.do(Op.WRITE_ZEROES, BLOCK, BLOCK, flags=Flag.FUA | Flag.NOUNMAP) == 0


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("kind", [Coroutines, Zeroing])
def test_every_method_may_be_a_coroutine_and_all_run_on_one_loop(
    tmp_path: Path, kind: type[Coroutines]
) -> None:
    backend, before = kind(), set(threading.enumerate())
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        _do_everything(worker)
    zeroed = f"zero {BLOCK} {BLOCK} 0" if kind is Zeroing else "pwrite 0"
    assert backend.calls == [
        *("open", f"started {DEVICE}", "pwrite 0", "pwrite 1", "pread", "flush", f"trim 0 {2 * BLOCK}"),
        *(zeroed, "flush", "detached", "close"),
    ]
    assert len(backend.loops) == 1
    # The end of the SDK waits for its threads, but not for as long as a busy machine may take to end them.
    eventually(lambda: set(threading.enumerate()) <= before, "its threads have ended")
    if kind is Coroutines:
        assert backend.disk[BLOCK : 2 * BLOCK] == bytes(BLOCK), "zeros through pwrite"


class Meeting(Coroutines):
    """Each write waits until eight execute."""

    def __init__(self) -> None:
        super().__init__()
        self.present = 0
        self.all_here = asyncio.Event()

    async def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        self.present += 1
        if self.present == 8:
            self.all_here.set()
        await self.all_here.wait()


@pytest.mark.usefixtures("transport")
def test_coroutines_of_several_queues_wait_side_by_side(tmp_path: Path) -> None:
    with FakeWorker(tmp_path, queues=2) as worker, serving(worker, Meeting()):
        for queue in range(2):
            asked = [
                worker.describe(Kind.REQUEST, Op.WRITE, tag * BLOCK, BLOCK, tag=tag, queue=queue)
                for tag in range(4)
            ]
            worker.send(queue, asked)
        assert [worker.receive(queue).result for queue in range(2) for _ in range(4)] == [BLOCK] * 8


class Mixed(Backend):
    """Plain methods beside an `async def` one."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: dict[str, set[int]] = {}
        self.inside = self.most = 0

    def note(self, name: str) -> None:
        """Note the thread of a call."""
        self.threads.setdefault(name, set()).add(threading.get_ident())

    def open(self, hint: Hint) -> Properties:
        self.note("open")
        return Properties(size_bytes=SIZE_BYTES, volatile_cache=True)

    def pread(self, buf: memoryview, offset: int) -> None:
        self.note("pread")
        self.inside += 1
        self.most = max(self.most, self.inside)
        buf[:] = b"m" * len(buf)
        self.inside -= 1
        if offset:
            raise OSError(errno.ENODATA, "a hole")

    async def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        self.note("pwrite")

    def flush(self) -> None:
        self.note("flush")


@pytest.mark.usefixtures("transport")
def test_plain_methods_beside_coroutines_run_one_at_a_time_on_a_thread_of_their_own(tmp_path: Path) -> None:
    backend = Mixed()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        assert worker.write(0, b"x" * BLOCK) == BLOCK
        assert worker.read(0, BLOCK) == b"m" * BLOCK
        asked = [worker.describe(Kind.REQUEST, Op.READ, tag * BLOCK, BLOCK, tag=tag) for tag in range(6)]
        worker.send(0, asked)
        answers = {each.tag: each.result for each in (worker.receive() for _ in asked)}
        assert answers == {0: BLOCK} | dict.fromkeys(range(1, 6), -errno.ENODATA)
        assert worker.do(Op.FLUSH) == 0
    threads = [backend.threads[name] for name in ("open", "pwrite", "pread")]
    assert [len(each) for each in threads] == [1, 1, 1] and len(set.union(*threads)) == 3
    assert backend.threads["flush"] == backend.threads["pread"] and backend.most == 1


class Failing(Coroutines):
    async def pread(self, buf: memoryview, offset: int) -> int:
        await asyncio.sleep(0)
        match offset // BLOCK:
            case 0:
                raise OSError(errno.ENOSPC, "full")
            case 1:
                raise ZeroDivisionError
            case 2:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(WAIT_S)
            case 3:
                raise SystemExit(3)
            case 4:
                raise TimeoutError
            case 5:
                return 512
            case 6:
                asyncio.get_running_loop().create_task(self.end_the_loop())
        return BLOCK

    async def end_the_loop(self) -> None:
        raise SystemExit(4)


@pytest.mark.usefixtures("transport")
def test_exceptions_and_cancellations_are_answered_with_an_errno_and_the_loop_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, Failing()):
        asked = [worker.describe(Kind.REQUEST, Op.READ, tag * BLOCK, BLOCK, tag=tag) for tag in range(7)]
        worker.send(0, asked)
        answers = {each.tag: each.result for each in (worker.receive() for _ in asked)}
        eio = -errno.EIO
        assert answers == {0: -errno.ENOSPC, 1: eio, 2: eio, 3: eio, 4: eio, 5: 512, 6: BLOCK}
        assert worker.write(0, b"w" * BLOCK) == BLOCK
    assert "a task ended the asyncio loop" in caplog.text


class CancelsOthers(Coroutines):
    """A read of the first block cancels every other task before it waits for anything."""

    async def pread(self, buf: memoryview, offset: int) -> int:
        if offset == 0:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
        return await super().pread(buf, offset)


def test_a_request_whose_task_is_cancelled_before_it_begins_is_answered(tmp_path: Path) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, CancelsOthers()):
        reads = [worker.describe(Kind.REQUEST, Op.READ, tag * BLOCK, BLOCK, tag=tag) for tag in range(2)]
        worker.send(0, reads)
        answers = [worker.receive() for _ in reads]
        assert {each.tag: each.result for each in answers} == {0: BLOCK, 1: -errno.EIO}
        worker.fence()
        assert worker.receive().kind == Kind.FENCED


class Held(Coroutines):
    """Writes that end when the test lets them."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.cancel: Callable[[], object] = lambda: None

    async def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        self.begun.release()
        await asyncio.to_thread(self.may_end.acquire, timeout=WAIT_S)


@pytest.mark.usefixtures("transport")
def test_a_fence_waits_for_coroutines(tmp_path: Path) -> None:
    backend = Held()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        asked = [worker.describe(Kind.REQUEST, Op.WRITE, tag * BLOCK, BLOCK, tag=tag) for tag in range(2)]
        worker.send(0, asked)
        assert all(backend.begun.acquire(timeout=WAIT_S) for _ in asked)
        worker.fence_executing()
        assert worker.is_silent()
        backend.may_end.release()
        assert worker.is_silent(), "one of the two still runs"
        backend.may_end.release()
        assert worker.receive().kind == Kind.FENCED
        assert worker.is_silent(), "no answer of the old epoch"


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("keep", [False, True])
def test_an_end_finishes_the_coroutines_that_execute(tmp_path: Path, keep: bool) -> None:
    backend = Held()
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(backend, tmp_path)
        worker.accept()
        worker.send(0, [worker.describe(Kind.REQUEST, Op.WRITE, 0, BLOCK)])
        assert backend.begun.acquire(timeout=WAIT_S)
        worker.tell(wire.Detach(reason="test", keep=keep))
        assert worker.is_silent()
        backend.may_end.release()
        assert worker.receive().result == BLOCK
        assert thread.join() == 0
    assert backend.calls[-1] == "close" and ("detached" in backend.calls) != keep


class Cancelling(Held):
    """A plain write whose task the author cancels while the write executes."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()

    async def pread(self, buf: memoryview, offset: int) -> int:
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()
        return len(buf)

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:  # type: ignore[override]
        self.begun.release()
        assert self.may_end.acquire(timeout=WAIT_S)
        self.ended.set()


@pytest.mark.usefixtures("transport")
def test_a_cancelled_task_is_answered_only_when_its_plain_method_has_ended(tmp_path: Path) -> None:
    backend = Cancelling()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        worker.send(0, [worker.describe(Kind.REQUEST, Op.WRITE, 0, BLOCK)])
        assert backend.begun.acquire(timeout=WAIT_S)
        assert worker.read(0, BLOCK, tag=1)
        assert worker.is_silent(), "the write still executes"
        backend.may_end.release()
        assert worker.receive().result == -errno.EIO and backend.ended.is_set()


FUNCTIONS = """
import asyncio
disk, said = bytearray(65536), []
async def open(fails: bool = False):
    await asyncio.sleep(0)
    if fails: raise OSError(5, "no answer")
async def get_size(): await asyncio.sleep(0); return len(disk)
async def identity(): await asyncio.sleep(0); return "store-1"
def pread(buf, offset): buf[:] = disk[offset : offset + len(buf)]
async def pwrite(buf, offset):
    await asyncio.sleep(0)
    said.append("pwrite")
    disk[offset : offset + len(buf)] = buf
async def flush(): await asyncio.sleep(0); said.append("flush")
async def zero(offset, length): await asyncio.sleep(0); disk[offset : offset + length] = bytes(length)
async def close(): await asyncio.sleep(0); said.append("close")
"""


@pytest.mark.usefixtures("transport")
def test_a_module_of_coroutines_is_a_backend(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    backend = load(str(tmp_path / "mine.py"), {})
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        assert worker.attach is not None and isinstance(worker.attach.identity, wire.Identity)
        assert (worker.attach.size_bytes, worker.attach.identity.value) == (65536, "store-1")
        assert worker.write(0, b"f" * BLOCK, flags=Flag.FUA) == BLOCK
        assert worker.read(0, BLOCK) == b"f" * BLOCK
        assert worker.do(Op.WRITE_ZEROES, 0, BLOCK) == 0
        assert worker.read(0, BLOCK) == bytes(BLOCK)
    assert backend.module.said == ["pwrite", "flush", "close"]  # type: ignore[attr-defined]


def test_an_async_open_that_fails_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    backend = load(str(tmp_path / "mine.py"), {"fails": "on"})
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(backend, tmp_path)
        worker.answer_question()
        with pytest.raises(BackendError, match=r"cannot open: .*no answer \(.*mine\.py:6\)"):
            thread.join()


class Broken(Coroutines):
    async def started(self, device: Device) -> None:
        raise KeyError("lease")


def test_an_async_started_that_fails_names_its_line_and_closes_the_store(tmp_path: Path) -> None:
    backend = Broken()
    with FakeWorker(tmp_path) as worker:
        thread = BackendThread(backend, tmp_path)
        worker.answer_attach()
        with pytest.raises(PluginError, match=r"test_async_methods\.py:\d+: KeyError: 'lease'"):
            thread.join()
    assert backend.calls == ["open", "close"]


class Renewing(Coroutines):
    """Has a task of its own from `open` on, as for a lease."""

    async def open(self, hint: Hint) -> Properties:
        self.renewed = threading.Event()
        self.task = asyncio.get_running_loop().create_task(self.renew())
        return await super().open(hint)

    async def renew(self) -> None:
        try:
            while True:
                await asyncio.sleep(0.01)
                self.renewed.set()
        finally:
            self.calls.append("given up")


def test_a_task_of_the_authors_runs_while_the_device_is_served_and_is_cancelled_at_the_end(
    tmp_path: Path,
) -> None:
    backend = Renewing()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        backend.renewed.clear()
        assert backend.renewed.wait(WAIT_S)
    assert backend.calls[-2:] == ["close", "given up"]


def test_a_signal_ends_a_process_with_coroutines_cleanly(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    with FakeWorker(tmp_path) as worker:
        process = spawn(tmp_path, tmp_path / "mine.py")
        worker.accept()
        assert worker.write(0, b"s" * BLOCK) == BLOCK
        process.terminate()
        status, log = finish(process)
    assert (status, "Traceback" in log) == (0, False), log


def test_a_backend_without_coroutines_loads_no_event_loop() -> None:
    loads = "import sys; from ublkpool.bufpool.sdk import loader; print(*sys.modules)"
    found = subprocess.check_output([sys.executable, "-c", loads], text=True).split()
    assert "ublkpool.bufpool.sdk.runner" in found and "asyncio" not in found


@pytest.fixture(autouse=True)
def _debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
