"""The REST example against a store that delays PUTs past a `kill -9`: the generation is what keeps the data.

In each run a backend has answered some writes and is killed while the store holds back its PUTs.  Its successor gets
the unanswered writes again, as from a daemon, and newer ones; the late PUTs reach the store at times that the seed
chooses.  Nothing that was answered may be lost.
"""

import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.fakes.rest_store import RestStore, served
from support.fakes.worker import DEADLINE_S, FakeWorker, finish, spawn
from ublkpool.bufpool import wire
from ublkpool.bufpool.wire import Flag, Kind, Op

EXAMPLE = Path(__file__).parents[2] / "examples/rest_blocks.py"
BLOCK, CHUNK, CHUNKS = 4096, 64 << 10, 6
SIZE_BYTES = CHUNK * CHUNKS
SEEDS = 20


@contextmanager
def backend(
    run_dir: Path, store: RestStore, generation: int, example: Path = EXAMPLE
) -> Iterator[tuple[FakeWorker, "subprocess.Popen[str]"]]:
    """A backend process of this generation, and its worker; killed at the end."""
    options = {"host": store.address, "path": "/disk", "size": str(SIZE_BYTES)}
    with FakeWorker(run_dir, depth=8, max_io_bytes=CHUNK) as worker:
        worker.generation, worker.may_create = generation, generation == 1
        process = spawn(run_dir, example, options)
        try:
            yield worker, process
        finally:
            process.kill()
            process.communicate()


