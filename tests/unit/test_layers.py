"""Layers over backends of every level: what passes through, what each layer does, and errors in one line."""

import errno
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from support.fakes.plain_backend import SIZE_BYTES, Plain
from support.fakes.worker import DEVICE, FakeWorker, serving
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk import loader
from ublkpool.bufpool.sdk.backend import Backend, Device, Request
from ublkpool.bufpool.sdk.batch import Batch
from ublkpool.bufpool.sdk.layers import trace
from ublkpool.bufpool.sdk.layers.replay import main
from ublkpool.bufpool.sdk.layers.stack import layered, parse_layer
from ublkpool.bufpool.wire import Flag, Kind, Op

pytestmark = pytest.mark.usefixtures("transport")
BLOCK = 4096


class Batches(Plain):
    def serve_batch(self, batch: Batch) -> None:
        batch.copy(memoryview(self.disk))


class FromThreads(Plain):
    """Answers each request from a thread of its own."""

    def submit(self, batch: Sequence[Request]) -> None:
        for request in batch:
            threading.Thread(target=self._answer, args=(request,)).start()

    def _answer(self, request: Request) -> None:
        start, end = request.offset, request.offset + request.length
        if request.op == Op.READ:
            request.buffer[:] = self.disk[start:end]
        elif request.op == Op.WRITE:
            self.disk[start:end] = request.buffer
        elif request.op == Op.WRITE_ZEROES:
            self.disk[start:end] = bytes(request.length)
        request.complete()


class Coroutines(Plain):
    async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
        Plain.pread(self, buf, offset)

    async def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:  # type: ignore[override]
        Plain.pwrite(self, buf, offset, fua)


class Parallel(Plain):
    parallel = 4


def native(kind: str, **options: str) -> Callable[[], Backend]:
    return lambda: loader.load(kind, options)


LEVELS: dict[str, Callable[[], Backend]] = {
    "methods": Plain,
    "batches": Batches,
    "requests": FromThreads,
    "coroutines": Coroutines,
    "parallel": Parallel,
    "memory": native("memory", size="1M", keep="off"),
}


