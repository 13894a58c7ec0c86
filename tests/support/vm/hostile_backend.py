"""Backends that mean harm: processes of their own that speak the wire by hand, truthfully until their victim comes.

Each serves a disk in memory that the test shares with them all, so that a successor goes on where the last one was cut
off.  The request for its victim's offset it answers as its `Conduct` says.
"""

import ctypes
import mmap
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from support.fakes.liar import Lie, Scene, posts_that_lie
from support.vm.process import Forked
from ublkpool.bufpool import wire
from ublkpool.bufpool.huge_pages import SharedMap
from ublkpool.bufpool.sdk import client
from ublkpool.bufpool.sdk.client import DeviceConnection, OwnSegment
from ublkpool.bufpool.wire import Descriptor, Kind, Op

BLOCK_BYTES = 512
DEATH_STATUS = 7
_ATTACH_DEADLINE_S = 60


class Victim(NamedTuple):
    """The request that is answered with a lie: the first of this kind for this byte of the disk."""

    offset: int
    op: Op = Op.WRITE


class Desk:
    """What a backend has before it: its connection, its memory, the disk."""

    def __init__(self, attachment: DeviceConnection, disk: mmap.mmap) -> None:
        self.attachment = attachment
        self.disk = disk
        self.rng = random.Random(1)
        self.pool_descriptor: int | None = None
        own = attachment.own_segment
        self._own = own.view if own else memoryview(b"")

    def send(self, request: Descriptor, frame: bytes) -> None:
        self.attachment.links.send_frame(request.queue, frame)

    def scene(self, request: Descriptor) -> Scene:
        attached = self.attachment.attached
        segment_bytes = len(self._own)
        return Scene(request, attached.own_segment, segment_bytes, BLOCK_BYTES, attached.depth, self.rng)

    def truth(self, request: Descriptor) -> Descriptor | None:
        """Do what is asked, and the answer to it."""
        match request.kind:
            case Kind.PLACE:
                region = request.tag * self.attachment.attached.max_io_bytes
                return self.scene(request).placed(region)
            case Kind.REQUEST | Kind.DATA:
                return request.answer(Kind.DONE, self._serve(request))
            case Kind.FENCE:
                return request.answer(Kind.FENCED)
        return None

    def _serve(self, request: Descriptor) -> int:
        if request.op not in (Op.READ, Op.WRITE):
            return 0
        on_disk = slice(request.offset, request.offset + request.length)
        if request.op == Op.READ:
            self.buffer(request)[:] = self.disk[on_disk]
        else:
            self.disk[on_disk] = bytes(self.buffer(request))
        return request.length

    def buffer(self, request: Descriptor) -> memoryview:
        """Where the data of a read or write lies, or is to lie."""
        memory = self._own if request.kind == Kind.DATA else self.attachment.segments[wire.SEGMENT_POOL]
        return memory[request.buffer : request.buffer + request.length]


Conduct = Callable[[Desk, Descriptor], None]


def honest(desk: Desk, request: Descriptor) -> None:
    """As it should be."""
    answer = desk.truth(request)
    if answer is not None:
        desk.send(request, answer.pack())


def telling(lie: Lie) -> Conduct:
    """Answers its victim with a lie, and nothing else."""
    return lambda desk, request: desk.send(request, lie(desk.scene(request)))


def telling_then_honest(lie: Lie) -> Conduct:
    """Answers its victim with a lie and then with the truth."""

    def tell(desk: Desk, request: Descriptor) -> None:
        desk.send(request, lie(desk.scene(request)))
        honest(desk, request)

    return tell


def answering_twice(desk: Desk, request: Descriptor) -> None:
    """The truth, two times in one frame."""
    answer = desk.truth(request)
    assert answer is not None
    desk.send(request, answer.pack() * 2)


def silent(desk: Desk, request: Descriptor) -> None:
    """Never answers."""


def dying(desk: Desk, request: Descriptor) -> None:
    """Gone before it has answered."""
    os._exit(DEATH_STATUS)


def dying_with_the_data(desk: Desk, request: Descriptor) -> None:
    """Names a place for a write, and is gone when its data lies there."""
    if request.kind == Kind.DATA:
        os._exit(DEATH_STATUS)
    honest(desk, request)


def placing_at_zero(desk: Desk, request: Descriptor) -> None:
    """Names the first bytes of its segment, whoever has them, and then keeps silent."""
    if request.kind == Kind.PLACE:
        desk.send(request, desk.scene(request).placed(0).pack())


def posting(name: str) -> Conduct:
    """Posts what must not be, as `posts_that_lie` has it, instead of an answer; "" is a post that has nothing wrong."""

    def tell(desk: Desk, request: Descriptor) -> None:
        scene = desk.scene(request)
        true = Descriptor(Kind.POST, device=request.device, queue=request.queue, epoch=request.epoch, length=4096,
                          segment=scene.segment)  # fmt: skip
        lies = posts_that_lie(true, scene.segment_bytes, BLOCK_BYTES)
        desk.send(request, lies.get(name, true).pack())

    return tell


def hanging_up(desk: Desk, request: Descriptor) -> None:
    """A frame that is too large for the worker's transport, which ends the connection; then nothing, and no HELLO."""
    desk.send(request, bytes(wire.DESCRIPTOR_BYTES * (wire.DESCRIPTORS_PER_FRAME_MAX + 1)))
    signal.pause()


def closing_the_door(desk: Desk, request: Descriptor) -> None:
    """Closes the connection that it attached with, and lives on with its device's memory."""
    desk.attachment._connection.close()
    signal.pause()


