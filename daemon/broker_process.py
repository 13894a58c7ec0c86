"""The pool broker's process, seen from the supervisor: start it, command it, end it.

Owns the control socket to it.  Commands go one at a time; each is answered, or the broker is gone.
"""

import asyncio
import socket
from pathlib import Path

from ublkpool.bufpool import broker
from ublkpool.bufpool.errors import PoolError
from ublkpool.daemon.children import Child, describe_exit
from ublkpool.daemon.readable import readable
from ublkpool.workers.process import fork_child

REPLY_DEADLINE_S = 20.0
_STOP_PATIENCE_S = 5.0


class BrokerProcess:
    """The broker of this daemon."""

    def __init__(self, endpoint: str) -> None:
        """Fork it; it listens on `endpoint` (`ipc://...`) soon after."""
        self.endpoint = endpoint
        self._turn = asyncio.Lock()
        self._socket, theirs = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        pid = fork_child(lambda: _serve(endpoint, theirs), [theirs.fileno()], "ublkpool-broker")
        theirs.close()
        self.child = Child(pid, "pool broker")

    async def command(self, command: broker.Command, fd: int | None = None) -> broker.Reply:
        """Have the broker do this.  Raises `PoolError` with its reason, or if it has gone or hangs."""
        async with self._turn:
            broker.send_command(self._socket, command, fd)
            await self._readable()
            reply = broker.receive_reply(self._socket)
        if isinstance(reply, broker.Failed):
            raise PoolError(f"pool broker: {reply.reason}")
        return reply

    async def stop(self) -> None:
        """End it; leases stay in the slot headers."""
        await self.child.end(_STOP_PATIENCE_S)
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

    def __init__(self, pool_broker: BrokerProcess, device_number: int, queues: int) -> None:
        self._broker = pool_broker
        self._number = device_number
        self._queues = range(queues)
        self._epochs: list[int] = []

    async def open(self, control_fd: int) -> None:
        """Have the broker serve the device whose control segment this is."""
        await self._broker.command(broker.AddDevice(self._number), control_fd)

    async def register(self, epoch: int) -> None:
        """Set the reserves aside for the workers of this epoch."""
        self._epochs.append(epoch)
        for queue in self._queues:
            await self._broker.command(broker.Register(self._number, queue, epoch))

    async def reclaim(self) -> None:
        """Take back everything: all workers so far are dead, and nobody uses their buffers."""
        for epoch in self._epochs:
            for queue in self._queues:
                await self._broker.command(broker.Reclaim(self._number, queue, epoch))
        self._epochs.clear()

    async def close(self) -> None:
        """Reclaim, and have the broker forget the device."""
        await self.reclaim()
        await self._broker.command(broker.RemoveDevice(self._number))


def _serve(endpoint: str, control_sock: socket.socket) -> int:
    broker.run_broker(endpoint, control_sock)
    return 0
