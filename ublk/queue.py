"""The typed Python interface of the C core: one hardware queue, the rings that a backend shares, its io_uring.

Owns the C objects' lifetime.  `Queue` is the state machine alone and needs no kernel (tests drive it with a fake
driver); `IoUring` puts it on /dev/ublkcN and is made in the process that runs it, after fork.
"""

import enum
import errno
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from ublkpool.ublk.calls import check, ffi, lib
from ublkpool.ublk.mappings import map_segment, sealed_memory, unmap_segment

NULL: Any = ffi.NULL
WATCH_SHIFT: int = lib.UQ_WATCH_SHIFT
CLASS_COUNT_MAX: int = lib.UQ_CLASSES_MAX
FOREVER_MS: int = lib.UQ_FOREVER_MS
"""For `IoUring.run`: no time limit."""
HELLO_TIMEOUT_MS = 30_000
"""How long a backend may be attached to a queue without a HELLO."""


class Attention(enum.IntFlag):
    """Why `IoUring.run` came back; watched descriptors are bits from `WATCH_SHIFT` on."""

    OUTPUT = 1
    STOCK = 2
    CUT = 4
    GONE = 8
    FAULT = 16
    SILENT = 32
    LINK = 64
    ABSENT = 128
    QUIET = 256
    FLUSHED = 512


class LinkState(enum.IntEnum):
    """The link to the backend."""

    NONE = 0
    EXPECTED = 1
    UP = 2
    CUT = 3
    FENCING = 4


VIOLATIONS = (
    "nothing",
    "a frame that is not 1 to 4096 whole descriptors",
    "a descriptor of a kind that backends do not send",
    "a device, queue, tag, epoch or sequence that is not this queue's",
    "unsolicited answer",
    "a result that is no errno, or larger than the request",
    "a region of a segment that is not its own",
    "a region outside its segment",
    "a region that is not aligned to the logical block",
    "a region that is lent to another tag",
    "a read answered without a buffer, or with a region where none is allowed",
    "no answer within io_timeout_s",
    "too many answers to requests that are over",
    "no HELLO in time",
    "an index in its ring that makes no sense",
    "backend never drains its doorbell eventfd",
    "a region posted that no write can use: of no size that buffers have, too many, or placement is pool",
    "the engine in the worker broke the protocol or ended",
)
FAULTS = (
    "none",
    "illegal transition",
    "queue overflow",
    "unexpected completion",
    "unusable grant",
    "broken invariant",
)


class BufferClass(NamedTuple):
    """A size class of the pool, for one queue: reserve, batch and most are buffers.

    `most` is what the broker can ever give to one queue; a wish beyond it would never be fulfilled.
    """

    base_offset: int
    buffer_bytes: int
    slot_count: int
    first_slot: int
    reserve: int
    batch: int
    most: int


class QueueConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a queue is; sizes in bytes."""

    device_number: int
    queue: int
    depth: int
    queues: int = 1
    """Of the device; they share its limits."""
    epoch: int
    max_io_bytes: int
    block_bytes: int
    need_get_data: bool
    zero_copy: bool = False
    """The driver registers each request's pages in the queue's io_uring; without `need_get_data`."""
    place_in_backend: bool
    timeout_ms: int
    fail_on_timeout: bool
    hello_timeout_ms: int = HELLO_TIMEOUT_MS
    absent_ms: int = 0
    """How long requests wait without a backend, in milliseconds; 0: without limit."""
    held: bool = False
    """Whether requests wait from the start, until `Queue.hold` ends that."""
    answers_itself: bool = False
    """The queue never has a backend: it drops writes and reads `Memory.zeros`."""
    slice_bytes: int = 0
    """Of the client area, whose slices are registered with the driver by their numbers."""
    slices: int = 0
    """A bit for each registered slice."""
    classes: tuple[BufferClass, ...]


class PoolLost(OSError):
    """The pool's old memory may be unmapped, and the new is not there."""