def exercise(worker: FakeWorker, seed: int, rounds: int = 120) -> bytearray:
    """Random operations against a shadow; returns what the disk must contain."""
    rng, shadow = random.Random(seed), bytearray(SIZE_BYTES)
    for _ in range(rounds):
        length = BLOCK * rng.randint(1, 8)
        offset = BLOCK * rng.randrange((SIZE_BYTES - length) // BLOCK)
        kind = rng.choice(("read", "read", "write", "write", "fua", "zero", "flush"))
        if kind == "read":
            assert worker.read(offset, length) == shadow[offset : offset + length]
        elif kind in ("write", "fua"):
            data = rng.randbytes(length)
            assert worker.write(offset, data, flags=Flag.FUA if kind == "fua" else 0) == length
            shadow[offset : offset + length] = data
        elif kind == "zero":
            assert worker.do(Op.WRITE_ZEROES, offset, length) == 0
            shadow[offset : offset + length] = bytes(length)
        else:
            assert worker.do(Op.FLUSH) == 0
    return shadow


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layers", [["fault"], ["cache:size=64K,block=16K", "fault:hold=256K,reorder=on"]])
def test_layers_over_every_level_leave_the_content_as_it_is(
    tmp_path: Path, level: str, layers: list[str]
) -> None:
    backend = layered(LEVELS[level](), layers)
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        shadow = exercise(worker, seed=3)
        for offset in range(0, SIZE_BYTES, 16 * BLOCK):
            assert worker.read(offset, 16 * BLOCK) == shadow[offset : offset + 16 * BLOCK]


class Exclusive(Parallel):
    """Notes whether two requests for a chunk run at once; a write waits until a read of its neighbour is sent."""

    exclusive_bytes = BLOCK

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[int] = []
        self.shared = 0
        self.begun, self.may_go = threading.Event(), threading.Event()

    def pread(self, buf: memoryview, offset: int) -> None:
        self.shared += any(offset <= each < offset + len(buf) for each in self.inside)
        super().pread(buf, offset)

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        self.inside.append(offset)
        self.begun.set()
        assert self.may_go.wait(60)
        super().pwrite(buf, offset, fua)
        self.inside.remove(offset)


def test_a_cache_reads_no_chunk_below_while_another_request_has_it(tmp_path: Path) -> None:
    backend = Exclusive()
    with (
        FakeWorker(tmp_path) as worker,
        serving(worker, layered(backend, ["cache:block=16K,size=64K"])),
    ):
        write = worker.describe(Kind.REQUEST, Op.WRITE, 0, BLOCK, tag=0)
        worker.send(0, [write])
        assert backend.begun.wait(60)
        read = worker.describe(Kind.REQUEST, Op.READ, BLOCK, BLOCK, tag=1)
        worker.send(0, [read])
        assert worker.is_silent()
        backend.may_go.set()
        assert {worker.receive().tag for _ in range(2)} == {0, 1}
    assert not backend.shared


def test_coroutines_that_start_and_end_a_backend_of_requests_run_below_layers(tmp_path: Path) -> None:
    class Opened(FromThreads):
        async def started(self, device: Device) -> None:
            self.calls.append("started")

    backend = Opened()
    with FakeWorker(tmp_path) as worker, serving(worker, layered(backend, ["fault"])):
        assert worker.read(0, BLOCK) == bytes(BLOCK)
    assert "started" in backend.calls


def test_an_error_below_the_layers_keeps_its_errno(tmp_path: Path) -> None:
    class Full(Batches):
        def serve_batch(self, batch: Batch) -> None:
            for at in range(len(batch)):
                batch.result[at] = -errno.ENOSPC

    with FakeWorker(tmp_path) as worker, serving(worker, layered(Full(), ["fault"])):
        assert worker.write(0, bytes(BLOCK)) == -errno.ENOSPC


def test_the_price_of_a_layer_over_a_native_engine_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeWorker(tmp_path) as worker, serving(worker, layered(LEVELS["memory"](), ["readonly"])):
        assert worker.attach is not None
    assert "layers replace the native path: each request runs in Python, one at a time" in caplog.text


def test_the_first_layer_gets_each_request_first(tmp_path: Path) -> None:
    """A cache above a trace: the second read reaches no store; a trace above a cache has both."""
    counts = []
    for names in (["cache", "log"], ["log", "cache"]):
        file = tmp_path / f"{names[0]}.trace"
        layers = [f"log:file={file}" if each == "log" else each for each in names]
        with FakeWorker(tmp_path) as worker, serving(worker, layered(Plain(), layers)):
            for _ in range(2):
                assert worker.read(0, BLOCK) == bytes(BLOCK)
        counts.append(sum(isinstance(each, trace.Traced) for each in trace.read_trace(file)))
    assert counts == [1, 2]


def test_readonly_refuses_what_writes_and_makes_the_disk_read_only(tmp_path: Path) -> None:
    backend = layered(Plain(), ["readonly"])
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        assert worker.attach is not None and worker.attach.read_only
        assert (worker.attach.discard_max_bytes, worker.attach.write_zeroes_max_bytes) == (0, 0)
        assert worker.read(0, BLOCK) == bytes(BLOCK)
    calls: list[Callable[[], object]] = [
        lambda: backend.pwrite(memoryview(b"x"), 0, False),
        lambda: backend.trim(0, 1),
        lambda: backend.zero(0, 1, True),
    ]
    for call in calls:
        with pytest.raises(OSError, match="readonly") as caught:
            call()
        assert caught.value.errno == errno.EROFS


def test_a_trace_brings_another_store_to_the_same_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, target = tmp_path / "a,b.trace", tmp_path / "copy"
    layers = [f"log:file={str(file).replace(',', chr(92) + ',')}"]
    backend = Plain()
    with FakeWorker(tmp_path) as worker, serving(worker, layered(backend, layers)):
        exercise(worker, seed=1)
    with FakeWorker(tmp_path) as worker, serving(worker, layered(backend, layers)):
        assert worker.write(BLOCK, b"z" * BLOCK) == BLOCK
        assert worker.read(0, 2 * BLOCK)[BLOCK:] == b"z" * BLOCK
    with file.open("ab") as cut:
        cut.write(b'{"kind":"request","at":1,"op":"wri')
    assert main([str(file), str(target)]) == 0
    assert ", 0 differ" in capsys.readouterr().out
    assert target.read_bytes() == bytes(backend.disk)


def test_a_replay_says_which_reads_differ_and_what_is_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, target = tmp_path / "trace", tmp_path / "copy"
    file.write_bytes(
        trace.encode(trace.Start("x", 8192))
        + trace.encode(trace.Traced(at=0.1, op="write", length=4096, result=-5))
        + trace.encode(trace.Traced(at=0.2, op="read", length=4096, result=4096, checksum=7))
    )
    assert main([str(file), str(target)]) == 1
    assert capsys.readouterr().out == "0 writes executed, 1 reads compared, 1 differ\n"
    file.write_bytes(b"no trace\n")
    assert main([str(file), str(target)]) == 2
    assert "trace:1: not a line of a trace" in capsys.readouterr().err
    assert main([str(tmp_path / "gone"), str(target)]) == 1
    assert main([]) == 2


def test_a_full_trace_ends_and_the_device_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "trace"
    with FakeWorker(tmp_path) as worker, serving(worker, layered(Plain(), [f"log:file={file},limit=20K"])):
        for _ in range(8):
            assert worker.write(0, b"w" * BLOCK) == BLOCK
    assert file.stat().st_size <= 20 << 10
    assert caplog.text.count("the trace ends here: it reached its limit") == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("nosuch", "no layer is called 'nosuch'; there are cache, fault, log, readonly, or give a FILE.py"),
        ("fault:eio=2", "layer fault: option eio: Expected `float` <= 1.0; options are: [seed=NUMBER]"),
        ("fault:speed=2", "layer fault: unknown option speed=2; options are:"),
        ("fault:reorder=on", "layer fault: reorder=on needs hold=SIZE"),
        ("fault:eio", "layer 'fault:eio': expected NAME:key=value,..."),
        ("log", "layer log: option file is missing"),
        ("cache:block=5K", "layer cache: block=5120 is not a power of two"),
        ("cache:block=1K", "layer cache: option block: Expected `int` >= 4096"),
        ("cache:size=4K", "layer cache: size=4096 is less than one block of 65536 bytes"),
        ("readonly:x=1", "layer readonly: unknown option x=1; options are: none"),
        ("no/such.py", "no/such.py: no such Python file"),
    ],
)
def test_a_wrong_layer_is_one_line(text: str, line: str) -> None:
    with pytest.raises(BackendError) as caught:
        layered(Plain(), [text])
    assert str(caught.value).startswith(line) or line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_comma_in_a_value_is_escaped_and_a_key_may_repeat() -> None:
    assert parse_layer("x:a=1\\,2,b=3,b=4") == ("x", {"a": "1,2", "b": ["3", "4"]})
    assert parse_layer("x") == ("x", {})


