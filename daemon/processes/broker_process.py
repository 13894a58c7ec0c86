"""The pool broker's process, seen from the supervisor: start it, command it, end it.

Owns the control socket to it.  Commands go one at a time; each is answered, or the broker is gone.
"""

import asyncio
import logging
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

import msgspec

from ublkpool.bufpool.errors import PoolError
from ublkpool.bufpool.pool import broker_commands
from ublkpool.bufpool.pool.broker import run_broker
from ublkpool.daemon.processes.background import owned
from ublkpool.daemon.processes.backoff import Backoff, start_surely
from ublkpool.daemon.processes.children import Child, describe_exit
from ublkpool.daemon.processes.holder import Holder
from ublkpool.daemon.processes.questions import Questions
from ublkpool.daemon.processes.readable import readable
from ublkpool.daemon.processes.reserve import with_room_for_one
from ublkpool.workers.process import fork_child

HELD = "broker"
REPLY_DEADLINE_S = 20.0
RESTART_MIN_S = 0.05
RESTART_MAX_S = 5.0
_STOP_PATIENCE_S = 5.0
_log = logging.getLogger("ublkpool.broker")


class BrokerProcess:
    """The broker of this daemon."""

    def __init__(self, endpoint: str, holder: Holder) -> None:
        """Nothing runs yet: `adopt` or `start`.  It listens on `endpoint` (`ipc://...`)."""
        self.endpoint = endpoint
        self.generation = 0
        """Raised at every start; a broker knows only the devices that it was told itself."""
        self.adopted_generation = 0
        """The generation that knows what an earlier daemon told it, 0 if there is none."""
        self._holder = holder
        self._turn = asyncio.Lock()
        self._questions: Questions[broker_commands.Reply] = Questions()
        self._repeats_ids: bool | None = None
        self._stopping = False
        self._backoff = Backoff(asyncio.get_running_loop().time, RESTART_MIN_S, RESTART_MAX_S)

    def start(self) -> None:
        """Fork it; it listens soon after."""
        self._start()

    async def adopt(self, pid: int, sock: socket.socket) -> bool:
        """Go on with an earlier daemon's; `sock` is ours now.  Whether it answers."""
        sock.setblocking(False)
        self._socket = sock
        try:
            self.child = Child(pid, "pool broker")
        except ProcessLookupError:
            sock.close()
            return False
        try:
            await self._drain()
        except (PoolError, OSError) as error:
            _log.warning("an earlier daemon's pool broker is of no use: %s", error)
            await self.child.kill()
            sock.close()
            return False
        self._use(sock)
        self.adopted_generation = self.generation
        return True

    async def _drain(self) -> None:
        """Drop what it answered to an earlier daemon.  Raises `PoolError`, `OSError`."""
        number = secrets.randbits(31)
        broker_commands.send_command(self._socket, broker_commands.Ping(number))
        reply: broker_commands.Reply = broker_commands.Done()
        while reply != broker_commands.Pong(number):
            await self._readable()
            reply = broker_commands.receive_reply(self._socket)

    async def _ask_for_ids(self) -> None:
        """Whether an adopted one repeats ids: one of an earlier version refuses a field that it does not know."""
        try:
            broker_commands.send_command(self._socket, broker_commands.Ping(0, id=1))
        except OSError as error:
            raise PoolError("the pool broker is gone") from error
        try:
            await self._readable()
        except PoolError:
            # Its late answer could not be told from that of the next command.
            self.child.send(signal.SIGKILL)
            raise
        self._repeats_ids = broker_commands.receive_reply(self._socket).id == 1

    async def forget(self, device: int | None) -> None:
        """Have it drop this device if it knows it.  Raises `PoolError`."""
        known = await self.command(broker_commands.GetStatistics())
        assert isinstance(known, broker_commands.StatisticsReply)
        if device in known.devices:
            await self.command(broker_commands.RemoveDevice(device))

    async def forget_all_but(self, devices: Collection[int]) -> None:
        """Have an adopted one drop the devices that are not to go on.  Raises `PoolError`."""
        known = await self.command(broker_commands.GetStatistics())
        assert isinstance(known, broker_commands.StatisticsReply)
        for number in set(known.devices) - set(devices):
            await self.command(broker_commands.RemoveDevice(number))

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        fork = with_room_for_one(
            lambda: fork_child(lambda: _serve(self.endpoint, theirs), [theirs.fileno()], "ublkpool-broker")
        )
        try:
            self.child = Child(fork(), "pool broker")
        except OSError:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self._repeats_ids = True
        try:
            self._use(self._socket)
        except OSError:
            self.child.send(signal.SIGKILL)
            self._socket.close()
            raise

    def _use(self, sock: socket.socket) -> None:
        self._questions = Questions()
        self._holder.hold(HELD, sock.fileno())
        self.generation += 1
        self._backoff.started()

    async def keep_running(self, restarted: Callable[[], Awaitable[None]]) -> None:
        """Start it again whenever it dies, and have `restarted` tell it the devices; until it is stopped."""
        telling: set[asyncio.Future[None]] = set()
        while True:
            status = await self.child.wait()
            if self._stopping:
                return
            # It ends with status 0 when it was asked to, as by an upgrade.
            level = logging.ERROR if status else logging.INFO
            _log.log(level, "the pool broker ended: %s; starting it again", describe_exit(status))
            async with self._turn:
                self._socket.close()
                await asyncio.sleep(self._backoff.ended())
                is_started = self._starts()
            if not is_started:
                # Out of the turn: what asks for the broker meanwhile is told that there is none, and does not wait.
                await start_surely("the pool broker", self._start, self._backoff, _log)
            # Not awaited: a device may have it wait, and this broker may die meanwhile.
            told = owned("the pool broker", asyncio.ensure_future(restarted()))
            telling.add(told)
            told.add_done_callback(telling.discard)

    def _starts(self) -> bool:
        try:
            self._start()
        except OSError:
            return False
        return True

    async def command(self, command: broker_commands.Command, fd: int | None = None) -> broker_commands.Reply:
        """Have the broker do this.  Raises `PoolError` with its reason, or if it has gone or hangs."""
        async with self._turn:
            if self._repeats_ids is None:
                await self._ask_for_ids()
            number, answer = self._questions.ask()
            numbered = msgspec.structs.replace(command, id=number if self._repeats_ids else 0)
            try:
                broker_commands.send_command(self._socket, numbered, fd)
            except OSError as error:
                self._questions.unask(number)
                raise PoolError("the pool broker is gone") from error
            while not answer.done():
                await self._readable()
                # It may be late, and answer a command before this one.
                come = broker_commands.receive_reply(self._socket)
                self._questions.answer(come.id, come)
            reply = answer.result()
        if isinstance(reply, broker_commands.Failed):
            raise PoolError(f"pool broker: {reply.reason}")
        return reply

    async def renew(self) -> None:
        """Have another one, of today's code, go on."""
        await self.child.end(_STOP_PATIENCE_S)

    async def stop(self) -> None:
        """End it; leases stay in the slot headers."""
        self._stopping = True
        await self.child.end(_STOP_PATIENCE_S)
        self._holder.drop(HELD)
        self._socket.close()
        Path(self.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    async def _readable(self) -> None:
        try:
            await asyncio.wait_for(readable(self._socket), REPLY_DEADLINE_S)
        except TimeoutError:
            state = self.child.exit_status
            how = "does not answer" if state is None else f"ended: {describe_exit(state)}"
            raise PoolError(f"the pool broker {how}") from None


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
        """`control_fd` is the device's control segment; it stays the caller's, and open for as long as this is used.

        `known`: the epoch whose workers live already, from an earlier daemon.
        """
        self._broker = pool_broker
        self._number = device_number
        self._queues = range(queues)
        self._control_fd = control_fd
        self._epochs: list[int] = [] if known is None else [known]
        self._generation = 0 if known is None else pool_broker.adopted_generation
        self._closed = False
        # A new broker is told at once, also while the device waits for buffers: so what follows can overlap.
        self._turn = asyncio.Lock()

    async def refresh(self) -> None:
        """Tell a broker that was started since what its predecessor knew; the slot headers tell it the rest."""
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
        """Take back everything: all workers so far are dead, and nobody uses their buffers."""
        async with self._turn:
            await self._refresh()
            await self._reclaim()

    async def close(self) -> None:
        """Reclaim, and have the broker forget the device."""
        async with self._turn:
            self._closed = True
            await self._refresh()
            await self._reclaim()
            await self._broker.command(broker_commands.RemoveDevice(self._number))

    async def _refresh(self) -> None:
        if self._generation == self._broker.generation:
            return
        self._generation = self._broker.generation
        await self._broker.command(broker_commands.AddDevice(self._number), self._control_fd)
        for epoch in self._epochs[-1:]:
            await self._register(epoch)

    async def _reclaim(self) -> None:
        for epoch in self._epochs:
            for queue in self._queues:
                await self._broker.command(broker_commands.Reclaim(self._number, queue, epoch))
        self._epochs.clear()

    async def _register(self, epoch: int) -> None:
        for queue in self._queues:
            await self._broker.command(broker_commands.Register(self._number, queue, epoch))


def _serve(endpoint: str, control_sock: socket.socket) -> int:
    # I/O goes on while the supervisor is dead; the next one ends this broker.
    run_broker(endpoint, control_sock, exit_on_eof=False)
    return 0
