"""The pool broker: serves `LeaseTable`s to workers over ZeroMQ, as a process of its own.

Owns the ROUTER socket and the daemon's control socket.  `device_leases.py` owns the protocol with the workers,
`broker_commands.py` the daemon's commands.  `run_broker` runs in a process of its own and makes its ZeroMQ context
there. One thread; SIGTERM, SIGINT, `Stop` or, by default, the end of the control socket end it.  It leaves every lease
as it is: workers keep their buffers, and the next broker reads the leases from the slot headers.
"""

import contextlib
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import zmq

from ublkpool.bufpool.errors import PoolError, WireError
from ublkpool.bufpool.packets import receive_descriptors
from ublkpool.bufpool.pool.broker_commands import (
    COMMAND_BYTES_MAX,
    AddDevice,
    BrokerStatistics,
    Command,
    Done,
    Failed,
    GetStatistics,
    Ping,
    Pong,
    Reclaim,
    Register,
    RemoveDevice,
    Reply,
    StatisticsReply,
    Stop,
    decode_command,
    encode,
)
from ublkpool.bufpool.pool.control import Control
from ublkpool.bufpool.pool.device_leases import DeviceLeases, parse_routing_id, worker_routing_id
from ublkpool.bufpool.pool.lease import Owner
from ublkpool.bufpool.way_out import explain
from ublkpool.bufpool.wire import unpack_slots

MESSAGES_PER_TURN_MAX = 256
_SEND_QUEUE_MESSAGES_MAX = 1000
_MESSAGE_BYTES_MAX = 16 << 20
_LOGGED_MAX = 1024
_log = logging.getLogger("ublkpool.broker")


