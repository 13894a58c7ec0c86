"""The backends of examples/c, built with sanitizers, as processes against a fake daemon and its workers."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.fakes.worker import DEADLINE_S, DEVICE, DEVICE_NUMBER, FakeWorker
from ublkpool.bufpool import wire
from ublkpool.bufpool.wire import Descriptor, Flag, Kind, Op

SOURCES = Path(__file__).parents[2] / "examples" / "c"
PROGRAMS = {"zeromq": "zeromq_disk", "ring": "ring_disk"}
HEADER_BYTES = 4096
SIZE_BYTES = 4 << 20
SANITIZED = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of both programs."""
    built = tmp_path_factory.mktemp("programs")
    subprocess.run(["make", "-C", SOURCES, f"BUILD={built}", f"CFLAGS={SANITIZED}"], check=True)
    return built


class Disk:
    """The file of a disk, and the processes that serve it."""

    def __init__(self, program: Path, run_dir: Path) -> None:
        self.path = run_dir / "disk"
        self._command = [str(program), str(run_dir), DEVICE, str(self.path)]
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, *size: str) -> "subprocess.Popen[str]":
        """A backend; with the size of a disk that it may make."""
        process = subprocess.Popen([*self._command, *size], stderr=subprocess.PIPE, text=True)
        self._processes.append(process)
        return process

    def content(self, offset: int, length: int) -> bytes:
        """The disk's bytes in its file."""
        with self.path.open("rb") as file:
            return os.pread(file.fileno(), length, HEADER_BYTES + offset)

    def end(self) -> None:
        for each in self._processes:
            each.kill()
            each.wait()
            assert each.stderr is not None
            each.stderr.close()


@pytest.fixture(params=["zeromq", "ring"])
def disk(
    request: pytest.FixtureRequest, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Disk]:
    monkeypatch.setattr(FakeWorker, "transport", request.param)
    made = Disk(programs / PROGRAMS[request.param], tmp_path)
    yield made
    made.end()


def _end_of(process: "subprocess.Popen[str]") -> tuple[int, str]:
    _, said = process.communicate(timeout=DEADLINE_S)
    return process.returncode, said


@contextmanager
def _served(
    disk: Disk, placement: str = "pool", queues: int = 1, depth: int = 8, max_io_bytes: int = 64 << 10
) -> Iterator[FakeWorker]:
    """A device that a new disk serves, and that ends with a detach."""
    with FakeWorker(
        disk.path.parent, placement=placement, queues=queues, depth=depth, max_io_bytes=max_io_bytes
    ) as worker:
        process = disk.start(str(SIZE_BYTES))
        worker.accept()
        yield worker
        worker.detach()
        assert _end_of(process) == (0, "")


def test_they_build_without_a_warning(tmp_path: Path) -> None:
    # Without the flags of a make that runs the tests: with -j it would warn of its jobserver.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    command = ["make", "-C", str(SOURCES), f"BUILD={tmp_path}"]
    built = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert "-Wall -Wextra -Werror" in built.stdout and built.stderr == ""


@pytest.mark.parametrize("placement", ["pool", "backend"])
def test_every_operation_on_several_queues(disk: Disk, placement: str) -> None:
    with _served(disk, placement, queues=3) as worker:
        assert worker.attach is not None and worker.attach.volatile_cache
        assert worker.size_bytes == SIZE_BYTES
        for queue in range(3):
            offset = queue << 16
            data = os.urandom(12288)
            flags = Flag.FUA if queue == 1 else 0
            assert worker.write(offset, data, queue=queue, tag=queue, flags=flags) == len(data)
            assert worker.read(offset, len(data), queue=queue) == data
            assert worker.do(Op.FLUSH, queue=queue) == 0
            assert disk.content(offset, len(data)) == data
            assert worker.do(Op.DISCARD, offset, 4096, queue=queue) == 0
            assert worker.do(Op.WRITE_ZEROES, offset + 4096, 512, queue=queue) == 0
            assert (
                worker.do(Op.WRITE_ZEROES, offset + 8192, 512, queue=queue, flags=Flag.NOUNMAP | Flag.FUA)
                == 0
            )
            left = worker.read(offset + 4096, 8192, queue=queue)
            assert left == bytes(512) + data[4608:8192] + bytes(512) + data[8704:]
        assert worker.read(SIZE_BYTES - 4096, 4096) == bytes(4096)


