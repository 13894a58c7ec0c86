"""The SDK's links through shared memory: rings that are full, that end, and that break the protocol."""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from support.fakes.links import CONTROL_BYTES, HEAD, TAIL, TO_WORKER, FakeRings, say_opened, sealed_memory
from support.fakes.plain_backend import Held, Plain
from support.fakes.worker import DEADLINE_S, BackendThread, FakeWorker, serving
from ublkpool.bufpool import wire
from ublkpool.bufpool.errors import BackendError, WireError
from ublkpool.bufpool.sdk import ring_links
from ublkpool.bufpool.sdk.client import Transport, make_links
from ublkpool.bufpool.sdk.links import Links, unread_max
from ublkpool.bufpool.sdk.zeromq_links import ZeroMQLinks
from ublkpool.bufpool.wire import Descriptor, Kind, Op

DEPTH = 8


@pytest.fixture(params=["a loop in C", "Python carries"])
def worker(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeWorker]:
    """Whether the backend's process has io_uring for the C loop."""

    def no_loop(*_: object) -> None:
        raise BackendError("no loop in C")

    monkeypatch.setattr(FakeWorker, "transport", "ring")
    if request.param == "Python carries":
        monkeypatch.setattr(ring_links, "RingDriver", no_loop)
    with FakeWorker(tmp_path, queues=2, depth=DEPTH) as worker:
        yield worker


def _answer_held(worker: FakeWorker, backend: Held, requests: list[Descriptor]) -> None:
    """Send requests to the backend on a queue, and wait for its answers."""
    worker.send(requests[0].queue, requests)
    for request in backend.wait_for(len(requests))[-len(requests) :]:
        request.complete(0)


def test_answers_that_find_no_room_come_later_and_in_order(worker: FakeWorker) -> None:
    worker.rings().entries = 4
    backend = Held()
    with serving(worker, backend):
        requests = [worker.describe(Kind.REQUEST, Op.FLUSH, tag=tag) for tag in range(DEPTH)]
        _answer_held(worker, backend, requests[:4])
        _answer_held(worker, backend, requests[4:])
        # Once a later request is answered, the loop has sent as many of these answers as fit.
        later = worker.describe(Kind.REQUEST, Op.FLUSH, queue=1)
        _answer_held(worker, backend, [later])
        assert worker.answer_of(later).kind == Kind.DONE
        first = worker.rings().take()
        tags = [each.tag for each in wire.iter_frame(first)]
        tags += [worker.receive().tag for _ in range(DEPTH - len(tags))]
    assert len(first) == 4 * wire.DESCRIPTOR_BYTES
    assert tags == list(range(DEPTH))


