"""The native engine on an image: what librbd is given, when it answers, and after which answers nothing is answered."""

import errno
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from support.fakes.native_rig import DEVICE_NUMBER, EPOCH, SLICE_SEGMENT, NativeRig
from support.fakes.rbd import FakeRbd, FakeRbdBackend
from support.fakes.worker import FakeWorker, serving
from ublkpool.bufpool.errors import BackendError, StoreTaken
from ublkpool.bufpool.wire import SEGMENT_POOL, Descriptor, Flag, Kind, Op

SIZE_BYTES = 1 << 20
BLOCK = 4096


@pytest.fixture
def rbd() -> Iterator[FakeRbd]:
    with closing(FakeRbd(SIZE_BYTES)) as rbd:
        yield rbd


@pytest.fixture
def rig(rbd: FakeRbd) -> Iterator[NativeRig]:
    with closing(NativeRig(rbd.storage(), size_bytes=SIZE_BYTES, own_bytes=0, depth=4)) as rig:
        yield rig


@pytest.fixture(params=["zeromq", "ring"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(FakeWorker, "transport", request.param)
    return str(request.param)


def asked(
    op: Op, tag: int = 0, offset: int = 0, length: int = BLOCK, flags: int = 0, segment: int = SEGMENT_POOL
) -> Descriptor:
    return Descriptor(
        Kind.REQUEST, op, flags, DEVICE_NUMBER, 0, tag, EPOCH, 1, offset, length, 0, segment, tag * BLOCK
    )


def outcome(rbd: FakeRbd, rig: NativeRig, *requests: Descriptor) -> list[int]:
    """The results of requests that librbd answers by itself."""
    said = rig.say(requests)
    rbd.settle()
    return results(said + rig.hear())


def results(said: list[Descriptor]) -> list[int]:
    return [each.result for each in said if each.kind == Kind.DONE]


@pytest.mark.parametrize("placement", ["pool", "backend"])
def test_a_worker_s_requests_are_served(rbd: FakeRbd, tmp_path: Path, transport: str, placement: str) -> None:
    data = bytes(range(256)) * 16
    with FakeWorker(tmp_path, placement=placement) as worker, serving(worker, FakeRbdBackend(rbd)):
        for turn in range(20):
            assert worker.write(BLOCK * turn, data) == BLOCK
        assert worker.read(BLOCK * 7, BLOCK) == data
        assert worker.do(Op.DISCARD, BLOCK * 7, BLOCK) == 0
        assert worker.do(Op.WRITE_ZEROES, BLOCK * 8, BLOCK) == 0
        assert worker.read(BLOCK * 7, 2 * BLOCK) == bytes(2 * BLOCK)
        assert worker.do(Op.FLUSH) == 0
        assert rbd.disk[: BLOCK * 7] == data * 7
    assert len(rbd.released) == len(rbd.calls)


def test_data_moves_straight_between_the_pool_and_the_image(rbd: FakeRbd, rig: NativeRig) -> None:
    rig.say([asked(Op.WRITE, tag=2)])
    assert rbd.calls[0].memory == rig.pool.address + 2 * BLOCK


def test_what_a_client_may_change_is_copied_first(rbd: FakeRbd, rig: NativeRig) -> None:
    rbd.holds = True
    rig.slice.view[:BLOCK] = b"a" * BLOCK
    rig.say([asked(Op.WRITE, segment=SLICE_SEGMENT), asked(Op.READ, tag=1, segment=SLICE_SEGMENT)])
    rig.slice.view[:BLOCK] = b"b" * BLOCK
    rbd.answer(rbd.calls[0])
    rbd.settle()
    assert rbd.disk[:BLOCK] == b"a" * BLOCK
    assert rbd.calls[1].memory == rig.slice.address + BLOCK, "a read needs no copy"
    rbd.answer(rbd.calls[1])
    rbd.settle()
    assert sorted(results(rig.hear())) == [BLOCK, BLOCK]


@pytest.mark.parametrize(("op", "call"), [(Op.WRITE, "write"), (Op.WRITE_ZEROES, "write_zeroes")])
def test_fua_is_answered_after_a_flush_that_follows(rbd: FakeRbd, rig: NativeRig, op: Op, call: str) -> None:
    rbd.holds = True
    assert rig.say([asked(op, flags=Flag.FUA)]) == []
    rbd.answer(rbd.calls[0])
    rbd.settle()
    assert rig.hear() == [], "not durable yet"
    assert rbd.names == [call, "flush"]
    rbd.answer(rbd.calls[1])
    rbd.settle()
    assert results(rig.hear()) == [BLOCK if op == Op.WRITE else 0]


def test_zeroes_that_may_not_become_a_hole_are_written(rbd: FakeRbd, rig: NativeRig) -> None:
    rig.say([asked(Op.WRITE_ZEROES), asked(Op.WRITE_ZEROES, tag=1, flags=Flag.NOUNMAP)])
    assert [each.flags for each in rbd.calls] == [0, 1]


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.ETIMEDOUT])
def test_an_error_is_the_request_s_alone(rbd: FakeRbd, rig: NativeRig, error: int) -> None:
    rbd.results["write"] = -error
    assert outcome(rbd, rig, asked(Op.WRITE)) == [-error]
    assert outcome(rbd, rig, asked(Op.READ, tag=1)) == [BLOCK]


