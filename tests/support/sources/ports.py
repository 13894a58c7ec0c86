"""Ports of the loopback that no other process can take while a test's server is away."""

import socket


class HeldPort:
    """A TCP port of an address of this machine, bound by a socket that never listens.

    A server that sets SO_REUSEADDR can listen at the port, stop and listen again.  While no server listens, a
    connection is refused, and the kernel gives the port to no other socket.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, 0))
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()
