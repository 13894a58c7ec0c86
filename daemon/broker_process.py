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


def _serve(endpoint: str, control_sock: socket.socket) -> int:
    broker.run_broker(endpoint, control_sock)
    return 0