def test_the_loop_ends_once_the_last_answer_has_found_room(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A starved worker may need longer than the second that a backend gives it.
    monkeypatch.setattr(ring_links, "_SETTLE_MS", int(1000 * DEADLINE_S))
    worker.rings().entries = 4
    backend = Held()
    thread = BackendThread(backend, worker.run_dir)
    worker.accept()
    requests = [worker.describe(Kind.REQUEST, Op.FLUSH, tag=tag) for tag in range(DEPTH)]
    _answer_held(worker, backend, requests[:4])
    _answer_held(worker, backend, requests[4:])
    worker.detach()
    assert [worker.receive().tag for _ in range(DEPTH)] == list(range(DEPTH))
    assert thread.join() == 0


def test_the_loop_serves_the_other_queues_while_one_has_no_worker(worker: FakeWorker) -> None:
    with serving(worker, Plain()):
        worker.epoch += 1
        worker.links[0].end()
        for offset in range(0, 65536, 4096):
            assert worker.write(offset, b"o" * 4096, queue=1) == 4096
        worker.links[0].restart()
        assert worker.receive(0).kind == Kind.HELLO
        assert worker.write(0, b"r" * 4096) == 4096


def test_no_doorbell_rings_for_a_side_that_is_awake(worker: FakeWorker) -> None:
    with serving(worker, Plain()):
        rings = worker.rings()
        # A doorbell for HELLO may come late, but before the backend's next answer.
        assert worker.do(Op.FLUSH, queue=1) == 0
        rings.hear_bell()
        worker.send(0, [worker.describe(Kind.REQUEST, Op.FLUSH)])
        while (rings.get(TO_WORKER + TAIL) - rings.begun) & 0xFFFFFFFF < 2:
            os.sched_yield()
        assert not rings.bell_rang
        rings.take()
        assert worker.do(Op.FLUSH) == 0


def test_an_answer_to_a_dead_worker_is_not_sent_to_its_successor(worker: FakeWorker) -> None:
    backend = Held()
    with serving(worker, backend):
        worker.send(0, [worker.describe(Kind.REQUEST, Op.WRITE, 0, 4096)])
        held = backend.wait_for(1)[0]
        worker.restart_worker(0)
        assert worker.receive().kind == Kind.HELLO
        worker.fence_executing()
        assert worker.is_silent()
        held.complete()
        assert worker.receive().kind == Kind.FENCED
        assert worker.is_silent()


def test_a_connection_that_ends_without_an_answer_is_made_again(worker: FakeWorker, tmp_path: Path) -> None:
    thread = BackendThread(Plain(), tmp_path)
    worker.answer_attach()
    for _ in range(3):
        worker.rings().hear_question(DEADLINE_S).close()
    for queue in range(2):
        assert worker.receive(queue).kind == Kind.HELLO
    worker.detach()
    assert thread.join() == 0


def test_attempts_become_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    link = ring_links.RingConnection(0, "nowhere")
    delays = []
    for _ in range(6):
        link.put_off()
        delays.append(round(link.due_s - 100, 2))
    assert delays == [0.01, 0.02, 0.04, 0.08, 0.16, 0.2]


def test_more_than_a_ring_holds_ends_the_backend(worker: FakeWorker, tmp_path: Path) -> None:
    thread = BackendThread(Plain(), tmp_path)
    worker.accept()
    worker.rings().publish(1000)
    with pytest.raises(WireError, match=r"the worker (stored|sent)"):
        thread.join()


def test_more_read_than_was_written_ends_the_backend(worker: FakeWorker, tmp_path: Path) -> None:
    worker.rings().entries = 4
    thread = BackendThread(Plain(), tmp_path)
    worker.accept()
    worker.rings().put(TO_WORKER + HEAD, 1000)
    # The backend reads the head only when its ring seems full.
    worker.send(0, [worker.describe(Kind.REQUEST, Op.FLUSH, tag=tag) for tag in range(4)])
    with pytest.raises(
        WireError,
        match=r"queue 0: (sending into its ring|the worker (stored|sent))",
    ):
        thread.join()


def _opened(entries: int) -> bytes:
    return msgspec.json.encode(wire.RingOpened(entries=entries))


@pytest.mark.parametrize("entries", [0, 3, 96, 1 << 17, -64, 1 << 40])
def test_an_impossible_number_of_entries_is_refused(entries: int) -> None:
    files = [sealed_memory(1 << 20), os.eventfd(0), os.eventfd(0)]
    with pytest.raises(WireError, match=f"queue 3: {entries} entries"):
        ring_links.QueueRings(3, _opened(entries), files)
    for file in files:
        with pytest.raises(OSError):
            os.fstat(file)


def test_memory_that_is_smaller_than_announced_or_could_shrink() -> None:
    whole = CONTROL_BYTES + 2 * 64 * wire.DESCRIPTOR_BYTES
    for file in (sealed_memory(whole - 1), sealed_memory(whole, 0), os.eventfd(0)):
        with pytest.raises(WireError, match="memory"):
            ring_links.QueueRings(0, _opened(64), [file, os.eventfd(0), os.eventfd(0)])
    ring_links.QueueRings(0, _opened(64), [sealed_memory(whole), os.eventfd(0), os.eventfd(0)]).close()


@pytest.mark.parametrize("packet", [b"", b"{}", b'{"type":"ring_open"}', b"\xff"])
def test_an_invalid_answer_to_a_ring_request_is_an_error(packet: bytes) -> None:
    with pytest.raises(WireError, match="queue 0"):
        ring_links.QueueRings(0, packet, [sealed_memory(1 << 20), os.eventfd(0), os.eventfd(0)])
    with pytest.raises(WireError, match="2 files instead of 3"):
        ring_links.QueueRings(0, _opened(64), [sealed_memory(1 << 20), os.eventfd(0)])


def test_a_nonsensical_answer_ends_the_backend(worker: FakeWorker, tmp_path: Path) -> None:
    thread = BackendThread(Plain(), tmp_path)
    worker.answer_attach()
    with worker.rings().hear_question(DEADLINE_S) as connection:
        say_opened(connection, 64, [sealed_memory(4096)])
        with pytest.raises(WireError, match="queue 0: rings came with 1 files"):
            thread.join()


def _attached(rings: tuple[str, ...], queues: int = 0) -> wire.Attached:
    """The reply to an attach; without queues the SDK connects nothing."""
    return wire.Attached(
        v=wire.PROTOCOL_VERSION,
        device="x",
        device_number=0,
        size_bytes=0,
        logical_block_bytes=512,
        queues=queues,
        depth=1,
        max_io_bytes=4096,
        need_get_data=False,
        placement="pool",
        read_only=False,
        epoch=1,
        token="42" * wire.TOKEN_BYTES,
        endpoints=(),
        rings=rings,
        segments=(),
        own_segment=0,
    )


@pytest.mark.parametrize(
    ("rings", "wanted", "kind"),
    [
        ((), "auto", ZeroMQLinks),
        (("r",), "auto", ring_links.RingLinks),
        (("r",), "ring", ring_links.RingLinks),
        (("r",), "zeromq", ZeroMQLinks),
    ],
)
def test_rings_are_taken_if_they_are_offered_and_wanted(
    rings: tuple[str, ...], wanted: Transport, kind: type[Links]
) -> None:
    links = make_links(_attached(rings), wanted)
    links.close()
    assert isinstance(links, kind)


def test_transport_ring_without_rings_is_an_error() -> None:
    with pytest.raises(BackendError, match="offers no rings; transport=zeromq"):
        make_links(_attached(()), "ring")


def test_a_backend_that_is_ending_takes_no_new_rings(tmp_path: Path) -> None:
    worker = FakeRings(tmp_path / "q0")
    attached = _attached((str(tmp_path / "q0"),), queues=1)
    worker.expect(bytes.fromhex(attached.token))
    links = ring_links.RingLinks(attached)
    with worker.hear_question(DEADLINE_S) as late:
        links.stop_receiving()
        file = sealed_memory(CONTROL_BYTES + 2 * 64 * wire.DESCRIPTOR_BYTES)
        say_opened(late, 64, [file, file, file])
        os.close(file)
        assert links.poll(1000) == ([], [])
        assert links.linked == 0
        with pytest.raises(ConnectionResetError):
            late.recv(1)
    links.close()
    worker.end()


@pytest.mark.parametrize("transport", ["ring", "zeromq"])
def test_answers_beyond_the_most_that_can_be_due_end_the_backend(
    tmp_path: Path, transport: Transport
) -> None:
    worker = FakeRings(tmp_path / "q0")
    attached = msgspec.structs.replace(
        _attached((str(tmp_path / "q0"),), queues=1),
        endpoints=(f"ipc://{tmp_path}/nobody",),
        depth=4,
        post_bytes=(4096, 65536),
    )
    worker.expect(bytes.fromhex(attached.token))
    links = make_links(attached, transport)
    entries = 4
    if transport == "ring":
        file = sealed_memory(CONTROL_BYTES + 2 * entries * wire.DESCRIPTOR_BYTES)
        with worker.hear_question(DEADLINE_S) as connection:
            say_opened(connection, entries, [file, os.eventfd(0), os.eventfd(0)])
            while not links.linked:
                links.poll(1000)
            # HELLO has taken one of the ring's entries.
            _fill(links, entries - 1 + unread_max(attached), 0)
    else:
        _fill(links, unread_max(attached), 9 * unread_max(attached))
    links.close()
    worker.end()


def _fill(links: Links, at_least: int, at_most_more: int) -> None:
    """Send `at_least` descriptors, which are kept; within `at_most_more` others the link refuses one."""
    answer = wire.pack_frame([Descriptor(kind=Kind.DONE)])
    for _ in range(at_least):
        links.send_frame(0, answer)
    with pytest.raises(WireError, match=r"queue 0: more than 14 answers wait: its worker reads nothing"):
        for _ in range(at_most_more + 1):
            links.send_frame(0, answer)