class Broker:
    """The sockets: commands in, frames in, frames out.  `run` until told to stop."""

    def __init__(
        self,
        router: "zmq.Socket[bytes]",
        control_sock: socket.socket,
        exit_on_eof: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._router = router
        self._control_sock = control_sock
        self._exit_on_eof = exit_on_eof
        self._clock = clock
        self._devices: dict[int, DeviceLeases] = {}
        self._due: dict[int, float] = {}
        """When the next question of a device is due; of most devices none is open, and those cost nothing."""
        self._counts: Counter[str] = Counter()
        self._logged: set[tuple[str, bytes]] = set()
        self._stopping = False

    def run(self, wakeup_fd: int) -> None:
        """Serve until Stop, a signal that writes to `wakeup_fd`, or the end of the control socket."""
        poller = zmq.Poller()
        for source in (self._router, self._control_sock.fileno(), wakeup_fd):
            poller.register(source, zmq.POLLIN)
        while not self._stopping:
            ready = dict(poller.poll(self._timeout_ms()))
            if wakeup_fd in ready:
                break
            if self._control_sock.fileno() in ready and not self._on_control():
                poller.unregister(self._control_sock.fileno())
            if self._router in ready:
                self._on_router()
            self._ask()

    def close(self) -> None:
        """Unmap every device; leases stay as they are."""
        for device in self._devices.values():
            device.close()
        self._devices.clear()
        self._due.clear()

    def statistics(self) -> BrokerStatistics:
        """Counters now."""
        return msgspec.convert(dict(self._counts), BrokerStatistics)

    def _timeout_ms(self) -> int | None:
        return max(0, int(1000 * (min(self._due.values()) - self._clock())) + 1) if self._due else None

    def _note_due(self, device: DeviceLeases) -> None:
        """After everything that may have opened or answered a question of this device."""
        at_s = device.next_question_at_s()
        if at_s is None:
            self._due.pop(device.device_number, None)
        else:
            self._due[device.device_number] = at_s

    def _on_control(self) -> bool:
        """Execute one command; returns False when the other side is gone and that is no reason to stop."""
        try:
            packet, fds, flags = receive_descriptors(
                self._control_sock, COMMAND_BYTES_MAX, 1, socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return True
        except ConnectionError:
            packet, fds, flags = b"", [], 0
        reply = self._command(packet, fds, flags) if packet else None
        for fd in fds:
            os.close(fd)
        if reply is None:
            # Without a daemon no device will be added.
            self._stopping = self._exit_on_eof or not self._devices
            return False
        self._reply(reply)
        return True

    def _command(self, packet: bytes, fds: Sequence[int], flags: int) -> Reply:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            return Failed("a command larger than a packet may be, or with more than one descriptor")
        try:
            command = decode_command(packet)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return Failed(str(error))
        reply: Reply
        try:
            reply = self._execute(command, fds)
            # No command changes another device than its own.
            number = getattr(command, "device_number", None)
            if number is not None and (device := self._devices.get(number)):
                self._flush(device)
        except (PoolError, OSError) as error:
            reply = Failed(str(error))
        return msgspec.structs.replace(reply, id=command.id)

    def _execute(self, command: Command, fds: Sequence[int]) -> Reply:
        match command:
            case AddDevice(device_number=number):
                return self._add_device(number, fds)
            case RemoveDevice(device_number=number):
                self._device(number).close()
                del self._devices[number]
                self._due.pop(number, None)
            case Register(device_number=number, queue=queue, epoch=epoch):
                self._device(number).register(Owner(queue, epoch))
            case Reclaim(device_number=number, queue=queue, epoch=epoch):
                return Done(self._device(number).reclaim(Owner(queue, epoch)))
            case GetStatistics(device_number=number):
                leases = None if number is None else self._device(number).statistics()
                return StatisticsReply(self.statistics(), tuple(sorted(self._devices)), leases)
            case Ping(number=number):
                return Pong(number)
            case Stop():
                self._stopping = True
        return Done()

    def _add_device(self, device_number: int, fds: Sequence[int]) -> Reply:
        if device_number in self._devices:
            raise PoolError(f"device {device_number} is served already")
        if len(fds) != 1:
            raise PoolError(f"device {device_number} came without its control segment's descriptor")
        control = Control(fds[0])
        try:
            if control.header.device_number != device_number:
                raise PoolError(
                    f"a control segment of device {control.header.device_number}, not {device_number}"
                )
            self._devices[device_number] = DeviceLeases(control, self._count)
        except PoolError:
            control.close()
            raise
        return Done()

    def _device(self, device_number: int) -> DeviceLeases:
        if device_number not in self._devices:
            raise PoolError(f"device {device_number} is not served")
        return self._devices[device_number]

    def _reply(self, reply: Reply) -> None:
        try:
            self._control_sock.send(encode(reply), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            # The leases must go on although the daemon does not read or has died.
            self._count("replies_dropped")
            self._log_once("replies_dropped", b"", f"a reply was dropped: {error.strerror}")

    def _on_router(self) -> None:
        for _ in range(MESSAGES_PER_TURN_MAX):
            try:
                routing_id, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._count("messages")
            if device := self._on_message(routing_id, frames):
                self._flush(device)

    def _on_message(self, routing_id: bytes, frames: Sequence[bytes]) -> DeviceLeases | None:
        try:
            device_number, owner = parse_routing_id(routing_id)
        except WireError as error:
            self._count("unknown_worker")
            self._log_once("unknown_worker", routing_id[:32], str(error))
            return None
        device = self._devices.get(device_number)
        if device is None or not device.knows(owner):
            self._count("unknown_worker")
            # A dead worker's successor may send frames before it is registered; it is asked for a SYNC then.
            if device is None or not device.is_due(owner):
                self._log_once(
                    "unknown_worker", routing_id, f"device {device_number}: {owner} is not registered"
                )
            return None
        for frame in frames:
            self._on_frame(device, owner, frame, routing_id)
        return device

    def _on_frame(self, device: DeviceLeases, owner: Owner, frame: bytes, routing_id: bytes) -> None:
        self._count("frames")
        try:
            descriptor, slots = unpack_slots(frame)
        except WireError as error:
            self._count("malformed")
            self._log_once("malformed", routing_id, f"device {device.device_number}: {owner}: {error}")
            return
        device.on_frame(owner, descriptor, slots)

    def _flush(self, device: DeviceLeases) -> None:
        for owner, frames in device.take_outbox():
            if not self._deliver(device, owner, frames):
                device.unreachable(owner)
        self._note_due(device)

    def _ask(self) -> None:
        now_s = self._clock()
        for device in [self._devices[number] for number, at_s in self._due.items() if at_s <= now_s]:
            for owner, frame in device.questions(now_s):
                self._count("asked" if self._deliver(device, owner, [frame]) else "undeliverable")
            self._note_due(device)

    def _deliver(self, device: DeviceLeases, owner: Owner, frames: Sequence[bytes]) -> bool:
        """Send; returns False if the worker is not connected or does not read."""
        try:
            routing_id = worker_routing_id(device.device_number, *owner)
            self._router.send_multipart([routing_id, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def _count(self, event: str) -> None:
        self._counts[event] += 1

    def _log_once(self, event: str, sender: bytes, text: str) -> None:
        if (event, sender) not in self._logged and len(self._logged) < _LOGGED_MAX:
            self._logged.add((event, sender))
            _log.warning("%s; further ones are only counted", text)


def run_broker(
    endpoint: str,
    control_sock: socket.socket,
    exit_on_eof: bool = True,
    bound: Callable[[], None] = lambda: None,
) -> None:
    """Run the broker until it is told to stop: bind `endpoint` (ipc), take commands from `control_sock`.

    Calls `bound` before it takes the first command.  Sets the process's signal handlers and umask.  Raises `PoolError`
    if it cannot bind, and what `bound` raises.
    """
    os.umask(0o077)
    with contextlib.ExitStack() as stack:
        wakeup_fd = stack.enter_context(_stop_signals())
        context = zmq.Context()
        stack.callback(context.term)
        router = stack.enter_context(context.socket(zmq.ROUTER))
        _bind(router, endpoint)
        stack.callback(_remove_socket, endpoint)
        bound()
        broker = Broker(router, control_sock, exit_on_eof)
        stack.callback(broker.close)
        broker.run(wakeup_fd)


def _bind(router: "zmq.Socket[bytes]", endpoint: str) -> None:
    # An undeliverable message must be an error, not dropped in silence: a lost GRANT would be an unused buffer.
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # A worker may reconnect before the end of its old connection was seen.
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)
    router.setsockopt(zmq.SNDHWM, _SEND_QUEUE_MESSAGES_MAX)
    router.setsockopt(zmq.MAXMSGSIZE, _MESSAGE_BYTES_MAX)
    router.setsockopt(zmq.LINGER, 0)
    try:
        router.bind(endpoint)
    except zmq.ZMQError as error:
        raise PoolError(
            f"the pool broker cannot listen on {endpoint}: {explain(OSError(error.errno, error.strerror))}"
        ) from error


def _remove_socket(endpoint: str) -> None:
    # libzmq replaces a stale socket when it binds, and leaves its own.  An ordinary user leaves it to the daemon.
    with contextlib.suppress(PermissionError):
        Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


@contextlib.contextmanager
def _stop_signals() -> Iterator[int]:
    """A descriptor that becomes readable on SIGTERM or SIGINT; the handlers themselves do nothing."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signals = (signal.SIGTERM, signal.SIGINT)
    previous = {each: signal.signal(each, lambda *_: None) for each in signals}
    previous_fd = signal.set_wakeup_fd(write_fd)
    try:
        yield read_fd
    finally:
        signal.set_wakeup_fd(previous_fd)
        for each, handler in previous.items():
            signal.signal(each, handler)
        os.close(read_fd)
        os.close(write_fd)
