"""The table of contestants: the name of each, and the context manager that starts and stops it.

A contestant's start yields its `Disks`: the device node, and the processes whose CPU time and memory count.
"""

import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from bench import nbd_clients, ours, peers, rbd_clients
from bench.ours import BACKENDS, Start
from bench.results import Transport
from ublkpool.backends.rbd.cluster import LEAN


class Contestant(NamedTuple):
    """`family` groups rows; `stores`: its memory must be allocated before it is measured."""

    name: str
    start: Start
    family: str
    how: str
    transport: Transport = ""
    stores: bool = False

    @property
    def kind(self) -> str:
        """The name without the transport."""
        return self.name.removesuffix(f", {self.transport}")

    @property
    def slug(self) -> str:
        """The name for devices and files."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


PEERS = (
    Contestant("null_blk", peers.null_blk, "kernel", "configfs, 2 queues, stores nothing"),
    Contestant("loop", peers.loop, "kernel", "losetup --direct-io=on, tmpfs", stores=True),
    Contestant("kublk null", peers.kublk("null"), "kublk", "-q 2 -d 128"),
    Contestant("kublk null -g", peers.kublk("null", "-g"), "kublk", "-q 2 -d 128, NEED_GET_DATA"),
    Contestant("kublk loop", peers.kublk("loop"), "kublk", "-q 2 -d 128, tmpfs", stores=True),
    Contestant(
        "kublk loop -g", peers.kublk("loop", "-g"), "kublk", "-q 2 -d 128, tmpfs, NEED_GET_DATA", stores=True
    ),
    Contestant(
        "nbdkit memory", peers.NBDKIT_MEMORY.start, "nbdkit", "2 connections; -t 1 at depth 1", stores=True
    ),
    Contestant(
        "nbdkit Python", peers.NBDKIT_PYTHON.start, "nbdkit", "2 connections; -t 1 at depth 1", stores=True
    ),
)


ALONE = (Contestant("worker null", ours.alone, "ublkpool", "answers worker, NEED_GET_DATA, no backend"),)

INSIDE = (
    Contestant("null inside", ours.inside("null"), "ublkpool", "isolation none, NEED_GET_DATA"),
    Contestant(
        "memory inside",
        ours.inside("memory", "backend"),
        "ublkpool",
        "isolation none, NEED_GET_DATA, placement backend",
        stores=True,
    ),
    Contestant(
        "file inside",
        ours.inside("file", file="path"),
        "ublkpool",
        "isolation none, NEED_GET_DATA, tmpfs",
        stores=True,
    ),
)
"""Engines inside the workers."""

ZERO_COPY = (
    Contestant("kublk null -z", peers.kublk("null", "-z"), "kublk", "-q 2 -d 128, SUPPORT_ZERO_COPY"),
    Contestant(
        "kublk loop -z",
        peers.kublk("loop", "-z"),
        "kublk",
        "-q 2 -d 128, tmpfs, SUPPORT_ZERO_COPY",
        stores=True,
    ),
    Contestant(
        "kublk loop --auto_zc",
        peers.kublk("loop", "--auto_zc"),
        "kublk",
        "-q 2 -d 128, tmpfs, AUTO_BUF_REG",
        stores=True,
    ),
    Contestant(
        "file inside zero copy",
        ours.inside("file", file="path", zero_copy=True),
        "ublkpool",
        "isolation none, AUTO_BUF_REG, tmpfs",
        stores=True,
    ),
)
"""On clients' own pages, where the kernel has that."""


def ours_over(transport: Transport) -> tuple[Contestant, ...]:
    """Ours over one transport; an empty transport leaves the choice to `ublkpool backend`."""

    def entry(name: str, start: Start, how: str, *, stores: bool = True) -> Contestant:
        full = f"{name}, {transport}" if transport else name
        return Contestant(full, start, "ublkpool", how, transport, stores)

    start, functions, batch = ours.backend, BACKENDS / "python_functions.py", BACKENDS / "python_batch.py"
    return (
        entry("null, pool", start("null", transport=transport), "NEED_GET_DATA", stores=False),
        entry(
            "null, backend",
            start("null", transport=transport, placement="backend"),
            "NEED_GET_DATA, placement backend",
            stores=False,
        ),
        entry("memory, pool", start("memory", transport=transport), "NEED_GET_DATA"),
        entry(
            "memory, backend",
            start("memory", transport=transport, placement="backend"),
            "NEED_GET_DATA, placement backend",
        ),
        entry("file, pool", start("file", transport=transport, file="path"), "NEED_GET_DATA, tmpfs"),
        entry(
            "file, backend",
            start("file", transport=transport, placement="backend", file="path"),
            "NEED_GET_DATA, placement backend, tmpfs",
        ),
        entry("Python functions", start(str(functions), transport=transport), "NEED_GET_DATA"),
        entry("Python batch", start(str(batch), transport=transport), "NEED_GET_DATA"),
    )