class Run:
    """One seed: a disk's answered content, a predecessor that is killed, a successor."""

    def __init__(self, seed: int, run_dir: Path, store: RestStore, example: Path = EXAMPLE) -> None:
        self.random = random.Random(seed)
        self.run_dir, self.store, self.example = run_dir, store, example
        self.shadow = bytearray(SIZE_BYTES)
        self.unanswered: list[tuple[int, bytes]] = []

    def data(self, length: int) -> bytes:
        """Blocks that no other write has."""
        return b"".join(self.random.randbytes(8) * (BLOCK // 8) for _ in range(length // BLOCK))

    def write(self, worker: FakeWorker, offset: int, data: bytes, flags: int = 0) -> None:
        """A write that must be answered as stored."""
        assert worker.write(offset, data, flags=flags) == len(data), "a write failed"
        self.shadow[offset : offset + len(data)] = data

    def some_writes(self, worker: FakeWorker, count: int) -> None:
        """Answered writes anywhere, also across chunks."""
        for _ in range(count):
            length = BLOCK * self.random.choice([1, 1, 2, 5, 16])
            offset = BLOCK * self.random.randrange((SIZE_BYTES - length) // BLOCK + 1)
            self.write(worker, offset, self.data(length))

    def predecessor(self) -> None:
        """Answer writes, then die with one write to each of several chunks on its way."""
        with backend(self.run_dir, self.store, 1, self.example) as (worker, _):
            worker.accept()
            self.some_writes(worker, 3)
            self.store.holds = True
            numbers = self.random.sample(range(CHUNKS), self.random.randint(1, CHUNKS))
            for tag, number in enumerate(numbers):
                at = number * CHUNK + BLOCK * self.random.randrange(CHUNK // BLOCK)
                data = self.data(BLOCK)
                request = worker.describe(Kind.REQUEST, Op.WRITE, at, BLOCK, tag=tag)
                worker.pool[request.buffer : request.buffer + BLOCK] = data
                worker.send(0, [request])
                self.unanswered.append((at, data))
            self.store.wait_for_held(len(numbers))
        self.store.holds = False

    def successor(self) -> None:
        """Execute the unanswered writes again and newer ones, while the late PUTs arrive; compare everything."""
        # Sorted, because they arrive in any order, and the seed is to choose.
        held = sorted(self.store.held, key=lambda each: each.name)
        late = self.random.sample(held, len(held))
        for each in late[: self.random.randint(0, len(late) // 2)]:
            each.let_go()
            late.remove(each)
        with backend(self.run_dir, self.store, 2, self.example) as (worker, process):
            worker.accept()
            for at, data in self.unanswered:
                self.write(worker, at, data, Flag.REPLAY)
                if late and self.random.random() < 0.3:
                    late.pop().let_go()
            for at, _ in self.unanswered:
                self.write(worker, at, self.data(BLOCK))
            self.some_writes(worker, 2)
            while late:
                late.pop().let_go()
            read = b"".join(worker.read(at, CHUNK) for at in range(0, SIZE_BYTES, CHUNK))
            worker.detach()
            assert process.wait(DEADLINE_S) == 0
        # Compared first: where CI is set, pytest shows all differences in an assertion, which takes minutes.
        is_kept = read == self.shadow
        assert is_kept, "an answered write was lost"


def run(seed: int, run_dir: Path, store: RestStore, example: Path = EXAMPLE) -> None:
    """One seed.  Raises AssertionError if something answered was lost or a backend failed."""
    with served(store):
        each = Run(seed, run_dir, store, example)
        each.predecessor()
        each.successor()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_answered_write_is_lost_to_a_put_that_comes_after_the_kill(tmp_path: Path, seed: int) -> None:
    store = RestStore()
    run(seed, tmp_path, store)
    assert store.highest == 2 and (store.refused or seed), "the first run has a PUT that comes too late"


class Lenient(RestStore):
    """Lets each backend begin, whatever its generation."""

    def may_claim(self, generation: int) -> bool:
        return True


class Blind(Lenient):
    """Asks for no generation and compares none."""

    needs_token = compares = False


class Early(RestStore):
    """Compares when the request arrives, not when it stores."""

    def put(self, name: str, body: bytes, token: str | None) -> int:
        if name != "generation" and int(token or 0) < self.highest:
            return 412
        self.compares = False
        return super().put(name, body, token)


class Forgetful(RestStore):
    """Takes the last generation for the highest."""

    def refuses(self, generation: int) -> bool:
        self.highest = generation
        return super().refuses(generation)


class OffByOne(RestStore):
    def refuses(self, generation: int) -> bool:
        return generation < self.highest - 1


def _without_token(text: str) -> str:
    return text.replace('"Generation": str(self.generation), ', "")


def _always_one(text: str) -> str:
    return text.replace('{"Generation": str(self.generation)', '{"Generation": "1"')


def _same(text: str) -> str:
    return text


def changed(tmp_path: Path, change: Callable[[str], str]) -> Path:
    """A copy of the example with a planted defect."""
    text = EXAMPLE.read_text()
    example = tmp_path / "rest_blocks.py"
    example.write_text(change(text))
    assert change is _same or example.read_text() != text
    return example


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        pytest.param(Blind, _without_token, id="no token is sent"),
        pytest.param(Blind, _same, id="the store does not compare"),
        pytest.param(Lenient, _always_one, id="the generation does not rise"),
        pytest.param(Early, _same, id="the store compares too early"),
        pytest.param(Forgetful, _same, id="the store forgets the highest"),
        pytest.param(OffByOne, _same, id="the store lets the predecessor pass"),
    ],
)
def test_without_the_fence_or_with_a_broken_one_an_answered_write_is_lost(
    tmp_path: Path, kind: type[RestStore], change: Callable[[str], str]
) -> None:
    example = changed(tmp_path, change)
    for seed in range(SEEDS):
        try:
            run(seed, tmp_path, kind(), example)
        except AssertionError as error:
            assert "an answered write was lost" in str(error)
            return
    pytest.fail("no seed shows the difference")


class TooStrict(RestStore):
    """Compares with <= instead of <."""

    def refuses(self, generation: int) -> bool:
        return generation <= self.highest


def test_a_store_that_refuses_the_generation_itself_ends_the_backend(tmp_path: Path) -> None:
    with served(TooStrict()) as store:
        store.objects["identity"] = b"1"
        with backend(tmp_path, store, 1) as (worker, process):
            worker.accept()
            worker.send(0, [worker.describe(Kind.REQUEST, Op.WRITE, 0, BLOCK)])
            status, _ = finish(process)
            assert status == 1 and worker.is_silent(), "answered although it was not stored"


def test_a_backend_that_sends_no_token_is_refused_at_its_start(tmp_path: Path) -> None:
    with served(RestStore()) as store:
        with backend(tmp_path, store, 1, changed(tmp_path, _without_token)) as (worker, process):
            worker.answer_question()
            status, log = finish(process)
        assert status == 1 and "PUT /disk/identity: 428" in log


def test_two_backends_of_the_same_generation_do_not_both_serve(tmp_path: Path) -> None:
    """As on two hosts that asked the store at the same time, or with a generation that did not rise."""
    with served(RestStore()) as store:
        with backend(tmp_path, store, 1) as (worker, _):
            worker.accept()
            assert worker.write(0, b"1" * BLOCK) == BLOCK
        with backend(tmp_path, store, 1) as (worker, process):
            worker.answer_attach()
            status, log = finish(process)
        assert (
            status == 1 and "PUT /disk/generation: 412" in log and store.objects["0"][:BLOCK] == b"1" * BLOCK
        )


def test_the_store_s_generation_and_identity_reach_the_daemon(tmp_path: Path) -> None:
    with served(RestStore()) as store:
        for generation, seen in ((41, 0), (42, 41)):
            with backend(tmp_path, store, generation) as (worker, process):
                worker.may_create = generation == 41
                attach = worker.accept()
                assert attach.generation_seen == seen and isinstance(attach.identity, wire.Identity)
                assert attach.identity.value == store.objects["identity"].decode()
                worker.detach()
                assert finish(process)[0] == 0


def test_a_store_that_was_emptied_is_not_served_again(tmp_path: Path) -> None:
    with served(RestStore()) as store, backend(tmp_path, store, 2) as (worker, process):
        worker.answer_question()
        status, log = finish(process)
    assert status == 1 and "no disk, and this device has been served before" in log and not store.objects


def test_requests_reach_the_store_side_by_side_and_change_shared_chunks(tmp_path: Path) -> None:
    with served(RestStore()) as store, backend(tmp_path, store, 1) as (worker, process):
        worker.accept()
        store.holds = True
        asked = [
            worker.describe(Kind.REQUEST, Op.WRITE, (tag // 2) * CHUNK + (tag % 2) * BLOCK, BLOCK, tag=tag)
            for tag in range(8)
        ]
        for tag, request in enumerate(asked):
            worker.pool[request.buffer : request.buffer + BLOCK] = bytes([65 + tag]) * BLOCK
        worker.send(0, asked)
        first = store.wait_for_held(4)
        assert {each.name for each in first} == {"0", "1", "2", "3"} and store.most_at_once >= 4
        store.holds = False
        for each in first:
            each.let_go()
        assert {worker.receive().result for _ in asked} == {BLOCK}
        for number in range(4):
            pair = bytes([65 + 2 * number]) * BLOCK + bytes([66 + 2 * number]) * BLOCK
            assert store.objects[str(number)][: 2 * BLOCK] == pair
        worker.detach()
        assert finish(process)[0] == 0


def test_a_store_that_dies_ends_the_backend_and_no_request_is_answered(tmp_path: Path) -> None:
    with served(RestStore()) as store, backend(tmp_path, store, 1) as (worker, process):
        worker.accept()
        assert worker.read(0, BLOCK) == bytes(BLOCK), "it serves, so its generation has been claimed"
        store.put = lambda *_: 503  # type: ignore[method-assign]
        worker.send(0, [worker.describe(Kind.REQUEST, Op.WRITE, 0, BLOCK)])
        assert finish(process)[0] == 1
        assert worker.is_silent()
