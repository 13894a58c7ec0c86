"""Starts the contestants of mode nbd: clients of one NBD server, which all of them share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import ours
from bench.ours import QUEUES, Start
from bench.peers import NBDKIT_MEMORY, load_module, nbd_client
from bench.results import Transport
from bench.stage import NBDKIT, Disk, Disks, Stage, wait_for


def shared_nbdkit(stage: Stage) -> tuple[Path, int]:
    """The unix socket and the pid of the one nbdkit with a memory disk, its threads left at nbdkit's default."""
    socket = stage.directory / "shared.sock"
    command: list[str | Path] = [
        "nbdkit",
        "-f",
        "-U",
        socket,
        NBDKIT_MEMORY.plugin,
        *NBDKIT_MEMORY.parameters,
    ]
    pid = stage.shared_process(NBDKIT, command)
    wait_for(socket.exists, "the shared nbdkit listens")
    return socket, pid


@contextmanager
def kernel_client(stage: Stage, name: str) -> Iterator[Disks]:
    """nbd.ko, connected by nbd-client."""
    load_module("nbd")
    socket, pid = shared_nbdkit(stage)
    with nbd_client(socket) as node:
        yield Disks(Disk(node, {NBDKIT: [pid]}, log=stage.log_of(NBDKIT)))


def our_client(transport: Transport, **options: object) -> Start:
    """The backend nbd with as many connections as nbd.ko, and with these further options."""

    @contextmanager
    def start(stage: Stage, name: str) -> Iterator[Disks]:
        socket, pid = shared_nbdkit(stage)
        given = {"socket": socket, "connections": QUEUES, **options}
        with ours.backend("nbd", transport=transport, options=given)(stage, name) as disks:
            yield Disks(*(_with_server(each, pid) for each in disks.all()))

    return start


def _with_server(disk: Disk, pid: int) -> Disk:
    return Disk(disk.node, {**disk.parts, NBDKIT: [pid]}, disk.device, disk.log)
