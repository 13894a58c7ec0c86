"""The pool broker as the supervisor sees it: its process, the commands to it, and each device's leases there.

Owns the control socket to the broker.  Commands go one at a time; each is answered, or raises `PoolError`.
"""

import asyncio
import logging
import secrets
import signal
import socket
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool import broker_commands
from ublkpool.bufpool.pool.broker import run_broker
from ublkpool.daemon.processes.background import Background
from ublkpool.daemon.processes.channel import Channel
from ublkpool.daemon.processes.children import Child, describe_exit
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.reserve import with_room_for_one
from ublkpool.daemon.processes.supervised import SupervisedProcess
from ublkpool.daemon.settings.run_directory import let_workers_connect
from ublkpool.workers.privileges import Account, forbid_new_rights, give_up_rights
from ublkpool.workers.process import EXIT_FAULT, fork_child

HELD_PROCESS = "/broker"
"""The name under which the holder has the broker's pidfd: it is found though no record names it yet.

A device's descriptors lie below its name, and no device's name has a slash.
"""
HELD = f"{HELD_PROCESS}/socket"
"""The same for the control socket."""
EARLIER_HELD = "broker"
"""The control socket's name in earlier versions; also the name that a device may have."""
REPLY_DEADLINE_S = 20.0
RESTART_MIN_S = 0.05
RESTART_MAX_S = 5.0
_STOP_PATIENCE_S = 5.0
_LISTEN_PATIENCE_S = 5.0
_POLL_S = 0.02
_TITLE = "the pool broker"
REPLACED = "it is replaced by another version"
_log = logging.getLogger("ublkpool.broker")
_Channel = Channel[broker_commands.Command, broker_commands.Reply]