KERNEL_NBD = Contestant(
    "nbd-client", nbd_clients.kernel_client, "nbdkit", "nbd.ko, 2 connections", stores=True
)


def nbd_contestants(transports: Sequence[Transport], only: str = "") -> list[Contestant]:
    """The clients of one NBD server, or those whose names match the regular expression `only`."""
    found = [KERNEL_NBD, *(each for transport in transports for each in _nbd_over(transport))]
    return [each for each in found if re.search(only, each.name)]


def _nbd_over(transport: Transport) -> Iterator[Contestant]:
    options: Mapping[str, Mapping[str, object]] = {"nbd": {}, "nbd, unflushed=0": {"unflushed": 0}}
    for kind, given in options.items():
        name = f"{kind}, {transport}" if transport else kind
        start = nbd_clients.our_client(transport, **given)
        yield Contestant(name, start, "ublkpool", "NEED_GET_DATA, 2 connections", transport, stores=True)


# `stores`: a client takes its image's lock at its first write.
RBD_PEERS = (
    Contestant(
        "rbd-nbd", rbd_clients.rbd_nbd(), "nbd", "nbd.ko, as it comes: librbd's cache on", stores=True
    ),
    Contestant(
        "rbd-nbd, no cache",
        rbd_clients.rbd_nbd("--rbd_cache=false"),
        "nbd",
        "nbd.ko, rbd_cache=false",
        stores=True,
    ),
    Contestant(
        "rbd-nbd, our settings",
        rbd_clients.rbd_nbd("--rbd_cache=false", *(f"--{key}={value}" for key, value in LEAN.items())),
        "nbd",
        "nbd.ko, rbd_cache=false and what our backend sets for speed",
        stores=True,
    ),
    Contestant("qemu-nbd", rbd_clients.qemu_nbd, "nbd", "nbd.ko, --cache=none", stores=True),
    Contestant("krbd", rbd_clients.krbd, "kernel", "ms_mode=prefer-crc", stores=True),
)


def rbd_contestants(transports: Sequence[Transport], only: str = "") -> list[Contestant]:
    """The clients of one Ceph cluster, ours over rings if there are any."""
    transport = transports[-1]
    given: Mapping[str, Mapping[str, str]] = {"rbd": {}, "rbd, ceph_defaults=on": {"ceph_defaults": "on"}}
    own = [
        Contestant(
            f"{kind}, {transport}" if transport else kind,
            rbd_clients.our_rbd(transport, **options),
            "ublkpool",
            "NEED_GET_DATA",
            transport,
            stores=True,
        )
        for kind, options in given.items()
    ]
    inside = [
        Contestant(
            name,
            rbd_clients.our_rbd_inside(need_get_data=asks),
            "ublkpool",
            f"isolation none, NEED_GET_DATA {'on' if asks else 'off'}",
            stores=True,
        )
        for name, asks in {"rbd, inside": True, "rbd, inside, lent": False}.items()
    ]
    return [each for each in (*RBD_PEERS, *own, *inside) if re.search(only, each.name)]


def table_of(mode: str, transports: Sequence[Transport], only: str = "") -> list[Contestant]:
    """The contestants of a mode whose names match the regular expression `only`."""
    tables = {"nbd": nbd_contestants, "rbd": rbd_contestants}
    if mode in tables:
        return tables[mode](transports, only)
    return contestants(transports, only, peers.has_zero_copy(platform.release()))


def contestants(
    transports: Sequence[Transport], only: str = "", with_zero_copy: bool = False
) -> list[Contestant]:
    """All of them, or those whose names match the regular expression `only`."""
    zero_copy = ZERO_COPY if with_zero_copy else ()
    over = [each for transport in transports for each in ours_over(transport)]
    found = [*PEERS, *ALONE, *INSIDE, *zero_copy, *over]
    return [each for each in found if re.search(only, each.name)]


def quick(table: Sequence[Contestant]) -> list[Contestant]:
    """The contestants of mode quick; over ZeroMQ only the fastest and the slowest kind if rings are available."""
    has_rings = any(each.transport == "ring" for each in table)
    return [
        each for each in table if each.kind not in _NOT_QUICK and not (has_rings and _is_slower_way(each))
    ]


_NOT_QUICK = frozenset({"loop", "kublk null", "kublk loop"})
_QUICK_OVER_ZEROMQ = frozenset({"null, pool", "Python functions"})


def _is_slower_way(each: Contestant) -> bool:
    return each.transport == "zeromq" and each.kind not in _QUICK_OVER_ZEROMQ