def test_requests_past_the_end_fail_and_change_nothing(disk: Disk) -> None:
    with _served(disk) as worker:
        before = disk.path.stat().st_size
        assert worker.write(SIZE_BYTES - 512, b"x" * 4096) == -22
        assert worker.do(Op.WRITE_ZEROES, SIZE_BYTES, 512) == -22
        assert worker.do(Op.DISCARD, (1 << 64) - 512, 1024) == -22
        assert disk.path.stat().st_size == before
        assert worker.read(SIZE_BYTES - 512, 512) == bytes(512)


def test_an_answered_write_survives_a_kill_and_a_successor_executes_the_rest(disk: Disk) -> None:
    with FakeWorker(disk.path.parent, queues=2) as worker:
        process = disk.start(str(SIZE_BYTES))
        first = worker.accept()
        assert worker.write(0, b"a" * 4096) == 4096
        process.kill()
        process.communicate()
        worker.may_create = False
        successor = disk.start()
        second = worker.accept()
        assert first.identity == second.identity and first.identity is not None
        assert len(first.identity.value) == 32 and first.identity.strength == "strong"
        replayed = worker.describe(Kind.REQUEST, Op.WRITE, 4096, 4096, flags=Flag.REPLAY)
        worker.pool[replayed.buffer : replayed.buffer + 4096] = b"b" * 4096
        worker.send(0, [replayed])
        assert worker.answer_of(replayed).result == 4096
        assert worker.read(0, 8192) == b"a" * 4096 + b"b" * 4096
        worker.detach()
        assert _end_of(successor) == (0, "")


def test_a_kill_between_place_and_data_loses_nothing(disk: Disk) -> None:
    with FakeWorker(disk.path.parent, placement="backend") as worker:
        process = disk.start(str(SIZE_BYTES))
        worker.accept()
        placed, _ = worker.place(0, 4096)
        assert placed.kind == Kind.PLACED
        process.kill()
        process.communicate()
        successor = disk.start()
        worker.accept()
        assert worker.write(0, b"s" * 4096) == 4096
        assert disk.content(0, 4096) == b"s" * 4096
        worker.detach()
        assert _end_of(successor) == (0, "")


def _second_worker(worker: FakeWorker, queue: int) -> None:
    """The successor of a worker that died: HELLO, WELCOME, FENCE, FENCED."""
    old = worker.epoch
    worker.restart_worker(queue)
    # An answer to the dead worker may come before the HELLO.
    while (greeting := worker.receive(queue)).kind != Kind.HELLO:
        assert greeting.epoch <= old
    assert (greeting.queue, greeting.epoch) == (queue, old)
    worker.epoch = old + 1
    answers = [
        Descriptor(kind, device=DEVICE_NUMBER, queue=queue, epoch=worker.epoch)
        for kind in (Kind.WELCOME, Kind.FENCE)
    ]
    worker.send(queue, answers)
    assert worker.receive(queue) == answers[1]._replace(kind=Kind.FENCED)


@pytest.mark.parametrize("placement", ["pool", "backend"])
def test_a_workers_successor_is_greeted_and_fenced(disk: Disk, placement: str) -> None:
    with _served(disk, placement, queues=2) as worker:
        for _ in range(3):
            assert worker.write(0, b"1" * 4096) == 4096
            _second_worker(worker, 0)
            assert worker.write(0, b"2" * 4096) == 4096
            worker.epoch -= 1
            assert worker.write(8192, b"3" * 4096, queue=1) == 4096
            worker.epoch += 1


def test_a_request_of_an_old_epoch_is_not_executed(disk: Disk) -> None:
    with _served(disk) as worker:
        old = worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096, tag=1)
        worker.pool[old.buffer : old.buffer + 4096] = b"o" * 4096
        fence = worker.fence()
        worker.send(0, [old])
        assert worker.receive() == fence._replace(kind=Kind.FENCED)
        assert worker.read(0, 4096) == bytes(4096)


