"""Starts the peers, each at its best setting: null_blk, loop, kublk, nbdkit over nbd.ko."""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bench.accounts import threads_named
from bench.cells import REGION_BYTES
from bench.ours import BACKENDS, QUEUES, Start
from bench.stage import Disk, Disks, Stage, StageError, process, run, wait_for

_NULL_BLK = Path("/sys/kernel/config/nullb")
_CONFIGFS = Path("/sys/kernel/config")
_NBDS = 16


def load_module(name: str) -> None:
    """Load a kernel module.  Raises `StageError` if this kernel has it neither as a module nor built in."""
    if not Path(f"/sys/module/{name}").exists():
        run("modprobe", *os.environ.get("MODPROBE_OPTIONS", "").split(), name)


@contextmanager
def null_blk(stage: Stage, name: str) -> Iterator[Disks]:
    """The kernel's null disk: the cost of the block layer and fio alone."""
    load_module("configfs")
    if not _CONFIGFS.is_mount():
        run("mount", "-t", "configfs", "configfs", str(_CONFIGFS))
    if not Path("/sys/module/null_blk").exists():
        run("modprobe", *os.environ.get("MODPROBE_OPTIONS", "").split(), "null_blk", "nr_devices=0")
    directory = _NULL_BLK / name
    directory.mkdir()
    try:
        settings = {"submit_queues": QUEUES, "hw_queue_depth": 128, "size": REGION_BYTES >> 20, "power": 1}
        for key, value in settings.items():
            (directory / key).write_text(str(value))
        yield Disks(Disk(f"/dev/{_null_blk_node(directory, name)}", {}))
    finally:
        (directory / "power").write_text("0")
        directory.rmdir()


def _null_blk_node(directory: Path, name: str) -> str:
    if Path(f"/sys/block/{name}").exists():
        return name
    return f"nullb{(directory / 'index').read_text().strip()}"


@contextmanager
def loop(stage: Stage, name: str) -> Iterator[Disks]:
    """The kernel's loop on a file on tmpfs, with direct I/O like the other contestants."""
    load_module("loop")
    image = stage.make_file(f"{name}.img")
    before = set(threads_named("loop"))
    node = run("losetup", "--find", "--show", "--direct-io=on", image).strip()
    try:
        yield Disks(Disk(node, {"kernel": sorted(set(threads_named("loop")) - before)}))
    finally:
        run("losetup", "--detach", node)


def kublk(kind: str, *flags: str) -> Start:
    """The kernel's own server from tools/testing/selftests/ublk."""

    @contextmanager
    def start(stage: Stage, name: str) -> Iterator[Disks]:
        number = stage.next_number()
        files = [str(stage.make_file(f"{name}.img"))] if kind == "loop" else []
        add = ["add", "-t", kind, "-q", str(QUEUES), "-d", "128", "-n", str(number), *flags, *files]
        run(stage.kublk, *add)
        try:
            node = f"/dev/ublkb{number}"
            wait_for(lambda: _is_block_device(node), f"{node} appears")
            said = run(stage.kublk, "list", "-n", str(number))
            server = re.search(r"daemon pid (\d+)", said)
            yield Disks(Disk(node, {"server": [int(server.group(1))] if server else []}))
        finally:
            run(stage.kublk, "del", "-n", str(number))

    return start


def has_zero_copy(release: str) -> bool:
    """Whether a kernel of this release has AUTO_BUF_REG: the driver, which knows, may not be loaded yet."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is not None and tuple(map(int, found.groups())) >= (6, 16)


def _is_block_device(path: str) -> bool:
    with suppress(FileNotFoundError):
        return stat.S_ISBLK(Path(path).stat().st_mode)
    return False


@contextmanager
def nbd_client(socket: Path, connections: int = QUEUES) -> Iterator[str]:
    """The node of a disk of nbd.ko, connected to the server at a unix socket."""
    node = free_nbd()
    run("nbd-client", "-unix", str(socket), node, "-C", str(connections), "-N", "")
    try:
        wait_for(lambda: Path(f"/sys/block/{Path(node).name}/pid").exists(), f"{node} is connected")
        yield node
    finally:
        run("nbd-client", "-d", node)


class Nbdkit(NamedTuple):
    """A plugin and its parameters."""

    plugin: str
    parameters: tuple[str, ...]

    @contextmanager
    def _disk(self, stage: Stage, name: str, *options: str) -> Iterator[Disk]:
        socket = stage.directory / f"{name}.sock"
        log = stage.directory / f"{name}.log"
        command: list[str | Path] = ["nbdkit", "-f", "-U", socket, *options, self.plugin, *self.parameters]
        with process(command, log) as pid:
            wait_for(socket.exists, f"nbdkit {self.plugin} listens")
            with nbd_client(socket) as node:
                yield Disk(node, {"server": [pid]}, log=log)

    @contextmanager
    def start(self, stage: Stage, name: str) -> Iterator[Disks]:
        """nbdkit twice: at depth 1 a single thread is faster."""
        load_module("nbd")
        with self._disk(stage, name) as disk, self._disk(stage, f"{name}-t1", "-t", "1") as at_depth_1:
            yield Disks(disk, at_depth_1)


def free_nbd() -> str:
    """The node of a disk of nbd.ko that is not connected.  Raises `StageError`."""
    for index in range(_NBDS):
        if not Path(f"/sys/block/nbd{index}/pid").exists():
            return f"/dev/nbd{index}"
    raise StageError(f"all {_NBDS} nbd devices are in use")


NBDKIT_MEMORY = Nbdkit("memory", (str(REGION_BYTES), "allocator=malloc"))
NBDKIT_PYTHON = Nbdkit("python", (str(BACKENDS / "nbdkit_memory.py"), f"size={REGION_BYTES}"))