class Command(NamedTuple):
    """What the queue tells the driver about a tag: op 0 fetch, 1 get data, 2 commit."""

    tag: int
    op: int
    result: int
    address: int


class Memory(NamedTuple):
    """Addresses in this process: descriptor array, pool, slot headers, scratch, statistics block, zeros."""

    descriptors: Any
    pool: Any
    slots: Any
    scratch: Any
    statistics: Any
    zeros: Any = None
    """Read by a queue that answers itself; otherwise None."""
    limits: Any = None
    """The device's limits; None: it never has any."""


class Queue:
    """One hardware queue's tags and stock; see csrc/queue_core.h.  One task uses it."""

    def __init__(self, config: QueueConfig, memory: Memory) -> None:
        """Raises `ValueError` if the core does not accept the config or memory is short (`uq_new`)."""
        self.config = config
        self._memory = memory
        raw = ffi.new("struct uq_config *", _fields(config))
        raw.descriptors = ffi.cast("struct uq_iod *", memory.descriptors)
        raw.pool = ffi.cast("uint8_t *", memory.pool)
        raw.slots = ffi.cast("struct uq_slot *", memory.slots)
        raw.scratch = ffi.cast("uint8_t *", memory.scratch)
        block = ffi.cast("struct uq_block *", memory.statistics)
        raw.stats = ffi.addressof(block, "stats")
        raw.latencies = ffi.addressof(block, "latencies")
        if memory.zeros is not None:
            raw.zeros = ffi.cast("uint8_t *", memory.zeros)
        if memory.limits is not None:
            raw.limits = ffi.cast("struct uq_limits *", memory.limits)
        self.raw = ffi.gc(lib.uq_new(raw), lib.uq_free)
        if self.raw == ffi.NULL:
            raise ValueError(f"queue {config.queue}: the core does not accept {config}")
        lib.uq_hold(self.raw, config.held)
        self._slots = ffi.new("uint32_t[]", max(each.slot_count for each in config.classes))
        self._first = ffi.new("struct wire_descriptor **")
        self._culprit = ffi.new("struct wire_descriptor *")

    def start(self) -> None:
        """Fetch every tag.  Raises `RuntimeError` if each needs a buffer and the stock has too few."""
        if lib.uq_start(self.raw):
            raise RuntimeError(f"queue {self.config.queue}: a buffer for each tag is not in the stock yet")

    def complete(self, tag: int, result: int) -> None:
        """What the ring does with a completion; a fake driver calls it."""
        lib.uq_complete(self.raw, tag, result)

    def take_commands(self) -> list[Command]:
        """What the ring does at a submit: the commands, from then on consumed.  For fake drivers."""
        buffer = ffi.new("struct uq_command[]", self.config.depth)
        count = lib.uq_commands(self.raw, buffer, self.config.depth)
        commands = [Command(c.tag, c.op, c.result, c.address) for c in buffer[0:count]]
        lib.uq_commands_taken(self.raw, count)
        return commands

    def output(self) -> bytes:
        """The descriptors that wait for the backend, as one block; see `sent`."""
        count = lib.uq_output(self.raw, self._first)
        return bytes(ffi.buffer(self._first[0], 64 * count))

    def sent(self, count: int) -> None:
        """The transport has taken the first `count` descriptors of `output`."""
        lib.uq_output_sent(self.raw, count)

    def hold_output(self, hold: bool) -> None:
        """Whether the transport is full: then waiting descriptors raise no `Attention.OUTPUT`."""
        lib.uq_output_hold(self.raw, hold)

    def input(self, frame: bytes | memoryview) -> None:
        """The backend sent this frame; a frame that breaks the protocol cuts the link."""
        lib.uq_input(self.raw, ffi.from_buffer(frame), len(frame))

    def expect(self, segment: int, base: Any, size_bytes: int, reads_own: bool, fence: bool = False) -> bool:
        """Whether the next backend can come; no while too many dead backends' segments still hold data.

        `fence`: it served an earlier epoch, and gets nothing before it has let go of that.  Raises `OSError` if
        memory is short.
        """
        result = int(lib.uq_link_expect(self.raw, segment, base, size_bytes, reads_own, fence))
        if result == -errno.EBUSY:
            return False
        check(result, f"a segment of {size_bytes} bytes")
        return True

    def cut(self, violation: int = 0) -> None:
        """Stop talking to the backend; what it holds stays with it until `lost`."""
        lib.uq_link_cut(self.raw, violation)

    def hung_up(self) -> None:
        """The connection of a backend that served has ended: nothing more is said or heard until `lost`."""
        lib.uq_link_hung_up(self.raw)

    def change_pool(self, fd: int, size_bytes: int) -> None:
        """Replace the pool's memory, at the same address; the contents of requests' buffers are copied.

        Called without a backend and without a command under way.  Raises `OSError`: `PoolLost` if the queue has no
        pool any more and must end.
        """
        fresh = map_segment(fd, size_bytes)
        lib.uq_pool_copy(self.raw, ffi.cast("uint8_t *", fresh))
        result = int(lib.uq_map_over(self._memory.pool, fresh, size_bytes))
        if result:
            raise PoolLost(-result, os.strerror(-result))

    def count_strangers(self, count: int) -> None:
        """Count frames or connections that did not come from the backend."""
        lib.uq_stats_of(self.raw).strangers += count

    def lost(self) -> None:
        """The backend is dead or has let go: what it did not answer waits for the next."""
        lib.uq_link_lost(self.raw)

    @property
    def link(self) -> LinkState:
        return LinkState(lib.uq_link_state(self.raw))

    def unmap_idle_segments(self) -> int:
        """Unmap segments of dead backends that hold nothing any more; how many."""
        base, size = ffi.new("uint8_t **"), ffi.new("uint64_t *")
        count = 0
        while lib.uq_segment_idle(self.raw, base, size):
            lib.uq_unmap_segment(base[0], size[0])
            count += 1
        return count

    @property
    def has_left_segment(self) -> bool:
        """Whether a dead backend's segment is mapped still."""
        return bool(lib.uq_segment_is_left(self.raw))

    def stock_wants(self) -> Iterator[tuple[int, int]]:
        """(class, count) of every class that wants buffers (positive) or has some to return (negative)."""
        for index in range(len(self.config.classes)):
            want = lib.uq_stock_want(self.raw, index)
            if want:
                yield index, want

    def stock_asked(self, size_class: int, count: int) -> None:
        """Add `count` buffers to those on order at the broker."""
        lib.uq_stock_asked(self.raw, size_class, count)

    def stock_on_order(self, size_class: int, count: int) -> None:
        """Set the number of buffers on order at the broker."""
        lib.uq_stock_on_order(self.raw, size_class, count)

    def stock_add(self, size_class: int, slots: Sequence[int]) -> None:
        """Buffers come into the stock; waiting requests take them."""
        lib.uq_stock_add(self.raw, size_class, list(slots), len(slots))

    def stock_own(self) -> None:
        """Without a broker: every buffer of the classes is this queue's from now on, and stays."""
        lib.uq_stock_own(self.raw)

    def stock_take(self, size_class: int, count: int) -> list[int]:
        """Take up to `count` free buffers out of the stock."""
        taken = lib.uq_stock_take(self.raw, size_class, self._slots, count)
        return list(self._slots[0:taken])

    def stock_recall(self, size_class: int, count: int) -> None:
        """Others wait for `count` buffers that this queue holds above its reserve."""
        lib.uq_stock_recall(self.raw, size_class, count)

    def stock_held(self, size_class: int) -> list[int]:
        """Every slot of the class that is in the stock or lent to a tag."""
        count = lib.uq_stock_held(self.raw, size_class, self._slots, len(self._slots))
        return list(self._slots[0:count])

    def tick(self, now_ms: int) -> None:
        """The clock; the ring calls it itself."""
        lib.uq_tick(self.raw, now_ms)

    def wait_ms(self, most_ms: int) -> int:
        """How long the queue may sleep before `tick`."""
        return int(lib.uq_wait_ms(self.raw, most_ms))

    @property
    def limit_is_used(self) -> bool:
        """Whether the device has limits, or had when this queue read them last."""
        return bool(lib.uq_limit_is_used(self.raw))

    def limit_tick(self, now_ns: int) -> None:
        """The clock of the device's limits; the ring calls it itself."""
        lib.uq_limit_tick(self.raw, now_ns)

    def limit_wait_ms(self, most_ms: int) -> int:
        """How long the queue may sleep before `limit_tick`."""
        return int(lib.uq_limit_wait_ms(self.raw, most_ms))

    def set_real_time(self, now_ns: int) -> None:
        """The clock of the histograms; the ring sets it itself."""
        lib.uq_set_real_time(self.raw, now_ns)

    def give_up(self) -> None:
        """Fail requests that would wait for a backend with EIO, until the next backend is expected."""
        lib.uq_give_up(self.raw)

    def hold(self, on: bool) -> None:
        """Whether requests wait although there is a backend; `Attention.QUIET` once it has none.  See queue_core.h."""
        lib.uq_hold(self.raw, on)

    def flush(self) -> bool:
        """Send the backend of a quiet queue a FLUSH, which `Attention.FLUSHED` ends; False if none is linked."""
        return not lib.uq_flush(self.raw)

    def flush_result(self) -> int:
        """The result of the last FLUSH of `flush`: 0, or a negative errno."""
        return int(lib.uq_flush_result(self.raw))

    def set_deadlines(self, timeout_ms: int, fail_on_timeout: bool, absent_ms: int) -> None:
        """Replace these fields of the config, also for the requests that have arrived."""
        lib.uq_set_deadlines(self.raw, timeout_ms, fail_on_timeout, absent_ms)

    def attention(self) -> Attention:
        return Attention(lib.uq_attention(self.raw))

    def attention_bits(self) -> int:
        """`attention` as a plain number, for callers in a hot loop."""
        return int(lib.uq_attention(self.raw))

    def clear(self, bits: Attention) -> None:
        """Clear these bits, once they are dealt with."""
        lib.uq_attention_clear(self.raw, bits)

    @property
    def has_violation(self) -> bool:
        """Whether the link was cut because the backend broke the protocol."""
        return bool(lib.uq_violation(self.raw, self._culprit))

    def violation(self) -> str:
        """The backend's violation in words, with the descriptor that committed it."""
        code = lib.uq_violation(self.raw, self._culprit)
        c = self._culprit
        named = f" (kind {c.kind}, tag {c.tag}, result {c.result}, segment {c.segment}, buffer {c.buffer})"
        return VIOLATIONS[code] + (named if c.kind else "")

    def fault(self) -> str:
        """The core's own error in words."""
        tag, detail = ffi.new("unsigned *"), ffi.new("int *")
        code = lib.uq_fault(self.raw, tag, detail)
        return f"{FAULTS[code]} at tag {tag[0]} ({detail[0]})"

    def tag_state(self, tag: int) -> int:
        """The tag's `workers.tag_state.State`."""
        return int(lib.uq_tag_state(self.raw, tag))

    @property
    def in_flight(self) -> int:
        return int(lib.uq_in_flight(self.raw))


