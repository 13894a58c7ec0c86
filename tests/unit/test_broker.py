"""The broker as it runs: a process of its own, real sockets, real shared memory, and deaths."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from ublkpool.bufpool.arena import Arena, Control, arena_prefix, list_orphans, unlink_arena
from ublkpool.bufpool.broker import (
    OP_SYNC_ASKED,
    AddDevice,
    BrokerStatistics,
    Command,
    DeviceLeases,
    Done,
    Failed,
    GetStatistics,
    Reclaim,
    Register,
    RemoveDevice,
    Reply,
    StatisticsReply,
    Stop,
    parse_routing_id,
    receive_reply,
    run_broker,
    send_command,
    worker_routing_id,
)
from ublkpool.bufpool.errors import PoolError, WireError
from ublkpool.bufpool.lease import Owner
from ublkpool.bufpool.limits import Geometry
from ublkpool.bufpool.wire import Descriptor, Kind, pack_slots, unpack_slots

INSTANCE = f"test-broker-{os.getpid()}"
DEVICE = 5
QUEUES = 2
RESERVE = (2, 1)
GEOMETRY = Geometry.build([(4096, 10), (65536, 4)])
WAIT_MS = 10_000

_PROGRAM = """
import socket, sys
from ublkpool.bufpool.broker import run_broker
run_broker(sys.argv[1], socket.socket(fileno=int(sys.argv[2])), exit_on_eof=sys.argv[3] == "True")
"""


class BrokerProcess:
    """A broker that really runs, and the daemon's end of its control socket."""

    def __init__(self, endpoint: str, exit_on_eof: bool = True) -> None:
        self.control, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(WAIT_MS / 1000)
        with child:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, endpoint, str(child.fileno()), str(exit_on_eof)],
                pass_fds=[child.fileno()],
                stderr=subprocess.PIPE,
                text=True,
            )

    def call(self, command: Command, fd: int | None = None) -> Reply:
        send_command(self.control, command, fd)
        return receive_reply(self.control)

    def statistics(self) -> StatisticsReply:
        reply = self.call(GetStatistics(DEVICE))
        assert isinstance(reply, StatisticsReply)
        return reply

    def wait(self) -> tuple[int, str]:
        """Exit status and what was logged."""
        _, logged = self.process.communicate(timeout=WAIT_MS / 1000)
        return self.process.returncode, logged

    def descriptor_count(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            self.process.communicate()
        self.control.close()


class Worker:
    """A worker's end of the protocol."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, queue: int, epoch: int
    ) -> None:
        self.queue, self.epoch = queue, epoch
        self.held: dict[int, list[int]] = {0: [], 1: []}
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.ROUTING_ID, worker_routing_id(DEVICE, queue, epoch))
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 10)
        self.socket.connect(endpoint)

    def frame(
        self, kind: Kind, op: int, slots: list[int] | None = None, length: int = 0, sequence: int = 0
    ) -> bytes:
        head = Descriptor(
            kind,
            op,
            device=DEVICE,
            queue=self.queue,
            epoch=self.epoch,
            sequence=sequence,
            length=length,
        )
        return head.pack() if slots is None else pack_slots(head, slots)

    def all_slots(self) -> list[int]:
        return sorted(slot for slots in self.held.values() for slot in slots)

    def say_hello(self) -> None:
        self.sync(0)
        while len(self.held[0]) < RESERVE[0] or len(self.held[1]) < RESERVE[1]:
            self.take()

    def sync(self, sequence: int) -> None:
        frames = [self.frame(Kind.SYNC, op, slots, sequence=sequence) for op, slots in self.held.items()]
        self.socket.send_multipart(frames)

    def lease(self, op: int, want: int, sequence: int = 0) -> None:
        self.socket.send(self.frame(Kind.LEASE, op, length=want, sequence=sequence))

    def give_back(self, op: int, slots: list[int]) -> None:
        self.held[op] = [slot for slot in self.held[op] if slot not in slots]
        self.socket.send(self.frame(Kind.RETURN, op, slots))

    def receive(self) -> list[Descriptor]:
        """The next message, its grants taken."""
        assert self.socket.poll(WAIT_MS), "the broker says nothing"
        descriptors = []
        for frame in self.socket.recv_multipart():
            descriptor, slots = unpack_slots(frame)
            if descriptor.kind == Kind.GRANT:
                self.held[descriptor.op].extend(slots)
            descriptors.append(descriptor)
        return descriptors

    def take(self) -> list[Descriptor]:
        """The next message that is not a question; questions are answered on the way."""
        while True:
            received = self.receive()
            rest = [each for each in received if each.op != OP_SYNC_ASKED]
            for each in received:
                if each.op == OP_SYNC_ASKED:
                    self.sync(each.sequence)
            if rest:
                return rest

    def question(self) -> int:
        """The sequence of the next question."""
        while True:
            for each in self.receive():
                if each.op == OP_SYNC_ASKED:
                    return each.sequence


@pytest.fixture
def arena() -> Iterator[Arena]:
    prefix = arena_prefix(INSTANCE, DEVICE)
    with Arena.create(prefix, GEOMETRY, QUEUES, DEVICE, RESERVE) as arena:
        yield arena
        arena.unlink()
    assert list_orphans(INSTANCE) == []


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/broker"


@pytest.fixture
def start(endpoint: str) -> Iterator[Callable[..., BrokerProcess]]:
    started: list[BrokerProcess] = []

    def start_one(exit_on_eof: bool = True) -> BrokerProcess:
        started.append(BrokerProcess(endpoint, exit_on_eof))
        return started[-1]

    yield start_one
    for each in started:
        each.kill()


@pytest.fixture
def worker(endpoint: str) -> Iterator[Callable[[int, int], Worker]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    workers: list[Worker] = []

    def connect(queue: int, epoch: int) -> Worker:
        workers.append(Worker(context, endpoint, queue, epoch))
        return workers[-1]

    yield connect
    for each in workers:
        each.socket.close()
    context.term()


Start = Callable[..., BrokerProcess]
Connect = Callable[[int, int], Worker]


@pytest.fixture
def broker(start: Start, arena: Arena) -> BrokerProcess:
    """A broker that serves the device and expects its two workers in epoch 1."""
    broker = start()
    introduce(broker, arena)
    return broker


def introduce(broker: BrokerProcess, arena: Arena) -> None:
    assert broker.call(AddDevice(DEVICE), arena.control_fd) == Done()
    for queue in range(QUEUES):
        assert broker.call(Register(DEVICE, queue, 1)) == Done()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_MS / 1000
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(0.005)


def slots_of(arena: Arena, owner: Owner) -> list[int]:
    return [slot for slot, each in enumerate(arena.control.slot_owners()) if each == owner]


def test_a_new_worker_gets_its_reserve_and_the_headers_say_so(
    broker: BrokerProcess, arena: Arena, worker: Connect
) -> None:
    first = worker(0, 1)
    first.say_hello()
    assert [len(slots) for slots in first.held.values()] == list(RESERVE)
    assert slots_of(arena, Owner(0, 1)) == first.all_slots()


def test_leases_come_at_once_or_when_another_worker_returns_some(
    broker: BrokerProcess, arena: Arena, worker: Connect
) -> None:
    first, second = worker(0, 1), worker(1, 1)
    first.say_hello()
    second.say_hello()
    first.lease(0, 6)
    first.take()
    assert len(first.held[0]) == 8
    second.lease(0, 3)
    second.take()
    assert [(each.kind, each.op, each.length) for each in first.take()] == [(Kind.RECALL, 0, 3)]
    first.give_back(0, first.held[0][:3])
    second.take()
    assert len(second.held[0]) == 5
    assert not set(first.held[0]) & set(second.held[0])
    assert slots_of(arena, Owner(1, 1)) == second.all_slots()


def test_every_lease_is_answered_with_what_is_still_to_come(broker: BrokerProcess, worker: Connect) -> None:
    first, second = worker(0, 1), worker(1, 1)
    first.say_hello()
    second.say_hello()
    first.lease(0, 4, sequence=1)
    answers = [*first.take()]
    second.lease(0, 3, sequence=1)
    answers += second.take()
    second.lease(0, 99, sequence=2)
    answers += second.take()
    first.receive()
    first.give_back(0, first.held[0][:1])
    answers += second.take()
    told = [(each.kind, each.length, each.sequence, each.offset) for each in answers]
    assert told == [
        (Kind.GRANT, 4, 1, 0),
        (Kind.GRANT, 2, 1, 1),
        (Kind.GRANT, 0, 2, 4),
        (Kind.GRANT, 1, 2, 3),
    ]


def test_a_dead_workers_buffers_return_once_and_its_successor_is_served(
    broker: BrokerProcess, arena: Arena, worker: Connect
) -> None:
    first = worker(0, 1)
    first.say_hello()
    first.lease(0, 6)
    first.take()
    assert isinstance(broker.call(Register(DEVICE, 0, 2)), Failed)
    assert broker.call(Reclaim(DEVICE, 0, 1)) == Done(slots=9)
    assert broker.call(Reclaim(DEVICE, 0, 1)) == Done(slots=0)
    assert slots_of(arena, Owner(0, 1)) == []
    first.lease(0, 1)
    assert broker.call(Register(DEVICE, 0, 2)) == Done()
    successor = worker(0, 2)
    successor.say_hello()
    assert slots_of(arena, Owner(0, 2)) == successor.all_slots()
    assert broker.statistics().broker.unknown_worker == 1


def test_a_killed_broker_is_followed_by_one_that_knows_who_holds_what(
    broker: BrokerProcess, start: Start, arena: Arena, worker: Connect
) -> None:
    first, second = worker(0, 1), worker(1, 1)
    first.say_hello()
    second.say_hello()
    first.lease(0, 4)
    first.take()
    before = list(arena.control.slot_owners())
    broker.kill()

    first.lease(0, 99)
    successor = start()
    introduce(successor, arena)
    assert list(arena.control.slot_owners()) == before
    for each in (first, second):
        each.sync(each.question())
    first.lease(0, 2)
    first.take()
    assert len(first.held[0]) == 8
    statistics = successor.statistics()
    assert statistics.leases is not None
    assert statistics.leases.conflicts == 0
    assert [each.waiting for each in statistics.leases.classes] == [0, 0]
    for each in (first, second):
        assert slots_of(arena, Owner(each.queue, 1)) == each.all_slots()


def test_a_grant_that_died_with_the_broker_comes_free_again(
    start: Start, arena: Arena, worker: Connect
) -> None:
    arena.control.grant(7, Owner(0, 1))
    introduce(start(), arena)
    first = worker(0, 1)
    first.sync(first.question())
    while sum(map(len, first.held.values())) < sum(RESERVE):
        first.take()
    assert slots_of(arena, Owner(0, 1)) == first.all_slots()


def test_a_silent_worker_is_asked_without_having_said_a_word(
    broker: BrokerProcess, start: Start, arena: Arena, worker: Connect
) -> None:
    first = worker(0, 1)
    first.say_hello()
    broker.kill()
    introduce(start(), arena)
    assert first.question() > 0


def test_an_answer_to_an_older_question_is_not_believed(
    broker: BrokerProcess, start: Start, arena: Arena, worker: Connect
) -> None:
    first = worker(0, 1)
    first.say_hello()
    broker.kill()
    successor = start()
    introduce(successor, arena)
    question = first.question()
    held, first.held = first.held, {0: [], 1: []}
    first.sync(question - 1)
    first.held = held
    first.sync(question)
    first.lease(0, 1)
    first.take()
    assert slots_of(arena, Owner(0, 1)) == first.all_slots()
    assert successor.statistics().broker.out_of_sync >= 2


def test_a_worker_with_a_new_socket_is_asked_what_it_holds(
    broker: BrokerProcess, arena: Arena, worker: Connect
) -> None:
    first = worker(0, 1)
    first.say_hello()
    again = worker(0, 1)
    again.held = first.held
    first.socket.close()
    again.sync(0)
    again.sync(again.question())
    again.lease(0, 1)
    again.take()
    assert len(again.held[0]) == RESERVE[0] + 1
    assert slots_of(arena, Owner(0, 1)) == again.all_slots()


def test_a_grant_to_a_worker_that_has_gone_is_found_out_when_it_is_back(
    broker: BrokerProcess, arena: Arena, worker: Connect
) -> None:
    first, second = worker(0, 1), worker(1, 1)
    first.say_hello()
    second.say_hello()
    first.lease(0, 6)
    first.take()
    second.lease(0, 2)
    first.take()
    connections = broker.descriptor_count()
    second.socket.close()
    wait_until(lambda: broker.descriptor_count() < connections)
    # Between the end of a connection and libzmq's knowing it a message may vanish; the new socket's SYNC mends that.
    time.sleep(0.05)
    before = broker.statistics().broker.undeliverable
    first.give_back(0, first.held[0][:2])
    wait_until(lambda: broker.statistics().broker.undeliverable > before)
    again = worker(1, 1)
    again.held = second.held
    again.sync(again.question())
    again.lease(0, 1)
    again.take()
    assert slots_of(arena, Owner(1, 1)) == again.all_slots()


@pytest.mark.parametrize(
    ("frame", "counter"),
    [
        (b"", "malformed"),
        (b"garbage", "malformed"),
        (Descriptor(Kind.LEASE, 0, device=DEVICE, queue=0, epoch=2, length=1).pack(), "mismatched"),
        (Descriptor(Kind.LEASE, 0, device=DEVICE, queue=1, epoch=1, length=1).pack(), "mismatched"),
        (Descriptor(Kind.LEASE, 0, device=6, queue=0, epoch=1, length=1).pack(), "mismatched"),
        (Descriptor(Kind.LEASE, 2, device=DEVICE, queue=0, epoch=1, length=1).pack(), "malformed"),
        (Descriptor(Kind.GRANT, 0, device=DEVICE, queue=0, epoch=1).pack(), "malformed"),
        (Descriptor(200, 0, device=DEVICE, queue=0, epoch=1).pack(), "malformed"),
        (
            Descriptor(Kind.LEASE, 0, device=DEVICE, queue=0, epoch=1, length=1).pack() + bytes(4),
            "malformed",
        ),
        (Descriptor(Kind.RETURN, 0, device=DEVICE, queue=0, epoch=1, length=9).pack(), "malformed"),
        (Descriptor(Kind.SYNC, 0, device=DEVICE, queue=0, epoch=1, sequence=9).pack(), "out_of_sync"),
    ],
)
def test_a_wrong_frame_is_counted_and_the_next_right_one_served(
    broker: BrokerProcess, worker: Connect, frame: bytes, counter: str
) -> None:
    first = worker(0, 1)
    first.say_hello()
    before = getattr(broker.statistics().broker, counter)
    first.socket.send(frame)
    first.lease(0, 1)
    first.take()
    assert len(first.held[0]) == RESERVE[0] + 1
    assert getattr(broker.statistics().broker, counter) == before + 1


def test_strangers_are_counted(broker: BrokerProcess, endpoint: str, worker: Connect) -> None:
    strangers = [b"nobody", worker_routing_id(DEVICE, 0, 9), worker_routing_id(9, 0, 1)]
    for routing_id in strangers:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket_:
            socket_.setsockopt(zmq.ROUTING_ID, routing_id)
            socket_.connect(endpoint)
            socket_.send(b"hello")
    first = worker(0, 1)
    first.say_hello()
    wait_until(lambda: broker.statistics().broker.unknown_worker == len(strangers))


def test_slots_that_are_not_the_workers_are_rejected_and_logged_once(
    broker: BrokerProcess, worker: Connect
) -> None:
    first = worker(0, 1)
    first.say_hello()
    first.give_back(0, [9, 9, 1 << 30])
    first.give_back(0, [9])
    first.lease(0, 1)
    first.take()
    leases = broker.statistics().leases
    assert leases is not None and leases.rejected == 4
    assert broker.call(Stop()) == Done()
    status, logged = broker.wait()
    assert status == 0
    assert logged.count("is not held by") == 1


def test_commands_that_cannot_be_are_refused_with_a_reason(
    broker: BrokerProcess, arena: Arena, tmp_path: Path
) -> None:
    def reason(command: Command, fd: int | None = None) -> str:
        reply = broker.call(command, fd)
        assert isinstance(reply, Failed)
        return reply.reason

    assert "is served already" in reason(AddDevice(DEVICE), arena.control_fd)
    assert "without its control segment" in reason(AddDevice(6))
    assert "of device 5, not 6" in reason(AddDevice(6), arena.control_fd)
    assert "not a control segment" in reason(AddDevice(6), arena.data_fd)
    with (tmp_path / "empty").open("wb") as empty:
        assert "no header" in reason(AddDevice(6), empty.fileno())
    assert "device 6 is not served" in reason(Register(6, 0, 1))
    assert "queue 2 is none" in reason(Register(DEVICE, 2, 1))
    assert "not served" in reason(GetStatistics(6))
    broker.control.send(b'{"type":"dance"}')
    assert isinstance(receive_reply(broker.control), Failed)
    broker.control.send(b'{"x":' + b"[" * 50_000)
    assert isinstance(receive_reply(broker.control), Failed)
    broker.control.send(b" " * 100_000)
    assert isinstance(receive_reply(broker.control), Failed)
    assert broker.statistics().devices == (DEVICE,)


def test_refused_descriptors_do_not_pile_up(broker: BrokerProcess, arena: Arena) -> None:
    broker.call(GetStatistics())
    before = broker.descriptor_count()
    for _ in range(20):
        broker.call(AddDevice(6), arena.control_fd)
        broker.call(GetStatistics(), arena.control_fd)
    assert broker.descriptor_count() == before


def test_a_removed_device_is_unmapped_and_may_come_again(broker: BrokerProcess, arena: Arena) -> None:
    maps = Path(f"/proc/{broker.process.pid}/maps")
    assert INSTANCE in maps.read_text()
    assert broker.call(RemoveDevice(DEVICE)) == Done()
    assert INSTANCE not in maps.read_text()
    introduce(broker, arena)


def test_the_broker_never_maps_the_data(broker: BrokerProcess) -> None:
    assert f"{INSTANCE}-{DEVICE}-data" not in Path(f"/proc/{broker.process.pid}/maps").read_text()


def test_statistics_count_what_passed(broker: BrokerProcess, worker: Connect) -> None:
    first = worker(0, 1)
    first.say_hello()
    reply = broker.statistics()
    assert reply.leases is not None
    assert [(each.free, each.leased) for each in reply.leases.classes] == [(6, 4), (2, 2)]
    assert reply.broker.messages >= 1 and reply.broker.frames >= 2
    everything = broker.call(GetStatistics())
    assert isinstance(everything, StatisticsReply) and everything.leases is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_leases_stay(
    broker: BrokerProcess, arena: Arena, endpoint: str, number: signal.Signals
) -> None:
    before = list(arena.control.slot_owners())
    broker.process.send_signal(number)
    assert broker.wait() == (0, "")
    assert list(arena.control.slot_owners()) == before
    assert not Path(endpoint.removeprefix("ipc://")).exists()
    with pytest.raises(PoolError, match="broker is gone"):
        receive_reply(broker.control)


def test_the_end_of_the_daemon_ends_it(broker: BrokerProcess) -> None:
    broker.control.close()
    assert broker.wait() == (0, "")


def test_it_can_outlive_the_daemon(start: Start, arena: Arena, worker: Connect) -> None:
    broker = start(exit_on_eof=False)
    introduce(broker, arena)
    broker.control.close()
    first = worker(0, 1)
    first.say_hello()
    assert broker.process.poll() is None


def test_a_daemon_that_does_not_read_its_replies_stops_nobody(broker: BrokerProcess, worker: Connect) -> None:
    broker.control.settimeout(0.2)
    for _ in range(3000):
        try:
            send_command(broker.control, GetStatistics(DEVICE))
        except TimeoutError:
            pytest.fail("the broker stopped reading commands")
    worker(0, 1).say_hello()


def test_an_endpoint_that_cannot_be_bound_is_one_clear_error(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    umask = os.umask(0o077)
    try:
        with ours, theirs, pytest.raises(PoolError, match="cannot listen on ipc://"):
            run_broker(f"ipc://{tmp_path}/missing/broker", theirs)
    finally:
        os.umask(umask)


def test_its_socket_is_private(broker: BrokerProcess, endpoint: str) -> None:
    assert Path(endpoint.removeprefix("ipc://")).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("identity", [(0, 0, 0), (1, 2, 3), ((1 << 32) - 1, (1 << 16) - 1, (1 << 32) - 1)])
def test_a_routing_id_survives_the_round_trip(identity: tuple[int, int, int]) -> None:
    device, owner = parse_routing_id(worker_routing_id(*identity))
    assert (device, *owner) == identity


@pytest.mark.parametrize("routing_id", [b"", b"w", b"x" + bytes(10), b"w" + bytes(9), b"w" + bytes(11)])
def test_a_routing_id_of_another_shape_is_an_error(routing_id: bytes) -> None:
    with pytest.raises(WireError, match="is no worker's"):
        parse_routing_id(routing_id)


def test_no_grant_goes_out_between_a_question_and_its_answer(arena: Arena) -> None:
    events: list[str] = []
    device = DeviceLeases(Control(arena.control_fd), events.append)
    asked, other = Owner(0, 1), Owner(1, 1)
    for owner in (asked, other):
        device.register(owner)
        for op in range(2):
            device.on_frame(owner, Descriptor(Kind.SYNC, op, 0, DEVICE, *identity(owner)), ())
    lease(device, other, 99)
    lease(device, asked, 2)
    device.take_outbox()
    device.unreachable(asked)
    ((_, question),) = device.questions(now_s=1e9)
    device.on_frame(
        other, Descriptor(Kind.RETURN, 0, 0, DEVICE, *identity(other)), slots_of(arena, other)[:4]
    )
    lease(device, asked, 2)
    assert [owner for owner, _ in device.take_outbox()] == []
    assert len(slots_of(arena, asked)) == sum(RESERVE)
    assert events == ["out_of_sync"]
    nonce = unpack_slots(question)[0].sequence
    for op in range(2):
        answer = Descriptor(Kind.SYNC, op, 0, DEVICE, *identity(asked), sequence=nonce)
        device.on_frame(asked, answer, ())
    assert {owner for owner, _ in device.take_outbox()} == {asked}
    device.close()


def test_a_rebuilt_lease_is_not_undone_by_a_first_word_that_came_late(arena: Arena) -> None:
    arena.control.grant(3, Owner(0, 1))
    device = DeviceLeases(Control(arena.control_fd), lambda _: None)
    device.on_frame(Owner(0, 1), Descriptor(Kind.SYNC, 0, 0, DEVICE, *identity(Owner(0, 1))), ())
    assert device.take_outbox() == []
    assert slots_of(arena, Owner(0, 1)) == [3]
    device.close()


def test_a_recall_waits_until_its_holder_is_in_sync(arena: Arena) -> None:
    holder, wanting = Owner(0, 1), Owner(1, 1)
    for slot in range(8):
        arena.control.grant(slot, holder)
    device = DeviceLeases(Control(arena.control_fd), lambda _: None)
    device.register(wanting)
    device.on_frame(wanting, Descriptor(Kind.SYNC, 0, 0, DEVICE, *identity(wanting)), ())
    lease(device, wanting, 3)
    assert [owner for owner, _ in device.take_outbox()] == [wanting]
    nonces = {owner: unpack_slots(frame)[0].sequence for owner, frame in device.questions(now_s=1e9)}
    answer = Descriptor(Kind.SYNC, 0, 0, DEVICE, *identity(holder), sequence=nonces[holder])
    device.on_frame(holder, answer, range(8))
    ((owner, (recall,)),) = device.take_outbox()
    assert (owner, unpack_slots(recall)[0].kind, unpack_slots(recall)[0].length) == (holder, Kind.RECALL, 3)
    device.close()


def identity(owner: Owner) -> tuple[int, int, int]:
    """A descriptor's queue, tag and epoch."""
    return owner.queue, 0, owner.epoch


def lease(device: DeviceLeases, owner: Owner, want: int) -> None:
    device.on_frame(owner, Descriptor(Kind.LEASE, 0, 0, DEVICE, *identity(owner), length=want), ())


def test_questions_are_repeated_less_and_less_often(arena: Arena) -> None:
    device = DeviceLeases(Control(arena.control_fd), lambda _: None)
    device.register(Owner(0, 1))
    now_s, gaps_s = 0.0, []
    for _ in range(8):
        assert len(device.questions(now_s)) == 1
        assert device.questions(now_s) == []
        next_s = device.next_question_at_s()
        assert next_s is not None
        gaps_s.append(round(next_s - now_s, 3))
        now_s = next_s
    assert gaps_s == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    device.close()


def test_counters_start_at_nothing() -> None:
    assert BrokerStatistics() == BrokerStatistics(messages=0, frames=0)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_in_shared_memory() -> Iterator[None]:
    yield
    left = list_orphans(INSTANCE)
    for prefix in left:
        unlink_arena(prefix)
    assert left == []