def leaving_a_child(desk: Desk, request: Descriptor) -> None:
    """Ends, and leaves its connections and its device's memory to a child that writes there until `end_children`."""
    if not os.fork():
        pool = desk.attachment.segments[wire.SEGMENT_POOL]
        nonsense = bytes([0xEE]) * len(pool)
        while not desk.disk[-1]:
            pool[:] = nonsense
        os._exit(0)
    os._exit(DEATH_STATUS)


def end_children(disk: mmap.mmap) -> None:
    """End what `leaving_a_child` left; the disk's last byte is theirs to look at."""
    disk[-1] = 1


def resizing_the_pool(desk: Desk, request: Descriptor) -> None:
    """Tries to take the memory away that its device's requests lie in, then to add some; then it is honest."""
    assert desk.pool_descriptor is not None
    size_bytes = os.fstat(desk.pool_descriptor).st_size
    for wanted_bytes in (0, size_bytes // 2, 2 * size_bytes):
        with suppress(PermissionError):
            os.ftruncate(desk.pool_descriptor, wanted_bytes)
            os._exit(DEATH_STATUS)
    honest(desk, request)


def punching_the_pool(desk: Desk, request: Descriptor) -> None:
    """Takes every page out of the memory that its device's requests lie in, before it answers and after."""
    assert desk.pool_descriptor is not None
    size_bytes = os.fstat(desk.pool_descriptor).st_size
    punch_hole(desk.pool_descriptor, size_bytes)
    honest(desk, request)
    punch_hole(desk.pool_descriptor, size_bytes)


def punch_hole(fd: int, size_bytes: int) -> None:
    """Take the first `size_bytes` out of a file.  Raises `OSError`."""
    keep_size, punch = 1, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, keep_size | punch, ctypes.c_long(0), ctypes.c_long(size_bytes)):
        raise OSError(ctypes.get_errno(), "fallocate")


def flooding(desk: Desk, request: Descriptor) -> None:
    """Answers to a life that never was, without end."""
    stale = request.answer(Kind.DONE)._replace(epoch=0).pack() * wire.DESCRIPTORS_PER_FRAME_MAX
    while True:
        desk.send(request, stale)


def answering_half(desk: Desk, request: Descriptor) -> None:
    """Does half of what it is asked for, and says so: not a lie."""
    # A place is asked for, and named, as a whole.
    share = 1 if request.kind == Kind.PLACE else 2
    answer = desk.truth(request._replace(length=request.length // share))
    assert answer is not None
    desk.send(request, answer.pack())


def start_hostile(
    run_dir: Path,
    device: str,
    disk: mmap.mmap,
    victims: Sequence[Victim] = (),
    conduct: Conduct = honest,
    segment_bytes: int = 0,
) -> Forked:
    """Attach a backend that treats its victims as `conduct` says and everybody else well."""
    return Forked(lambda: _serve(run_dir, device, disk, victims, conduct, segment_bytes))


def _serve(
    run_dir: Path,
    device: str,
    disk: mmap.mmap,
    victims: Sequence[Victim],
    conduct: Conduct,
    segment_bytes: int,
) -> int:
    desk = open_desk(run_dir, device, disk, segment_bytes)
    while True:
        ready = desk.attachment.poll()
        for queue in ready.queues:
            for request in desk.attachment.receive(queue):
                is_victim = (request.offset, request.op) in victims and request.kind < Kind.RELEASE
                (conduct if is_victim else honest)(desk, request)
        if ready.control and isinstance(desk.attachment.message(), wire.Detach | None):
            return 0


def open_desk(run_dir: Path, device: str, disk: mmap.mmap, segment_bytes: int) -> Desk:
    """Attach, with a segment or for pool placement.

    Without a segment over frames: some of what is done then can be done with frames only.
    """
    own = OwnSegment.create(segment_bytes) if segment_bytes else None
    attach = wire.Attach(
        v=wire.PROTOCOL_VERSION, device=device, kind="hostile", placement="backend" if own else "pool"
    )
    kept: list[int] = []
    with _keeping_descriptors(kept):
        transport: client.Transport = "auto" if own else "zeromq"
        desk = Desk(DeviceConnection.open(run_dir, device, attach, own, transport=transport), disk)
    desk.pool_descriptor = kept[0]
    return desk


@contextmanager
def _keeping_descriptors(kept: list[int]) -> Iterator[None]:
    """The SDK closes what it has mapped; somebody who means harm does not."""
    honest_map = client.map_segment

    def keeping(descriptor: int, size_bytes: int) -> SharedMap:
        kept.append(os.dup(descriptor))
        return honest_map(descriptor, size_bytes)

    client.map_segment = keeping
    try:
        yield
    finally:
        client.map_segment = honest_map


def attach_by_hand(
    run_dir: Path, message: wire.BackendMessage | bytes, files: Sequence[int] = ()
) -> wire.DaemonMessage:
    """Send one packet to the attach socket; the daemon's answer, after which the connection is closed."""
    packet = message if isinstance(message, bytes) else wire.encode_message(message)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(_ATTACH_DEADLINE_S)
        connection.connect(str(run_dir / "attach.sock"))
        # Refused at the door, it is told so before it has spoken.
        with suppress(BrokenPipeError):
            socket.send_fds(connection, [packet], list(files))
        return wire.decode_daemon_message(connection.recv(wire.ATTACH_MESSAGE_BYTES_MAX))