def _fields(config: QueueConfig) -> dict[str, Any]:
    return {
        "device": config.device_number,
        "queue": config.queue,
        "depth": config.depth,
        "queues": config.queues,
        "epoch": config.epoch,
        "max_io_bytes": config.max_io_bytes,
        "block_bytes": config.block_bytes,
        "need_get_data": config.need_get_data,
        "zero_copy": config.zero_copy,
        "place_in_backend": config.place_in_backend,
        "timeout_ms": config.timeout_ms,
        "hello_timeout_ms": config.hello_timeout_ms,
        "fail_on_timeout": config.fail_on_timeout,
        "absent_ms": config.absent_ms,
        "slice_bytes": config.slice_bytes,
        "slices": config.slices,
        "classes": len(config.classes),
        "class": [tuple(each) for each in config.classes],
    }


class Port:
    """The worker's end of the rings that it shares with a backend, in memory of its own; see csrc/queue_port.h."""

    def __init__(self, depth: int) -> None:
        """For a queue of `depth`.  Raises `OSError`, `MemoryError`."""
        self.entries = int(lib.uq_port_entries(depth))
        self._size_bytes = int(lib.uq_port_bytes(self.entries))
        self.memory_fd = sealed_memory(self._size_bytes, "ublkpool-ring")
        try:
            self._memory = map_segment(self.memory_fd, self._size_bytes)
        except OSError:
            os.close(self.memory_fd)
            raise
        raw = lib.uq_port_new(self._memory, self.entries)
        if raw == ffi.NULL:
            unmap_segment(self._memory, self._size_bytes)
            os.close(self.memory_fd)
            raise MemoryError(f"no memory for a queue's rings of {self.entries} entries")
        self.raw = ffi.gc(raw, lib.uq_port_free)

    def turn(self, queue: Queue) -> bool:
        """Feed the backend's descriptors to the queue and send its output; whether to ring the backend's doorbell."""
        return bool(lib.uq_port_turn(self.raw, queue.raw))

    def doze(self, queue: Queue) -> bool:
        """Whether this side may sleep: the backend rings from now on, until `wake`.  False if something has come."""
        return bool(lib.uq_port_doze(self.raw, queue.raw))

    def wake(self) -> None:
        """This side is awake: the backend need not ring."""
        lib.uq_port_wake(self.raw)

    def close(self) -> None:
        """Free the memory; no ring may use the port any more."""
        ffi.release(self.raw)
        unmap_segment(self._memory, self._size_bytes)
        os.close(self.memory_fd)


