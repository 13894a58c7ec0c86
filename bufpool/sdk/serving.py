"""The process of a backend: attach, run the loop, end cleanly.

Owns the loop, the signals and the order of starting and ending.  Runs on the thread that calls `serve`, in the
backend's process.  SIGTERM, SIGINT and the daemon's Detach end it: it takes no more requests, finishes and answers
those that are executing, and closes the backend.  If the attach connection ends without Detach, the daemon has died:
the backend serves as long as a worker is connected, then ends with status 1.
"""

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from ublkpool import RUN_DIR_DEFAULT
from ublkpool.bufpool import wire
from ublkpool.bufpool.engine.ring_driver import nothing_to_serve
from ublkpool.bufpool.errors import BackendError, StoreTaken
from ublkpool.bufpool.sdk import growth, process
from ublkpool.bufpool.sdk.backend import (
    Backend,
    Device,
    FrameEngine,
    Hint,
    Outbox,
    Properties,
    asks_for_places,
    check_properties,
    log,
    op_name,
)
from ublkpool.bufpool.sdk.blame import authors_code
from ublkpool.bufpool.sdk.calls import CallEngine
from ublkpool.bufpool.sdk.client import DeviceConnection, OwnSegment, PollResult, Transport, describe
from ublkpool.bufpool.sdk.ending import EndWatch, signals
from ublkpool.bufpool.sdk.event_loop import EventLoop
from ublkpool.bufpool.sdk.failures import failures
from ublkpool.bufpool.sdk.runner import Runner, check_methods, is_async, make_runner

_PAGE_BYTES = 4096
_PROPERTIES_NOT_SENT = (
    "segment",
    "segment_bytes",
    "post_max_bytes",
    "identity",
    "generation_seen",
    "owner",
    "optimal_io_bytes",
)


def serve(
    backend: Backend,
    *,
    device: str,
    run_dir: Path = RUN_DIR_DEFAULT,
    kind: str = "",
    wait_s: float = 0.0,
    transport: Transport = "auto",
    lock_memory: bool = False,
    handle_signals: bool = True,
    end_patience_s: float | None = None,
) -> int:
    """Serve `device` until told to end; returns the process's exit status.

    `kind` is what `ublkpool list` shows (default: the class's name).  `wait_s`: how many seconds to wait for a daemon
    that does not listen yet.  `transport`: see `client.Transport`.  `lock_memory`: lock this process's memory, as
    built-in backends do.  `handle_signals`: False if this is not the main thread; otherwise the process ends, with
    status 1, if a request is not answered `end_patience_s` seconds after it was told to end; by default
    `ending.END_PATIENCE_S`.  Raises `PoolError` if it cannot start: `AttachRefused` with the daemon's reason,
    `BackendError` for a store, option or daemon that cannot be used.
    """
    check_methods(backend, kind)
    known = describe(run_dir, device, wait_s)
    events = EventLoop()
    with ExitStack() as stack:
        stack.callback(events.close)
        opened = open_store(backend, _hint(run_dir, known), events)
        stack.callback(lambda: events.settle(backend.close()))
        properties = check_properties(opened)
        segment = _segment(properties)
        if segment is not None:
            stack.callback(segment.close)
        # An older daemon does not know identities and refuses unknown fields.
        attach = attach_message(
            properties, device, kind or type(backend).__name__.lower(), tells=known.may_create is not None
        )
        attach = _with_survival(attach, backend, known)
        if known.knows_resize and growth.can_resize(backend):
            attach = msgspec.structs.replace(attach, resizes=True)
        if known.former_owner is not None:
            attach = msgspec.structs.replace(attach, owner=properties.owner)
        if known.knows_optimal_io:
            attach = msgspec.structs.replace(attach, optimal_io_bytes=properties.optimal_io_bytes)
        attachment = DeviceConnection.open(
            run_dir, device, attach, segment, wait_s=wait_s, transport=transport
        )
        stack.callback(attachment.close)
        _harden(lock_memory)
        loop = stack.enter_context(Loop(backend, attachment, properties.post_max_bytes, events))
        loop.tells_growth = known.knows_resize
        if handle_signals:
            heard = stack.enter_context(signals(loop))
            watch = EndWatch(loop, attachment.fileno(), heard, end_patience_s)
            loop.watch_end(stack.enter_context(watch))
        try:
            status = loop.run()
        except StoreTaken as error:
            if known.former_owner is not None:
                attachment.tell(wire.Excluded(reason=str(error)[: growth.REASON_LENGTH_MAX]))
            raise
        if known.knows_leaving:
            attachment.tell(wire.Leaving())
        return status


