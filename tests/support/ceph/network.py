"""A network namespace of a test's own, joined to this one by a pair of devices whose link can be cut; more hosts of it.

Needs root.  What is sent while a link is cut is lost without an answer, as with a pulled cable.
"""

import os
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from typing import Self


class Network:
    """The namespace; `address` is in it, and this side reaches it directly."""

    def __init__(self, name: str) -> None:
        """`name` of at most 12 characters, unused on this machine."""
        self.name = name
        # A part of 198.18.0.0/15, which is for tests of networks, of the process's own.
        number = os.getpid() % (1 << 13)
        first = (198 << 24) + (18 << 16) + 4 * number
        self._here, self.address = (".".join(map(str, (first + last).to_bytes(4, "big"))) for last in (1, 2))

    @property
    def prefix(self) -> tuple[str, ...]:
        """Put before a command that shall run in the namespace."""
        return "ip", "netns", "exec", self.name

    def make(self) -> None:
        """Make it, with its link."""
        inside = ["-n", self.name]
        _ip(["netns", "add", self.name])
        try:
            _ip(["link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", self.name])
            _ip(["address", "add", f"{self._here}/30", "dev", self.name])
            _ip([*inside, "address", "add", f"{self.address}/30", "dev", "eth0"])
            for command in (["link", "set", self.name, "up"], [*inside, "link", "set", "lo", "up"]):
                _ip(command)
            heal(self.name)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove it; processes in it keep it without a name."""
        for command in (["link", "delete", self.name], ["netns", "delete", self.name]):
            with suppress(subprocess.CalledProcessError):
                _ip(command)


class OtherHost:
    """Another host: a namespace with a link of its own to a network, which can be cut.  A context manager."""

    def __init__(self, network: Network, number: int) -> None:
        """`number` from 1 on tells the hosts of a network apart."""
        self.name = f"{network.name}h{number}"
        self._network = network.name
        self._server = network.address
        # In the half of 198.18.0.0/15 that has no networks.
        self._address = f"198.19.0.{number}"

    @property
    def prefix(self) -> tuple[str, ...]:
        """Put before a command that shall run on the host; it keeps every mount of this one, as ip-netns would not."""
        return "nsenter", f"--net=/run/netns/{self.name}"

    def __enter__(self) -> Self:
        here, there = ["-n", self._network], ["-n", self.name]
        _ip(["netns", "add", self.name])
        try:
            _ip([*here, "link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", self.name])
            for side, device, own, peer in (
                (here, self.name, self._server, self._address),
                (there, "eth0", self._address, self._server),
            ):
                # With the peer named, the route comes with the address, and again after each cut.
                _ip([*side, "address", "add", own, "peer", peer, "dev", device])
            for device in ("lo", "eth0"):
                _ip([*there, "link", "set", device, "up"])
            self.heal()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for command in (["-n", self._network, "link", "delete", self.name], ["netns", "delete", self.name]):
            with suppress(subprocess.CalledProcessError):
                _ip(command)

    def cut(self) -> None:
        """Cut it off.  At the other end, so that the host sends into the void."""
        _ip(["-n", self._network, "link", "set", self.name, "down"])

    def heal(self) -> None:
        """Join it again."""
        _ip(["-n", self._network, "link", "set", self.name, "up"])


def cut(name: str) -> None:
    """Cut the link of a namespace."""
    _ip(["-n", name, "link", "set", "eth0", "down"])


def heal(name: str) -> None:
    """Join it again."""
    _ip(["-n", name, "link", "set", "eth0", "up"])


def _ip(arguments: Iterable[str]) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
