"""The process at the other end of an attach connection, as the kernel recorded it, and whether it may attach.

Owns the checks of process, user and groups.  The socket's mode keeps most users away; but a descriptor can be inherited
or passed on, and the run directory's mode can be changed by mistake.
"""

import os
import socket
import struct
from contextlib import suppress
from typing import NamedTuple

from ublkpool.bufpool.errors import AttachRefused
from ublkpool.workers.credentials import credentials_of

# include/uapi/asm-generic/socket.h; Python does not name it.
_SO_PEERGROUPS = 59
_GROUPS_BYTES_MAX = 1024


class Peer(NamedTuple):
    """The process that connected, its user and all of its groups, as they were at that moment."""

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(sock: socket.socket) -> Peer:
    """The process that connected.  Raises `OSError`."""
    pid, uid, gid = credentials_of(sock)
    return Peer(pid, uid, frozenset((gid, *_supplementary_groups(sock))))


def _supplementary_groups(sock: socket.socket) -> tuple[int, ...]:
    # Python reads no longer option than this: a user with more groups is checked by the first group only.
    with suppress(OSError):
        packed = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES_MAX)
        return struct.unpack(f"{len(packed) // 4}I", packed)
    return ()


def check_may_attach(peer: Peer, group: int | None) -> None:
    """Raise `AttachRefused` unless the peer is root, the daemon's user or a member of the config's group."""
    if peer.uid in (0, os.geteuid()) or group in peer.groups:
        return
    who = "root and the daemon's user" if group is None else f"root, the daemon's user and group {group}"
    raise AttachRefused(
        f"process {peer.pid} of user {peer.uid} may not attach, only {who} may: set group in the config"
    )