def open_store(backend: Backend, hint: Hint, events: EventLoop | None = None) -> Properties:
    """What the backend's `open` returns.  Raises `PluginError`, which names the line, for an exception in it."""
    with authors_code("while the store was opened"):
        opened: Properties = (events or EventLoop()).settle(backend.open(hint))
        return opened


def _hint(run_dir: Path, known: wire.Described) -> Hint:
    may_create = known.may_create is not False
    return Hint(
        known.device,
        run_dir,
        known.size_bytes,
        known.max_io_bytes,
        known.placement,
        known.read_only,
        Path(known.path) if known.path else None,
        may_create,
        known.takes_next,
        known.resized_bytes,
        known.former_owner,
        known.takes_over,
    )


def attach_message(properties: Properties, device: str, kind: str, tells: bool = True) -> wire.Attach:
    """The attach message for `properties`; `tells`: with identity and generation.

    Raises `BackendError` for properties of a wrong type, which the daemon would take for a broken connection.
    """
    fields = {
        name: getattr(properties, name)
        for name in properties.__struct_fields__
        if name not in _PROPERTIES_NOT_SENT
    }
    if tells:
        fields["identity"] = _identity(properties, kind)
        fields["generation_seen"] = properties.generation_seen
    attach = wire.Attach(v=wire.PROTOCOL_VERSION, device=device, kind=kind, **fields)
    try:
        msgspec.json.decode(wire.encode_message(attach), type=wire.Attach)
    except (TypeError, ValueError) as error:
        raise BackendError(f"the backend {kind!a} has properties that cannot be sent: {error}") from error
    return attach


def _with_survival(attach: wire.Attach, backend: Backend, known: wire.Described) -> wire.Attach:
    """The message with what the backend says of its data; a daemon that does not know a field refuses it."""
    if known.is_check:
        attach = msgspec.structs.replace(attach, stores_data=bool(backend.stores_data))
    if backend.survives_death:
        return attach
    if not known.knows_survival:
        log.warning("the data ends with this process, and this daemon would serve the device without it")
        return attach
    identity = attach.identity
    if identity is not None and identity.strength == "weak":
        # Without this the next device of the name, after its deletion, would be refused another kind of backend.
        identity = msgspec.structs.replace(identity, ends_with_device=True)
    return msgspec.structs.replace(attach, survives_death=False, identity=identity)


def _identity(properties: Properties, kind: str) -> wire.Identity:
    identity = properties.identity
    if not isinstance(identity, wire.Identity | str | None):
        raise BackendError(
            f"the identity of the backend {kind} must be a text or wire.Identity, not {identity!r}"
        )
    if isinstance(identity, wire.Identity):
        return identity
    if identity:
        return wire.Identity(value=identity, store=identity)
    return wire.Identity(value=f"kind:{kind}", strength="weak", store=f"backend {kind}")


def _segment(properties: Properties) -> OwnSegment | None:
    if properties.segment is not None:
        return properties.segment
    return OwnSegment.create(properties.segment_bytes) if properties.segment_bytes else None


def _harden(lock_memory: bool) -> None:
    reasons = [process.set_io_flusher(), process.lock_memory() if lock_memory else None]
    for reason in filter(None, reasons):
        log.log(logging.WARNING if os.geteuid() == 0 else logging.INFO, "going on without %s", reason)


class ServeStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of a whole backend process."""

    attachment: msgspec.Struct
    engine: msgspec.Struct
    backend: dict[str, int]
    failures: dict[str, int] = {}
    """Failed requests by operation and error, such as `write ENOSPC`."""


class Loop:
    """Moves frames between the queues and the engine, until it is stopped and no request is executing."""

    def __init__(
        self,
        backend: Backend,
        attachment: DeviceConnection,
        post_max_bytes: int = 0,
        events: EventLoop | None = None,
    ) -> None:
        """`post_max_bytes`: see `Properties`; `events`: the asyncio loop, whose thread starts with this loop."""
        self._events = events or EventLoop()
        self._runner: Runner | None = None
        self.device = _device(attachment, self, _slots_bytes(backend, attachment, post_max_bytes))
        self._backend = backend
        self._attachment = attachment
        self._links = attachment.links
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._outbox = Outbox()
        self._stopping = ""
        self._tell_watch: Callable[[], None] = _nothing
        self._status = 0
        self._detached = self._orphaned = False
        self._engine: FrameEngine | None = None
        self._is_driven = False
        self._collect = _nothing
        self._post_max_bytes = post_max_bytes
        self._growth = growth.Growth(backend, self._events, self._outbox.wake)
        self.tells_growth = False
        """Whether the daemon knows `wire.Grown`."""

    def __enter__(self) -> "Loop":
        failures.forget()
        try:
            self._events.start(is_async(self._backend) or growth.is_async(self._backend))
            with authors_code("when the device was attached"):
                self._events.settle(self._backend.started(self.device))
                engine = self._backend.engine(self.device)
            self._engine = engine or self._call_engine()
        except BaseException:
            self._end_runner()
            self._outbox.close()
            raise
        outbox = self._outbox
        for descriptor in {outbox.descriptor, self._engine.fileno()}:
            self.watch(descriptor, outbox.drain if descriptor == outbox.descriptor else _nothing)
        native = getattr(self._engine, "raw", None)
        serve = getattr(self._engine, "serve", nothing_to_serve)
        self._collect = getattr(self._engine, "collect", _nothing)
        self._is_driven = native is not None and self._links.drive(native, serve)
        return self

    def _call_engine(self) -> CallEngine:
        self._runner = runner = make_runner(self._backend, self.device, self._events)
        submit = runner.submit if runner is not None else None
        engine = CallEngine(self._backend, self.device, self._outbox, self._post_max_bytes, submit)
        if runner is not None:
            runner.connect(engine.is_old)
        return engine

    def _end_runner(self) -> None:
        if self._runner is not None:
            self._runner.close()

    def __exit__(self, *_: object) -> None:
        if self._is_driven:
            self._links.drive(None)
        self._end_runner()
        if self._engine is not None:
            is_idle = not self._engine.running() and not self._growth.is_busy
            self._engine.close()
            # A thread that still executes a request after an error writes to this descriptor, whatever has its number.
            if is_idle:
                self._outbox.close()

    def stop(self, reason: str) -> None:
        """Finish the executing requests, then end.  Safe to call from a signal handler and from any thread."""
        self._stopping = self._stopping or reason
        self._outbox.wake()
        self._tell_watch()

    def watch_end(self, watch: EndWatch) -> None:
        """Tell this watch when the loop is told to stop."""
        self._tell_watch = watch.told

    @property
    def name(self) -> str:
        """See `ending.Watched`."""
        return self.device.name

    @property
    def stopping(self) -> str:
        """See `ending.Watched`."""
        return self._stopping

    def expect_turn(self) -> None:
        """See `ending.Watched`."""
        self._outbox.wake()

    @property
    def has_turned(self) -> bool:
        """See `ending.Watched`."""
        return not self._outbox.is_awake

    def unanswered(self) -> str:
        """See `ending.Watched`."""
        executing = getattr(self._engine, "executing", None)
        if executing is None:
            return f"{self._engine.running() if self._engine else 0} requests"
        count, shown = executing()
        words = [
            f"{op_name(op)} of {length} at {offset} (queue {queue})" for queue, op, offset, length in shown
        ]
        more = f" and {count - len(shown)} more" if count > len(shown) else ""
        return f"{count} requests: {', '.join(words)}{more}"

    def watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        """See `Device.watch`."""
        self._links.watch(descriptor)
        self._callbacks[descriptor] = callback

    def unwatch(self, descriptor: int) -> None:
        """See `Device.unwatch`."""
        self._links.unwatch(descriptor)
        del self._callbacks[descriptor]

    def wake(self) -> None:
        """See `Device.wake`."""
        self._outbox.wake()

    def run(self) -> int:
        """Serve until stopped; returns the exit status.

        Raises `PoolError` or `OSError` if the links or io_uring fail.
        """
        engine = self._engine
        assert engine is not None
        log.info("serving %s, %d queues", self.device.name, self.device.queues)
        while not self._stopping:
            self.turn(self._attachment.poll())
        self._links.stop_receiving()
        while engine.running():
            self.turn(self._attachment.poll())
        self._send_answers(engine)
        log.info("%s: ending after %s", self.device.name, self._stopping)
        failures.sum_up(self.device.name)
        if self._detached:
            self._events.settle(self._backend.detached())
        return self._status

    def turn(self, ready: PollResult) -> None:
        """One turn: take the frames that have arrived, call callbacks, send the answers that are ready."""
        engine = self._engine
        assert engine is not None
        if not self._stopping:
            for queue in ready.queues:
                for frame in self._links.frames(queue):
                    engine.take(queue, frame)
        for descriptor in ready.descriptors:
            self._call(descriptor)
        self._outbox.acknowledge()
        self._send_answers(engine)
        if ready.control:
            self._hear()
        if self._growth.has_news:
            self._grow()
        if self._orphaned and not self._stopping and not self._links.linked:
            self._status = 1
            self.stop("the end of the daemon and its workers")

    def _call(self, descriptor: int) -> None:
        callback = self._callbacks.get(descriptor)
        if callback is None:
            return
        try:
            callback()
        except BackendError:
            # The store is lost for good: unanswered requests go to the successor.
            raise
        except Exception:
            log.exception("the callback of a watched file descriptor failed; no longer watching it")
            self.unwatch(descriptor)

    def _send_answers(self, engine: FrameEngine) -> None:
        if self._is_driven:
            self._collect()
            return
        for queue, frame in engine.answers():
            self._links.send_frame(queue, frame)

    def _hear(self) -> None:
        message = self._attachment.message()
        if isinstance(message, wire.Live):
            log.info("%s is live at %s", self.device.name, message.path)
        elif isinstance(message, wire.Detach):
            self._detached = not message.keep
            self.stop(f"the daemon's detach: {message.reason}")
        elif isinstance(message, wire.Resize):
            self._growth.begin(message.size_bytes)
        elif message is None:
            self._attachment.forget_connection()
            self._orphaned = True
            if not self._stopping:
                log.error("%s: the daemon is gone; serving on while there are workers", self.device.name)

    def grown(self, size_bytes: int) -> None:
        """See `Device.resized`."""
        self._growth.announce(size_bytes)

    def _grow(self) -> None:
        """Serve up to the size that the store has by now, then tell the daemon."""
        for message in self._growth.news():
            is_refusal = isinstance(message, wire.Resized) and message.reason
            if message.size_bytes > self.device.size_bytes and not is_refusal:
                resize = getattr(self._engine, "resize", None)
                if resize is not None:
                    resize(message.size_bytes)
                # Frozen for its users only.
                object.__setattr__(self.device, "size_bytes", message.size_bytes)
            if self.tells_growth or isinstance(message, wire.Resized):
                self._attachment.tell(message)

    def statistics(self) -> ServeStatistics:
        """Counters of the links, the engine and the backend."""
        assert self._engine is not None
        return ServeStatistics(
            attachment=self._attachment.statistics(),
            engine=self._engine.statistics(),
            backend=dict(self._backend.statistics()),
            failures=failures.counts(),
        )


def _nothing() -> None:
    """For a descriptor that only wakes the loop: the turn itself does the work."""


def _slots_bytes(backend: Backend, attachment: DeviceConnection, post_max_bytes: int) -> int:
    """The bytes of the own segment for the SDK's slots: all, or half if the backend overrides `place` as well."""
    own = attachment.own_segment
    if own is None or not post_max_bytes:
        return 0
    return own.size_bytes // 2 & -_PAGE_BYTES if asks_for_places(backend) else own.size_bytes


def _device(attachment: DeviceConnection, loop: Loop, own_from: int) -> Device:
    attached, own = attachment.attached, attachment.own_segment
    pool = attachment.segments.get(wire.SEGMENT_POOL)
    if pool is None:
        raise BackendError("the daemon handed over no pool")
    return Device(
        name=attached.device,
        number=attached.device_number,
        epoch=attached.epoch,
        size_bytes=attached.size_bytes,
        logical_block_bytes=attached.logical_block_bytes,
        queues=attached.queues,
        depth=attached.depth,
        max_io_bytes=attached.max_io_bytes,
        need_get_data=attached.need_get_data,
        placement=attached.placement,
        read_only=attached.read_only,
        pool=pool,
        clients={n: each for n, each in attachment.segments.items() if n >= wire.SEGMENT_CLIENTS},
        own=own.view if own else memoryview(b""),
        own_segment=attached.own_segment,
        own_from=own_from,
        post_bytes=attached.post_bytes,
        generation=attached.generation,
        watch=loop.watch,
        unwatch=loop.unwatch,
        wake=loop.wake,
        stop=loop.stop,
        resized=loop.grown,
    )