class BrokerProcess(SupervisedProcess):
    """The broker of this daemon."""

    _channel: _Channel

    def __init__(self, endpoint: str, holder: Holder, account: Account | None = None) -> None:
        """Nothing runs yet: `adopt` or `start`.  The broker listens on `endpoint` (`ipc://...`).

        `account`: the user that it becomes, as the workers do; None: it keeps the daemon's rights.
        """
        super().__init__(_TITLE, _log, RESTART_MIN_S, RESTART_MAX_S)
        self.endpoint = endpoint
        self._account = account
        self.generation = 0
        """Raised at every start; a broker knows only the devices that were added since its own."""
        self.adopted_generation = 0
        """The generation of an adopted broker, which knows the devices that an earlier daemon added; else 0."""
        self.last_end = ""
        """How the broker before this one ended; empty without one."""
        self.was_replaced = False
        """Whether the daemon ended that one, to run another version."""
        self._holder = holder
        self._turn = asyncio.Lock()
        self._replacing = asyncio.Lock()
        self._repeats_ids: bool | None = None
        """Whether the broker repeats a command's `id`; None while that is unknown."""
        self._restarted: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._telling = Background(_TITLE)

    async def adopt(self, pid: int, sock: socket.socket) -> bool:
        """Go on with an earlier daemon's broker, and take over `sock`; whether the broker answers."""
        sock.setblocking(False)
        channel = _channel(sock)
        try:
            self._adopt(pid)
        except ProcessLookupError:
            channel.close()
            return False
        try:
            await self._drain(channel)
        except (PoolError, OSError) as error:
            _log.warning("an earlier daemon's pool broker is replaced: %s", error)
            await self.child.kill()
            channel.close()
            return False
        self._use(channel, self.child)
        self.adopted_generation = self.generation
        return True

    async def _drain(self, channel: _Channel) -> None:
        """Drop replies that an earlier daemon did not read.  Raises `PoolError`, `OSError`."""
        number = secrets.randbits(31)
        channel.send(broker_commands.Ping(number))
        while await self._next_reply(channel) != broker_commands.Pong(number):
            pass

    async def _ask_for_ids(self) -> None:
        """Learn whether an adopted broker repeats ids: an earlier version refuses a field that it does not know."""
        try:
            self._channel.send(broker_commands.Ping(0, id=1))
        except OSError as error:
            raise PoolError("the pool broker is gone") from error
        try:
            reply = await self._next_reply(self._channel)
        except PoolError:
            # A late answer could not be told from that of the next command.
            self.child.send(signal.SIGKILL)
            raise
        self._repeats_ids = reply.id == 1

    async def forget(self, device: int | None) -> None:
        """Have the broker remove this device if it knows it.  Raises `PoolError`."""
        if device in await self._known_devices():
            assert device is not None
            await self.command(broker_commands.RemoveDevice(device))

    async def forget_all_but(self, devices: Collection[int]) -> None:
        """Have an adopted broker remove every device but these, which go on.  Raises `PoolError`."""
        for number in await self._known_devices() - set(devices):
            await self.command(broker_commands.RemoveDevice(number))

    async def _known_devices(self) -> set[int]:
        known = await self.command(broker_commands.GetStatistics())
        assert isinstance(known, broker_commands.StatisticsReply)
        return set(known.devices)

    def _start(self) -> None:
        ours, theirs = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        fork = with_room_for_one(
            lambda: fork_child(
                lambda: _serve(self.endpoint, theirs, self._account), [theirs.fileno()], "ublkpool-broker"
            )
        )
        try:
            child = Child(fork())
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        try:
            self._use(_channel(ours), child)
        except OSError:
            child.send(signal.SIGKILL)
            ours.close()
            raise
        self.child = child
        self._repeats_ids = True

    def _use(self, channel: _Channel, child: Child) -> None:
        self._holder.hold(HELD_PROCESS, child.fileno())
        self._holder.hold(HELD, channel.fileno())
        self._channel = channel
        self.generation += 1

    async def keep_running(self, restarted: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Start the broker again whenever it ends, and have `restarted` tell it the devices; until it is stopped."""
        self._restarted = restarted
        await super().keep_running()

    def _interval(self) -> AbstractAsyncContextManager[object]:
        """A command waits for the first attempt; if that fails, commands fail at once until one succeeds."""
        return self._turn

    async def _clear_away(self, pause_s: float) -> None:
        status = self.child.exit_status or 0
        self.was_replaced = self.is_replaced
        # Status 0: it was told to end.
        level = logging.ERROR if status and not self.was_replaced else logging.INFO
        self.last_end = REPLACED if self.was_replaced else describe_exit(status)
        _log.log(level, "the pool broker ended: %s; starting it again", self.last_end)
        self._channel.close()

    def _on_restart(self) -> None:
        # Not awaited: a device may keep it waiting, and this broker may end meanwhile.
        if self._restarted is not None:
            self._telling.spawn(self._restarted())

    async def command(self, command: broker_commands.Command, fd: int | None = None) -> broker_commands.Reply:
        """Have the broker execute this.  Raises `PoolError` with its reason, or if it is gone or hangs."""
        async with self._turn:
            if self._repeats_ids is None:
                await self._ask_for_ids()
            try:
                answer = self._channel.ask(command, fd=fd, repeats_ids=bool(self._repeats_ids))
            except OSError as error:
                raise PoolError("the pool broker is gone") from error
            while not answer.done():
                # The next reply may be late, and answer an earlier command.
                reply = await self._next_reply(self._channel)
                self._channel.answer(reply.id, reply)
            reply = answer.result()
        if isinstance(reply, broker_commands.Failed):
            raise PoolError(f"pool broker: {reply.reason}")
        return reply

    async def be_reachable(self) -> None:
        """Replace the broker if its socket was removed: new workers would wait for it.  Raises `PoolError`."""
        path = Path(self.endpoint.removeprefix("ipc://"))
        async with self._replacing:
            # One that was just started will listen soon.
            if await _appears(path, _LISTEN_PATIENCE_S):
                return
            _log.error("%s was removed while the daemon runs; replacing the pool broker", path)
            await self.child.end(_STOP_PATIENCE_S)
            if not await _appears(path, REPLY_DEADLINE_S):
                raise PoolError(f"the pool broker does not listen on {path}")

    async def renew(self) -> None:
        """Have a process of today's code take the place of this one."""
        await self.replace(_STOP_PATIENCE_S)

    async def stop(self) -> None:
        """End it; leases stay in the slot headers."""
        self.let_end()
        await self.child.end(_STOP_PATIENCE_S)
        self._telling.cancel()
        self._holder.drop(HELD_PROCESS)
        self._channel.close()
        Path(self.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    async def _next_reply(self, channel: _Channel) -> broker_commands.Reply:
        try:
            await asyncio.wait_for(channel.readable(), REPLY_DEADLINE_S)
        except TimeoutError:
            # It might do later what it was told, and the daemon would not know.
            self.child.send(signal.SIGKILL)
            state = self.child.exit_status
            how = "does not answer" if state is None else f"ended: {describe_exit(state)}"
            raise PoolError(f"the pool broker {how}") from None
        reply = channel.receive()
        if reply is None:
            raise PoolError("the pool broker is gone")
        return reply


async def _appears(path: Path, patience_s: float) -> bool:
    deadline_s = asyncio.get_running_loop().time() + patience_s
    while not path.exists():
        if asyncio.get_running_loop().time() >= deadline_s:
            return False
        await asyncio.sleep(_POLL_S)
    return True


def _channel(sock: socket.socket) -> _Channel:
    return Channel(sock, broker_commands.decode_reply)


class Leases:
    """One device's leases at the broker: which epochs its workers were registered with."""

    def __init__(
        self,
        pool_broker: BrokerProcess,
        device_number: int,
        queues: int,
        control_fd: int,
        known: int | None = None,
    ) -> None:
        """`control_fd` is the device's control segment; it stays the caller's, and open as long as this is used.

        `known`: the epoch of workers that an earlier daemon registered.
        """
        self._broker = pool_broker
        self._number = device_number
        self._queues = range(queues)
        self._control_fd = control_fd
        self._epochs: list[int] = [] if known is None else [known]
        self._generation = self._told = 0 if known is None else pool_broker.adopted_generation
        self._closed = False
        # A restarted broker is told at once, even while the device waits for it: so calls can overlap.
        self._turn = asyncio.Lock()

    @property
    def are_told(self) -> bool:
        """Whether the broker that runs now knows of the device and its workers."""
        return self._told == self._broker.generation

    async def refresh(self) -> None:
        """Tell a broker that was restarted of the device and its workers; it reads leases from the slot headers."""
        async with self._turn:
            if not self._closed:
                await self._refresh()

    async def register(self, epoch: int) -> None:
        """Set the reserves aside for the workers of this epoch."""
        async with self._turn:
            await self._refresh()
            self._epochs.append(epoch)
            await self._register(epoch)

    async def reclaim(self) -> None:
        """Take back every buffer: all registered workers are dead, and no process uses their buffers."""
        async with self._turn:
            await self._refresh()
            await self._reclaim()

    async def close(self) -> None:
        """Reclaim, and have the broker remove the device."""
        async with self._turn:
            self._closed = True
            await self._refresh()
            await self._reclaim()
            await self._broker.command(broker_commands.RemoveDevice(self._number))

    async def _refresh(self) -> None:
        if self._generation == self._broker.generation:
            return
        generation = self._generation = self._broker.generation
        await self._broker.command(broker_commands.AddDevice(self._number), self._control_fd)
        for epoch in self._epochs[-1:]:
            await self._register(epoch)
        self._told = generation

    async def _reclaim(self) -> None:
        for epoch in self._epochs:
            for queue in self._queues:
                await self._broker.command(broker_commands.Reclaim(self._number, queue, epoch))
        self._epochs.clear()

    async def _register(self, epoch: int) -> None:
        for queue in self._queues:
            await self._broker.command(broker_commands.Register(self._number, queue, epoch))


class NoLeases(Leases):
    """Of a device whose queues have buffers of their own: the broker knows nothing of it."""

    @property
    def are_told(self) -> bool:
        return True

    async def refresh(self) -> None:
        """Nothing."""

    async def register(self, epoch: int) -> None:
        """Nothing: a worker has its buffers from its start."""

    async def reclaim(self) -> None:
        """Nothing: the next epoch's workers take them."""

    async def close(self) -> None:
        """Nothing."""


def _serve(endpoint: str, control_sock: socket.socket, account: Account | None) -> int:
    def bound() -> None:
        if account is not None and account.user:
            # Workers connect again whenever a broker has ended.
            let_workers_connect(Path(endpoint.removeprefix("ipc://")), account)
            with _naming_user(account):
                give_up_rights(account)

    try:
        if account is not None:
            # Before ZeroMQ's threads, which inherit it.
            with _naming_user(account):
                forbid_new_rights()
                if not account.user:
                    give_up_rights(account)
        # I/O goes on while no supervisor runs, and the next one adopts or ends this broker.
        run_broker(endpoint, control_sock, exit_on_eof=False, bound=bound)
    except PoolError as error:
        _log.critical("%s", error)
        return EXIT_FAULT
    return 0


@contextmanager
def _naming_user(account: Account) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PoolError(f"the pool broker cannot become user {account.name}: {error}") from error
