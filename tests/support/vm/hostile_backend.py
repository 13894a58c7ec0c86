"""Hostile backends: processes that speak the wire protocol by hand, and correctly except for their victim requests.

All serve one disk in memory that they share with the test, so that each goes on with the data of the one before.  A
backend answers a victim request as its `Conduct` says.
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
from support.vm.daemon import DEADLINE_S
from support.vm.process import Forked
from ublkpool.bufpool import wire
from ublkpool.bufpool.huge_pages import SharedMap
from ublkpool.bufpool.sdk import client
from ublkpool.bufpool.sdk.client import DeviceConnection, OwnSegment
from ublkpool.bufpool.wire import Descriptor, Kind, Op

BLOCK_BYTES = 512
DEATH_STATUS = 7


class Victim(NamedTuple):
    """The request that is answered wrongly: the first of this kind at this offset of the disk."""

    offset: int
    op: Op = Op.WRITE


class Desk:
    """A backend's connection, its memory, and the disk."""

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
        """Execute a request correctly; returns the answer."""
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
        """The memory of a read's or write's data."""
        memory = self._own if request.kind == Kind.DATA else self.attachment.segments[wire.SEGMENT_POOL]
        return memory[request.buffer : request.buffer + request.length]


Conduct = Callable[[Desk, Descriptor], None]


def honest(desk: Desk, request: Descriptor) -> None:
    """Answer correctly."""
    answer = desk.truth(request)
    if answer is not None:
        desk.send(request, answer.pack())


def telling(lie: Lie) -> Conduct:
    """Answer the victim with a wrong answer only."""
    return lambda desk, request: desk.send(request, lie(desk.scene(request)))


def telling_then_honest(lie: Lie) -> Conduct:
    """Answer the victim with a wrong answer and then with the correct one."""

    def tell(desk: Desk, request: Descriptor) -> None:
        desk.send(request, lie(desk.scene(request)))
        honest(desk, request)

    return tell


def answering_twice(desk: Desk, request: Descriptor) -> None:
    """Send the correct answer twice in one frame."""
    answer = desk.truth(request)
    assert answer is not None
    desk.send(request, answer.pack() * 2)


def silent(desk: Desk, request: Descriptor) -> None:
    """Never answer the victim."""


def dying(desk: Desk, request: Descriptor) -> None:
    """Exit before the answer."""
    os._exit(DEATH_STATUS)


def dying_with_the_data(desk: Desk, request: Descriptor) -> None:
    """Name a region for a write, and exit when the data is there."""
    if request.kind == Kind.DATA:
        os._exit(DEATH_STATUS)
    honest(desk, request)


def placing_at_zero(desk: Desk, request: Descriptor) -> None:
    """Name the first bytes of the segment, even if another request has them, and then send nothing."""
    if request.kind == Kind.PLACE:
        desk.send(request, desk.scene(request).placed(0).pack())


def posting(name: str) -> Conduct:
    """Send an invalid post of `posts_that_lie` instead of an answer; "" is a valid post."""

    def tell(desk: Desk, request: Descriptor) -> None:
        scene = desk.scene(request)
        true = Descriptor(Kind.POST, device=request.device, queue=request.queue, epoch=request.epoch, length=4096,
                          segment=scene.segment)  # fmt: skip
        lies = posts_that_lie(true, scene.segment_bytes, BLOCK_BYTES)
        desk.send(request, lies.get(name, true).pack())

    return tell


def hanging_up(desk: Desk, request: Descriptor) -> None:
    """Send a frame that is too large, so that the worker's transport disconnects; then send nothing, not even HELLO."""
    desk.send(request, bytes(wire.DESCRIPTOR_BYTES * (wire.DESCRIPTORS_PER_FRAME_MAX + 1)))
    signal.pause()


def closing_the_door(desk: Desk, request: Descriptor) -> None:
    """Close the attach connection, and live on with the device's memory mapped."""
    desk.attachment._connection.close()
    signal.pause()


def leaving_a_child(desk: Desk, request: Descriptor) -> None:
    """Exit, and leave connections and memory to a child that writes there until `end_children`."""
    if not os.fork():
        pool = desk.attachment.segments[wire.SEGMENT_POOL]
        nonsense = bytes([0xEE]) * len(pool)
        while not desk.disk[-1]:
            pool[:] = nonsense
        os._exit(0)
    os._exit(DEATH_STATUS)


def end_children(disk: mmap.mmap) -> None:
    """End the children of `leaving_a_child`, which poll the disk's last byte."""
    disk[-1] = 1


def resizing_the_pool(desk: Desk, request: Descriptor) -> None:
    """Try to shrink the pool's memory, then to grow it; then answer correctly."""
    assert desk.pool_descriptor is not None
    size_bytes = os.fstat(desk.pool_descriptor).st_size
    for wanted_bytes in (0, size_bytes // 2, 2 * size_bytes):
        with suppress(PermissionError):
            os.ftruncate(desk.pool_descriptor, wanted_bytes)
            os._exit(DEATH_STATUS)
    honest(desk, request)


def punching_the_pool(desk: Desk, request: Descriptor) -> None:
    """Punch every page out of the pool's memory, before the answer and after."""
    assert desk.pool_descriptor is not None
    size_bytes = os.fstat(desk.pool_descriptor).st_size
    punch_hole(desk.pool_descriptor, size_bytes)
    honest(desk, request)
    punch_hole(desk.pool_descriptor, size_bytes)


def punch_hole(fd: int, size_bytes: int) -> None:
    """Punch a hole into the first `size_bytes` of a file.  Raises `OSError`."""
    keep_size, punch = 1, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, keep_size | punch, ctypes.c_long(0), ctypes.c_long(size_bytes)):
        raise OSError(ctypes.get_errno(), "fallocate")


def flooding(desk: Desk, request: Descriptor) -> None:
    """Send answers of an epoch that never existed, without end."""
    stale = request.answer(Kind.DONE)._replace(epoch=0).pack() * wire.DESCRIPTORS_PER_FRAME_MAX
    while True:
        desk.send(request, stale)


def answering_half(desk: Desk, request: Descriptor) -> None:
    """Execute half of the request, and report that in the result; this breaks no rule."""
    # A placement request is answered in full.
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
    """Attach a backend that treats its victims as `conduct` says and other requests correctly."""
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

    Without a segment it uses frames, because some breaches are possible only with frames.
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
    """Unlike the SDK, a hostile backend keeps the received descriptors open."""
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
    """Send one packet to the attach socket; returns the daemon's answer and closes the connection."""
    packet = message if isinstance(message, bytes) else wire.encode_message(message)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(str(run_dir / "attach.sock"))
        # The daemon may refuse a connection before it reads from it.
        with suppress(BrokenPipeError):
            socket.send_fds(connection, [packet], list(files))
        return wire.decode_daemon_message(connection.recv(wire.ATTACH_MESSAGE_BYTES_MAX))