def test_a_call_that_fails_at_once_is_answered(rbd: FakeRbd, rig: NativeRig) -> None:
    rbd.refuses["discard"] = -errno.ENOMEM
    assert results(rig.say([asked(Op.DISCARD)])) == [-errno.ENOMEM]
    assert len(rbd.released) == 1


@pytest.mark.parametrize(
    ("call", "op", "result", "error", "words"),
    [
        ("write", Op.WRITE, -errno.ESHUTDOWN, StoreTaken, "blocklisted"),
        ("read", Op.READ, -errno.ESHUTDOWN, StoreTaken, "blocklisted"),
        ("write", Op.WRITE, -errno.EROFS, BackendError, "lock of the store was lost"),
        ("write", Op.WRITE, -errno.EINVAL, BackendError, "shorter"),
        ("read", Op.READ, BLOCK - 512, BackendError, "shorter"),
    ],
)
def test_after_these_results_nothing_is_answered_and_nothing_is_sent(
    rbd: FakeRbd, rig: NativeRig, call: str, op: Op, result: int, error: type[BackendError], words: str
) -> None:
    rbd.results[call] = result
    rbd.holds = True
    rig.say([asked(op), asked(Op.READ, tag=1, offset=BLOCK)])
    rbd.answer(rbd.calls[0])
    rbd.settle()
    with pytest.raises(error, match=words) as raised:
        rig.hear()
    assert (type(raised.value) is StoreTaken) is (error is StoreTaken)
    sent = len(rbd.calls)
    with pytest.raises(error):
        rig.say([asked(Op.WRITE, tag=2)])
    assert len(rbd.calls) == sent
    rbd.answer(rbd.calls[1])
    rbd.settle()
    with pytest.raises(error):
        rig.hear()


def test_a_fence_is_answered_when_librbd_has_answered_what_came_before(rbd: FakeRbd, rig: NativeRig) -> None:
    rbd.holds = True
    rig.say([asked(Op.WRITE)])
    fence = Descriptor(Kind.FENCE, device=DEVICE_NUMBER, queue=0, epoch=EPOCH + 1)
    assert rig.say([fence]) == []
    rbd.answer(rbd.calls[0])
    rbd.settle()
    assert [each.kind for each in rig.hear()] == [Kind.FENCED]


def test_librbd_may_answer_after_the_engine_s_end(rbd: FakeRbd) -> None:
    rig = NativeRig(rbd.storage(), size_bytes=SIZE_BYTES, own_bytes=0, depth=4)
    rbd.holds = True
    rig.say([asked(Op.FLUSH)])
    rig.close()
    rbd.answer(rbd.calls[0])
    rbd.settle()
    assert rbd.released == [rbd.calls[0].completion]


def test_many_answers_at_once_reach_the_worker(rbd: FakeRbd, tmp_path: Path, transport: str) -> None:
    rbd.holds = True
    with FakeWorker(tmp_path, depth=8) as worker, serving(worker, FakeRbdBackend(rbd)):
        for _ in range(10):
            wanted = [worker.describe(Kind.REQUEST, Op.READ, BLOCK * tag, BLOCK, tag=tag) for tag in range(8)]
            before = len(rbd.calls)
            worker.send(0, wanted)
            while len(rbd.calls) < before + 8:
                rbd.settle()
            for call in rbd.calls[before:]:
                rbd.answer(call)
            answered = {worker.receive().tag for _ in wanted}
            assert answered == set(range(8))