def test_a_write_waits_for_a_slot_and_a_fence_gives_slots_back(disk: Disk) -> None:
    most = 8 << 20
    with _served(disk, "backend", max_io_bytes=most, depth=4) as worker:
        places = [worker.describe(Kind.PLACE, Op.WRITE, 0, 4096, tag=tag) for tag in range(4)]
        worker.send(0, places)
        placed = [worker.answer_of(each) for each in places[:2]]
        assert {each.buffer for each in placed} == {0, most}
        assert worker.is_silent()
        worker.release(places[1])
        assert worker.answer_of(places[2]).buffer == placed[1].buffer
        # The fourth waits and is released; it is never placed.
        worker.release(places[3])
        worker.release(places[0])
        assert worker.is_silent()
        again = worker.describe(Kind.PLACE, Op.WRITE, 0, 4096, tag=0)
        worker.send(0, [again])
        assert worker.answer_of(again).buffer == placed[0].buffer
        worker.fence()
        assert worker.receive().kind == Kind.FENCED
        fresh = [worker.describe(Kind.PLACE, Op.WRITE, 0, 4096, tag=tag) for tag in range(2)]
        worker.send(0, fresh)
        assert {worker.answer_of(each).buffer for each in fresh} == {0, most}


def test_many_requests_in_one_frame_are_answered_in_order(disk: Disk) -> None:
    with _served(disk, depth=64, max_io_bytes=4096) as worker:
        requests = [worker.describe(Kind.REQUEST, Op.READ, 0, 4096, tag=tag) for tag in range(64)]
        for each in requests:
            worker.send(0, [each])
        assert [worker.receive().tag for _ in requests] == list(range(64))


def test_answers_wait_for_room_in_a_small_ring(programs: Path, tmp_path: Path) -> None:
    disk = Disk(programs / "ring_disk", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeWorker, "transport", "ring")
        with FakeWorker(tmp_path, depth=8) as worker:
            worker.rings().entries = 4
            process = disk.start(str(SIZE_BYTES))
            worker.accept()
            requests = [worker.describe(Kind.REQUEST, Op.FLUSH, tag=tag) for tag in range(8)]
            for half in (requests[:4], requests[4:]):
                worker.send(0, half)
                while worker.rings().get(64) != worker.rings()._written:
                    assert process.poll() is None, process.communicate()
                    os.sched_yield()
            assert [worker.receive().tag for _ in requests] == list(range(8))
            worker.detach()
            assert _end_of(process) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0(disk: Disk, number: signal.Signals) -> None:
    with FakeWorker(disk.path.parent) as worker:
        process = disk.start(str(SIZE_BYTES))
        worker.accept()
        assert worker.write(0, b"t" * 4096) == 4096
        process.send_signal(number)
        assert _end_of(process) == (0, "")
        assert disk.content(0, 4096) == b"t" * 4096


def test_it_outlives_the_daemon_and_ends_with_the_last_worker(disk: Disk) -> None:
    with FakeWorker(disk.path.parent, queues=2) as worker:
        process = disk.start(str(SIZE_BYTES))
        worker.accept()
        worker.hang_up()
        assert worker.write(0, b"d" * 4096, queue=1) == 4096
        worker.links[0].end()
        assert worker.write(4096, b"e" * 4096, queue=1) == 4096
        worker.links[1].end()
        assert _end_of(process)[0] == 1


def test_a_missing_store_of_a_device_that_was_served_is_not_made(disk: Disk) -> None:
    with FakeWorker(disk.path.parent) as worker:
        worker.may_create = False
        process = disk.start(str(SIZE_BYTES))
        worker.answer_question()
        status, said = _end_of(process)
        assert status == 1 and str(disk.path) in said and not disk.path.exists()


@pytest.mark.parametrize("content", [b"", b"another program's file" * 500, b"ublkpool example"])
def test_a_file_that_is_no_disk_is_left_alone(disk: Disk, content: bytes) -> None:
    disk.path.write_bytes(content)
    with FakeWorker(disk.path.parent) as worker:
        process = disk.start(str(SIZE_BYTES))
        worker.answer_question()
        assert _end_of(process)[0] == 1
    assert disk.path.read_bytes() == content


def test_a_store_smaller_than_its_device_is_refused(disk: Disk) -> None:
    with _served(disk):
        pass
    with FakeWorker(disk.path.parent, size_bytes=2 * SIZE_BYTES) as worker:
        process = disk.start()
        worker.answer_question()
        status, said = _end_of(process)
        assert status == 1 and str(2 * SIZE_BYTES) in said


def test_a_store_that_is_cut_ends_it_without_an_answer(disk: Disk) -> None:
    with FakeWorker(disk.path.parent) as worker:
        process = disk.start(str(SIZE_BYTES))
        worker.accept()
        os.truncate(disk.path, HEADER_BYTES + 4096)
        worker.send(0, [worker.describe(Kind.REQUEST, Op.WRITE, 8192, 4096)])
        status, said = _end_of(process)
        assert status == 1 and "shorter" in said
        assert disk.path.stat().st_size == HEADER_BYTES + 4096


