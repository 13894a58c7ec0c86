"""Starts the contestants of mode rbd: clients of one Ceph cluster, each on an image of its own with the same content.

An image each, because ours keeps its image's exclusive lock.  Idle clients are not stopped: the cluster would end the
watch of one that is silent for 30 s, and with it its lock.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from bench import ours
from bench.accounts import Threads
from bench.ours import Start
from bench.peers import free_nbd, load_module
from bench.results import CLUSTER, Transport
from bench.stage import Disk, Disks, Stage, StageError, process, wait_for
from support.ceph.cluster import CLIENT, POOL, Cluster, Shape
from support.ceph.serving import let_workers_read, options

LIBRBD = "librbd"
LIBRBD_THREADS = (
    *("msgr-worker", "io_context_pool", "ms_dispatch", "ms_local", "safe_timer", "ceph_timer"),
    *("taskfin_librbd", "tp_librbd", "service", "log"),
)
"""How the threads of librbd and librados are named."""
_FEATURES = "layering,exclusive-lock"
_KRBD = Path("/sys/bus/rbd")


def _cluster(stage: Stage) -> Cluster:
    """The one cluster: a monitor and an OSD in memory, which keeps each object once."""

    def make() -> AbstractContextManager[Cluster]:
        shape = Shape(stores=("memstore",), replicas=1, settings={"mon_allow_pool_size_one": "true"})
        return Cluster(stage.directory / "cluster", shape)

    return stage.shared_context(CLUSTER, make)


def _image(stage: Stage, name: str) -> Cluster:
    """The cluster, with an image of this name all of whose blocks are written."""
    cluster = _cluster(stage)
    content = stage.make_file(f"{name}.img")
    cluster.rbd("import", "--image-feature", _FEATURES, str(content), f"{POOL}/{name}")
    content.unlink()
    return cluster


def _disks(
    cluster: Cluster, node: str, parts: dict[str, list[int]], device: str = "", log: Path | None = None
) -> Disks:
    """The disk of a client with these processes."""
    clients = [pid for pids in parts.values() for pid in pids]
    servers = [cluster.servers.pid(name) for name in cluster.servers.alive()]
    threads = {LIBRBD: Threads(clients, LIBRBD_THREADS)} if clients else {}
    return Disks(Disk(node, {**parts, CLUSTER: servers}, device, log, threads), may_sleep=False)


@contextmanager
def _nbd_server(stage: Stage, name: str, node: str, command: list[str]) -> Iterator[Disks]:
    """A process in the foreground that connects itself to a disk of nbd.ko."""
    log = stage.directory / f"{name}.log"
    with process(command, log) as pid:
        wait_for(lambda: Path(f"/sys/block/{Path(node).name}/pid").exists(), f"{node} is connected")
        yield _disks(_cluster(stage), node, {"server": [pid]}, log=log)


def rbd_nbd(*settings: str) -> Start:
    """Ceph's rbd-nbd, with these settings of librbd."""

    @contextmanager
    def start(stage: Stage, name: str) -> Iterator[Disks]:
        load_module("nbd")
        cluster, node = _image(stage, name), free_nbd()
        given = ["-c", str(cluster.conf), "--id", CLIENT, "--log-file=", *settings]
        command = ["rbd-nbd", *given, "-f", "--device", node, "map", f"{POOL}/{name}"]
        with _nbd_server(stage, name, node, command) as disks:
            yield disks

    return start


@contextmanager
def qemu_nbd(stage: Stage, name: str) -> Iterator[Disks]:
    """qemu-nbd with QEMU's driver for rbd, and without a cache."""
    load_module("nbd")
    cluster, node = _image(stage, name), free_nbd()
    socket = stage.directory / f"{name}.sock"
    source = f"rbd:{POOL}/{name}:id={CLIENT}:conf={cluster.conf}"
    # With -v it stays in the foreground.
    command = ["qemu-nbd", "-k", str(socket), "-c", node, "-f", "raw", "--cache=none", "-v", source]
    with _nbd_server(stage, name, node, command) as disks:
        yield disks


@contextmanager
def krbd(stage: Stage, name: str) -> Iterator[Disks]:
    """The kernel's own client."""
    load_module("rbd")
    cluster = _image(stage, name)
    key = cluster.command("auth get-key", entity=f"client.{CLIENT}")["key"]
    monitor = cluster.monitor_addresses[0].removeprefix("v2:")
    wanted = f"{monitor} name={CLIENT},secret={key},ms_mode=prefer-crc {POOL} {name} -"
    (_KRBD / "add_single_major").write_text(wanted)
    number = _krbd_number(name)
    try:
        yield _disks(cluster, f"/dev/rbd{number}", {})
    finally:
        (_KRBD / "remove_single_major").write_text(number)


def _krbd_number(image: str) -> str:
    for each in (_KRBD / "devices").iterdir():
        if (each / "name").read_text().strip() == image:
            return each.name
    raise StageError(f"the kernel has no device of the image {image}")


def our_rbd_inside(**config: Any) -> Start:
    """The same engine inside the device's one worker."""

    @contextmanager
    def start(stage: Stage, name: str) -> Iterator[Disks]:
        cluster = _image(stage, name)
        let_workers_read(cluster)
        with ours.inside("rbd", options=options(cluster, name), queues=1, **config)(stage, name) as disks:
            disk = disks.all()[0]
            parts = {part: list(pids) for part, pids in disk.parts.items()}
            yield _disks(cluster, disk.node, parts, disk.device, disk.log)

    return start


def our_rbd(transport: Transport, **more: str) -> Start:
    """The backend rbd, with these options besides its image's."""

    @contextmanager
    def start(stage: Stage, name: str) -> Iterator[Disks]:
        cluster = _image(stage, name)
        given = options(cluster, name, **more)
        with ours.backend("rbd", transport=transport, options=given)(stage, name) as disks:
            disk = disks.all()[0]
            parts = {part: list(pids) for part, pids in disk.parts.items()}
            yield _disks(cluster, disk.node, parts, disk.device, disk.log)

    return start