class IoUring:
    """A queue on a real driver.  Made, used and closed in one process, after fork."""

    def __init__(self, queue: Queue, char_fd: int, spin_us: int = 0, engine_requests: int = 0) -> None:
        """`spin_us`: how long it looks for news before it sleeps; `engine_requests`: see `use_engine`.

        Raises `OSError`.
        """
        out = ffi.new("struct uq_ring **")
        depth = queue.config.depth
        check(lib.uq_ring_new(queue.raw, char_fd, depth, spin_us, engine_requests, out), "io_uring")
        self._queue = queue
        self._raw = ffi.gc(out[0], lib.uq_ring_free)

    def watch(self, index: int, fd: int) -> None:
        """Have `run` come back with bit `WATCH_SHIFT + index` when `fd` is readable; -1 stops that."""
        check(lib.uq_ring_watch(self._raw, index, fd), "watch")

    def use_port(self, port: Port | None, bell_in: int = -1, bell_out: int = -1) -> None:
        """Exchange descriptors with the backend there, without Python; the bells are eventfds (see queue_ring.h)."""
        lib.uq_ring_use_port(self._raw, ffi.NULL if port is None else port.raw, bell_in, bell_out)

    def use_engine(self, calls: int, engine: int) -> None:
        """Have this native engine answer, in the place of a backend; addresses of its functions and of itself.

        It has at most `engine_requests` requests, and lives until this is closed.  Raises `OSError`.
        """
        functions = ffi.cast("struct engine_calls *", calls)
        result = lib.uq_ring_use_engine(self._raw, functions, ffi.cast("struct engine *", engine))
        check(result, "the engine's io_uring")

    def run(self, timeout_ms: int) -> int:
        """Serve until something needs attention; its bits, or 0 after the timeout.  Raises `OSError`."""
        return check(lib.uq_ring_run(self._raw, timeout_ms), "io_uring_enter")

    def close(self) -> None:
        ffi.release(self._raw)