THEIRS = """
import msgspec
from ublkpool.bufpool.sdk.layers.layer import Layer
class Options(msgspec.Struct, frozen=True):
    key: int
class Xor(Layer):
    Options = Options
    def pread(self, buf, offset):
        self.inner.pread(buf, offset)
        buf[:] = bytes(each ^ self.options.key for each in buf)
    def pwrite(self, buf, offset, fua):
        return self.inner.pwrite(memoryview(bytes(each ^ self.options.key for each in buf)), offset, fua)
"""


def test_a_file_and_a_package_bring_layers_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "xor.py"
    path.write_text(THEIRS)
    backend = Plain()
    with FakeWorker(tmp_path) as worker, serving(worker, layered(backend, [f"{path}:key=255"])):
        assert worker.write(0, bytes(BLOCK)) == BLOCK
        assert worker.read(0, BLOCK) == bytes(BLOCK)
    assert backend.disk[:BLOCK] == b"\xff" * BLOCK
    entry = EntryPoint("theirs", "ublkpool.bufpool.sdk.layers.readonly:ReadOnly", "ublkpool.layers")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: EntryPoints([entry]))
    assert type(layered(Plain(), ["theirs"])).__name__ == "ReadOnly"


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("    async def flush(self): pass\n", "layer mine: async def flush is not supported in a layer"),
        (
            "    def submit(self, batch): pass\n",
            "layer mine: a layer has methods for single requests, not submit",
        ),
        ("    def pwrit(self, buf, offset, fua): pass\n", "did you mean pwrite?"),
        ("    def pread(self, buf): pass\n", "must be pread(self, buf, offset)"),
    ],
)
def test_a_layer_of_the_author_s_is_judged_when_it_is_loaded(tmp_path: Path, code: str, line: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from ublkpool.bufpool.sdk.layers.layer import Layer\nclass Mine(Layer):\n" + code)
    with pytest.raises(BackendError) as caught:
        layered(Plain(), [str(path)])
    assert line in str(caught.value)


def test_a_real_death_leaves_every_answered_write_in_the_trace(tmp_path: Path) -> None:
    plugin, file = tmp_path / "mine.py", tmp_path / "trace"
    plugin.write_text("def get_size(): return 1 << 20\ndef pread(b, o): pass\ndef pwrite(b, o): pass\n")
    command = [sys.executable, "-m", "ublkpool.daemon", "backend", str(plugin), "--device", DEVICE]
    layers = ["--layer", f"log:file={file}", "--layer", "fault:die=5"]
    with FakeWorker(tmp_path) as worker:
        process = subprocess.Popen([*command, "--run-dir", str(tmp_path), *layers], stderr=subprocess.PIPE)
        with process:
            worker.accept()
            for number in range(4):
                assert worker.write(number * BLOCK, bytes([number]) * BLOCK) == BLOCK
            worker.send(0, [worker.describe(Kind.REQUEST, Op.WRITE, 0, BLOCK)])
            assert process.stderr is not None
            log = process.stderr.read().decode()
    assert process.returncode == -signal.SIGKILL and "the layer fault kills this process at request 5" in log
    traced = [each.offset for each in trace.read_trace(file) if isinstance(each, trace.Traced)]
    assert traced == [number * BLOCK for number in range(4)]