def test_a_successor_waits_for_the_file_of_its_predecessor(disk: Disk) -> None:
    with FakeWorker(disk.path.parent) as worker:
        first = disk.start(str(SIZE_BYTES))
        worker.accept()
        second = disk.start()
        worker.answer_question()
        first.kill()
        first.communicate()
        worker.accept()
        assert worker.write(0, b"n" * 512) == 512
        worker.detach()
        assert _end_of(second) == (0, "")


def test_a_read_only_device_has_a_read_only_disk(disk: Disk) -> None:
    with _served(disk) as worker:
        assert worker.write(0, b"r" * 512) == 512
    disk.path.chmod(0o444)
    with FakeWorker(disk.path.parent) as worker:
        process = disk.start()
        connection, _ = worker._listener.accept()
        connection.recv(4096)
        connection.send(
            wire.encode_message(
                wire.Described(
                    v=1,
                    device=DEVICE,
                    size_bytes=SIZE_BYTES,
                    max_io_bytes=64 << 10,
                    need_get_data=False,
                    placement="pool",
                    read_only=True,
                    may_create=False,
                )
            )
        )
        connection.close()
        attach = worker.accept()
        assert attach.read_only and attach.discard_max_bytes == 0
        assert worker.read(0, 512) == b"r" * 512
        worker.detach()
        assert _end_of(process) == (0, "")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x00",
        b"{}",
        b"[" * 5000,
        b'{"type":"attached","v":1}',
        b'{"type":"attached","v":2,"device":"x"}',
        b'{"type":"attached","v":1,"device_number":-1}',
        b'{"type":"attached","v":1,"device_number":4294967296}',
        b'{"type":"attached","v":1,"device_number":7,"queues":1e9}',
        b'{"type":"\\ud800","v":1}',
        b'{"type":"refused","reason":"\\u00e9\\ud83d\\ude00 ' + b"x" * 3000 + b'"}',
        b'{"type":"attached","v":1',
        b'{"type":"attached" "v":1}',
    ],
)
def test_an_answer_that_makes_no_sense_ends_it_with_one_line(disk: Disk, answer: bytes) -> None:
    with FakeWorker(disk.path.parent) as worker:
        process = disk.start(str(SIZE_BYTES))
        worker.receive_attach()
        assert worker.connection is not None
        if answer:
            worker.connection.send(answer)
        worker.hang_up()
        status, said = _end_of(process)
    assert status == 1 and said.count("\n") == 1


def test_a_refusal_is_told(disk: Disk) -> None:
    with FakeWorker(disk.path.parent) as worker:
        process = disk.start(str(SIZE_BYTES))
        worker.receive_attach()
        worker.tell(wire.Refused(reason='it has "another"\nstore \\ \u20ac'))
        assert _end_of(process) == (1, 'refused: it has "another"\nstore \\ \u20ac\n')


@pytest.mark.parametrize(
    "arguments", [[], ["run", "vol0"], ["run", "vol0", "file", "12x"], ["r", "v", "f", "100"]]
)
def test_wrong_arguments_are_a_usage_error(programs: Path, arguments: list[str]) -> None:
    for program in PROGRAMS.values():
        ran = subprocess.run([programs / program, *arguments], capture_output=True, text=True)
        assert ran.returncode == 2 and ran.stderr.count("\n") == 1


@pytest.mark.parametrize("transport", PROGRAMS)
def test_every_promise_is_kept_under_kills_stops_and_fences(
    programs: Path, tmp_path: Path, transport: str
) -> None:
    program = f"{programs / PROGRAMS[transport]} {{run_dir}} {{device}} {tmp_path / 'disk'} {SIZE_BYTES}"
    options = ["--transport", transport, "--queues", "3", "--seconds", "3", "--deadline", "60", program]
    checked = subprocess.run(
        [sys.executable, "-m", "ublkpool.daemon", "backend", "check", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "with placement backend and pool" in checked.stdout


def test_a_request_that_names_no_memory_ends_it(disk: Disk) -> None:
    with FakeWorker(disk.path.parent) as worker:
        process = disk.start(str(SIZE_BYTES))
        worker.accept()
        foreign = worker.describe(Kind.REQUEST, Op.READ, 0, 4096)._replace(buffer=1 << 60)
        worker.send(0, [foreign])
        assert _end_of(process)[0] == 1
