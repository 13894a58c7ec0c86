"""`exclusive_bytes`: requests for the same chunk run one after the other, in order of arrival."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fakes.plain_backend import SIZE_BYTES, Plain
from support.fakes.worker import FakeWorker, serving
from ublkpool.bufpool.errors import BackendError
from ublkpool.bufpool.sdk.backend import Hint, Outbox, Properties, Request
from ublkpool.bufpool.sdk.exclusive import Gate, Turn
from ublkpool.bufpool.sdk.loader import load
from ublkpool.bufpool.sdk.serving import serve
from ublkpool.bufpool.wire import Flag, Kind, Op

BLOCK = 512
CHUNK = 4096
WAIT_S = 60.0


def _request(offset: int, length: int, op: Op = Op.WRITE) -> Request:
    return Request(op, 0, offset, length, memoryview(b""), -1, _OUTBOX, None)


_OUTBOX = Outbox()


class Model:
    """Runs what the gate lets pass, and checks it against what was promised."""

    def __init__(self) -> None:
        self.gate = Gate(CHUNK)
        self.running: list[Turn] = []
        self.arrived: list[Turn] = []
        self.begun: list[Turn] = []

    def arrive(self, offset: int, length: int, op: Op = Op.WRITE) -> Turn:
        turn = self.gate.arrive(_request(offset, length, op))
        self.arrived.append(turn)
        if turn.runs_at_once:
            self._begin([turn])
        return turn

    def leave(self, turn: Turn) -> None:
        self.running.remove(turn)
        self._begin(self.gate.leave(turn))

    def _begin(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            assert turn not in self.begun
            assert not [each for each in self.running if touch(each, turn)], "two at once"
            earlier = self.arrived[: self.arrived.index(turn)]
            assert not [each for each in earlier if touch(each, turn) and each not in self.begun], "overtaken"
            self.running.append(turn)
            self.begun.append(turn)


def touch(one: Turn, other: Turn) -> bool:
    """Whether two requests share a chunk, by counting the chunks of each."""
    return bool(chunks(one.request) & chunks(other.request))


def chunks(request: Request) -> set[int]:
    """The chunks in which a byte of the request lies."""
    return {at // CHUNK for at in range(request.offset, request.offset + request.length, BLOCK)}


_requests = st.tuples(st.integers(0, 40), st.integers(0, 24))


@given(st.lists(st.one_of(_requests, st.integers(0, 7)), max_size=60))
def test_no_two_requests_share_a_chunk_and_all_run_in_order_of_arrival(
    steps: list[tuple[int, int] | int],
) -> None:
    model = Model()
    for step in steps:
        if isinstance(step, tuple):
            model.arrive(step[0] * BLOCK, step[1] * BLOCK)
        elif model.running:
            model.leave(model.running[step % len(model.running)])
    while model.running:
        model.leave(model.running[0])
    assert set(model.begun) == set(model.arrived), "every request ran: none waits for ever"
    assert not model.gate._present


def test_a_large_request_is_not_overtaken_by_small_ones_that_come_later() -> None:
    model = Model()
    first = model.arrive(0, CHUNK)
    large = model.arrive(0, 100 * CHUNK)
    later = [model.arrive(at * CHUNK, CHUNK) for at in range(100)]
    assert model.running == [first]
    model.leave(first)
    assert model.running == [large]
    model.leave(large)
    assert model.running == later


def test_requests_of_other_chunks_and_flushes_never_wait() -> None:
    model = Model()
    model.arrive(CHUNK - BLOCK, 2 * BLOCK)
    waiting = [model.arrive(0, BLOCK), model.arrive(2 * CHUNK - BLOCK, BLOCK)]
    free = [model.arrive(2 * CHUNK, BLOCK), model.arrive(0, 0, Op.FLUSH)]
    assert not any(each in model.running for each in waiting) and all(each in model.running for each in free)


class Changing(Plain):
    """Chunks of a store of which only whole ones can be read and written; a lost change shows."""

    parallel = 8
    exclusive_bytes = CHUNK
    properties = Properties(size_bytes=SIZE_BYTES, volatile_cache=True, discard_max_bytes=SIZE_BYTES)

    def __init__(self) -> None:
        super().__init__()
        self.chunks = {at: bytes(CHUNK) for at in range(SIZE_BYTES // CHUNK)}
        self.inside: list[int] = []
        self.both = threading.Barrier(2)
        self.shared = 0

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        number, start = divmod(offset, CHUNK)
        self.shared += number in self.inside
        self.inside.append(number)
        chunk = bytearray(self.chunks[number])
        self.meet(offset)
        chunk[start : start + len(buf)] = buf
        self.chunks[number] = bytes(chunk)
        self.inside.remove(number)

    def meet(self, offset: int) -> None:
        """Wait until a write to another chunk executes, too."""
        self.both.wait(WAIT_S)


@pytest.mark.usefixtures("transport")
def test_writes_of_several_queues_change_their_chunk_without_a_lock(tmp_path: Path) -> None:
    backend = Changing()
    with FakeWorker(tmp_path, queues=2) as worker, serving(worker, backend):
        expected = bytearray(2 * CHUNK)
        for queue in range(2):
            asked = []
            for tag in range(8):
                # Each queue writes the odd or the even blocks of both chunks, by turns.
                offset = (tag % 2) * CHUNK + (2 * (tag // 2) + queue) * BLOCK
                request = worker.describe(Kind.REQUEST, Op.WRITE, offset, BLOCK, tag=tag, queue=queue)
                data = bytes([1 + tag + 8 * queue]) * BLOCK
                worker.pool[request.buffer : request.buffer + BLOCK] = data
                expected[offset : offset + BLOCK] = data
                asked.append(request)
            worker.send(queue, asked)
        results = [worker.receive(queue).result for queue in range(2) for _ in range(8)]
    assert results == [BLOCK] * 16
    assert backend.chunks[0] + backend.chunks[1] == expected and not backend.shared


class Ordered(Plain):
    """Notes the order of calls; the first waits for the test."""

    parallel = 4
    exclusive_bytes = CHUNK

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Semaphore(0)
        self.may_go = threading.Event()

    def pread(self, buf: memoryview, offset: int) -> None:
        self.calls.append(("pread", offset))

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        self.calls.append(("pwrite", offset))
        self.begun.release()
        assert self.may_go.wait(WAIT_S)


@pytest.mark.usefixtures("transport")
def test_requests_for_a_chunk_run_in_order_of_arrival_whatever_they_are(tmp_path: Path) -> None:
    backend = Ordered()
    ops = [Op.WRITE, Op.READ, Op.DISCARD, Op.READ, Op.WRITE, Op.WRITE_ZEROES]
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        worker.send(
            0,
            [
                worker.describe(Kind.REQUEST, op, tag * BLOCK, BLOCK, tag=tag, flags=Flag.NOUNMAP)
                for tag, op in enumerate(ops)
            ],
        )
        assert worker.is_silent() and worker.is_silent()
        flush = worker.describe(Kind.REQUEST, Op.FLUSH, tag=7)
        worker.send(0, [flush])
        assert worker.answer_of(flush).result == 0, "a flush waits for no chunk"
        backend.may_go.set()
        answered = [worker.receive().tag for _ in ops]
    kinds = ["pwrite", "pread", "trim", "pread", "pwrite", "pwrite"]
    called = [each for each in backend.calls if each[0] in kinds]
    assert [each[0] for each in called] == kinds and answered == list(range(len(ops)))
    assert [each[1] for each in called] == [tag * BLOCK for tag in range(len(ops))]


@pytest.mark.usefixtures("transport")
def test_a_request_that_waits_for_a_chunk_when_a_fence_comes_never_runs(tmp_path: Path) -> None:
    backend = Ordered()
    with FakeWorker(tmp_path, queues=2) as worker, serving(worker, backend):
        for queue in range(2):
            asked = [
                worker.describe(
                    Kind.REQUEST, Op.WRITE, (2 * queue + tag) * BLOCK, BLOCK, tag=tag, queue=queue
                )
                for tag in range(2)
            ]
            worker.send(queue, asked)
            if queue == 0:
                assert backend.begun.acquire(timeout=WAIT_S)
            assert worker.is_silent(queue)
        worker.fence_executing(0)
        assert worker.is_silent()
        backend.may_go.set()
        assert worker.receive(0).kind == Kind.FENCED
        assert [worker.receive(1).result for _ in range(2)] == [BLOCK, BLOCK], "the other queue's both run"
    assert [each[1] for each in backend.calls if each[0] == "pwrite"] == [0, 2 * BLOCK, 3 * BLOCK]


class Brief(Plain):
    """Notes its writes; each waits for the test."""

    parallel = 2
    exclusive_bytes = CHUNK

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_go = threading.Event(), threading.Event()

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        self.calls.append(("pwrite", offset))
        self.begun.set()
        assert self.may_go.wait(WAIT_S)


@pytest.mark.usefixtures("transport")
def test_a_request_whose_chunk_becomes_free_while_it_arrives_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, left = Brief(), threading.Event()
    arrive, leave = Gate.arrive, Gate.leave

    def arriving(gate: Gate, request: Request) -> Turn:
        turn = arrive(gate, request)
        if request.offset == BLOCK:
            backend.may_go.set()
            assert left.wait(WAIT_S)
        return turn

    def leaving(gate: Gate, turn: Turn) -> list[Turn]:
        following = leave(gate, turn)
        left.set()
        return following

    monkeypatch.setattr(Gate, "arrive", arriving)
    monkeypatch.setattr(Gate, "leave", leaving)
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        asked = [worker.describe(Kind.REQUEST, Op.WRITE, tag * BLOCK, BLOCK, tag=tag) for tag in range(2)]
        worker.send(0, asked[:1])
        assert backend.begun.wait(WAIT_S)
        worker.send(0, asked[1:])
        assert [worker.receive().result for _ in asked] == [BLOCK, BLOCK]
    assert [each for each in backend.calls if each[0] == "pwrite"] == [("pwrite", 0), ("pwrite", BLOCK)]


@pytest.mark.parametrize("value", [-1, 1.5, "4K", False])
def test_a_chunk_that_is_no_number_of_bytes_is_one_line(tmp_path: Path, value: object) -> None:
    (tmp_path / "mine.py").write_text(
        f"exclusive_bytes = {value!r}\ndef get_size(): return 4096\ndef pread(buf, offset): ..."
    )
    with pytest.raises(BackendError, match=r"^mine: exclusive_bytes must be a whole number from 0 to "):
        serve(
            load(str(tmp_path / "mine.py"), {}),
            device="x",
            run_dir=tmp_path,
            kind="mine",
            handle_signals=False,
        )


class Late(Ordered):
    """Knows the size of its chunks only when it has opened its store."""

    exclusive_bytes = 0

    def open(self, hint: Hint) -> Properties:
        self.exclusive_bytes = CHUNK
        return super().open(hint)


@pytest.mark.usefixtures("transport")
def test_open_may_set_the_size_of_a_chunk(tmp_path: Path) -> None:
    backend = Late()
    with FakeWorker(tmp_path) as worker, serving(worker, backend):
        asked = [worker.describe(Kind.REQUEST, Op.WRITE, tag * BLOCK, BLOCK, tag=tag) for tag in range(2)]
        worker.send(0, asked)
        assert backend.begun.acquire(timeout=WAIT_S) and worker.is_silent()
        assert [each[0] for each in backend.calls].count("pwrite") == 1
        backend.may_go.set()
        assert [worker.receive().result for _ in asked] == [BLOCK, BLOCK]
