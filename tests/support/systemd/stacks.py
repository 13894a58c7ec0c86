"""LVM, LUKS, md and swap on our disks: they go on while backends, workers and the daemon are killed under them.

Runs in the systemd guest as one step of a boot.
"""

import mmap
import multiprocessing
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from support.systemd.devices import backend_pid, client, device, is_live
from support.systemd.facts import eventually, running_fio, say, shell, units, writes_go_on
from ublkpool.daemon.settings.config import BackendConfig, DeviceConfig
from ublkpool.daemon.status import DeviceStatus

MIB = 1 << 20
SIZES = {"lvm": "32M", "half0": "24M", "half1": "24M", "swap": "96M"}
VOLUME, CRYPTED, ARRAY = "/dev/stack/plain", "/dev/mapper/stack-crypted", "/dev/md/stack"
KEY = Path("/run/stack-key")
GROUP = Path("/sys/fs/cgroup/stack")
GROUP_HIGH_BYTES = 16 * MIB
TOUCHED_BYTES = 24 * MIB
_FORK = multiprocessing.get_context("fork")
_STAMP = struct.Struct("<QQ")
FIO = (
    *("fio", "--ioengine=libaio", "--direct=1", "--rw=randwrite", "--bs=4k", "--iodepth=4", "--size=8M"),
    # fio writes until it is interrupted, each block once, and verifies along the way.
    *("--rate=100k", "--time_based", "--runtime=3600", "--verify=crc32c", "--verify_backlog=16"),
    "--output-format=json",
    *(
        word
        for name, path in (("lvm", VOLUME), ("crypt", CRYPTED), ("md", ARRAY))
        for word in (f"--name={name}", f"--filename={path}")
    ),
)


class Broken(Exception):
    """A command that a step needs has failed."""


def must(*command: str) -> None:
    """Run a command.  Raises `Broken` with its output if it fails."""
    done = shell(*command)
    if done["status"]:
        raise Broken(f"{' '.join(command)} ended with {done['status']}:\n{done['said']}")


def disk(name: str) -> str:
    """The lasting path of a device."""
    return f"/dev/ublkpool/{name}"


def node(name: str) -> str:
    """The kernel's name of a device's disk, for which no daemon need answer."""
    return Path(disk(name)).readlink().name


def add(name: str) -> None:
    """A disk in the memory of its backend."""
    client.add(DeviceConfig(name=name, backend=BackendConfig(kind="memory", options={"size": SIZES[name]})))


def build() -> None:
    """LVM on one disk, with LUKS on one of its volumes; a mirror of two disks; swap."""
    with ThreadPoolExecutor(len(SIZES)) as threads:
        list(threads.map(add, SIZES))
    eventually(lambda: all(Path(disk(name)).exists() for name in SIZES), "links to the disks")
    must("pvcreate", "-q", disk("lvm"))
    must("vgcreate", "-q", "stack", disk("lvm"))
    must("lvcreate", "-q", "-L", "8M", "-n", "plain", "stack")
    must("lvcreate", "-q", "-l", "100%FREE", "-n", "luks", "stack")
    KEY.write_bytes(b"a key for a test")
    derived = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", str(KEY))
    sizes = ("--luks2-metadata-size", "16k", "--luks2-keyslots-size", "512k")
    must("cryptsetup", "luksFormat", "--batch-mode", *derived, *sizes, "/dev/stack/luks")
    must("cryptsetup", "open", "--key-file", str(KEY), "/dev/stack/luks", Path(CRYPTED).name)
    halves = (disk("half0"), disk("half1"))
    mirror = ("--level=1", "--raid-devices=2", "--metadata=1.2", "--bitmap=internal", "--assume-clean")
    must("mdadm", "--create", ARRAY, "--run", *mirror, *halves)
    must("mkswap", disk("swap"))
    must("swapon", disk("swap"))


def take_apart() -> None:
    """Remove all layers, in the order in which they lie on each other; then the disks."""
    must("swapoff", disk("swap"))
    must("mdadm", "--stop", ARRAY)
    must("cryptsetup", "close", Path(CRYPTED).name)
    must("vgremove", "-q", "-f", "stack")
    must("pvremove", "-q", disk("lvm"))
    client.delete(list(SIZES))
    say("stacks left", shell("dmsetup", "ls")["said"])


def swapped_in() -> int:
    """How many pages have come back from swap since the boot."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("pswpin "))


class Churn:
    """A process with more memory than its group may have, so that its pages go to swap and come back, each checked."""

    def __init__(self) -> None:
        self._shared = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        GROUP.mkdir()
        # Not `memory.max`: the kernel would kill while all pages are on their way to a disk without a server.
        (GROUP / "memory.high").write_text(str(GROUP_HIGH_BYTES))
        self._swapped_in = swapped_in()
        self._process = _FORK.Process(target=self._run, daemon=True)
        self._process.start()

    def _run(self) -> None:
        (GROUP / "cgroup.procs").write_text(str(os.getpid()))
        memory = mmap.mmap(-1, TOUCHED_BYTES)
        while not self._shared[1]:
            last = self._shared[0]
            for page in range(TOUCHED_BYTES // mmap.PAGESIZE):
                at = page * mmap.PAGESIZE
                expected = (last, page) if last else (0, 0)
                found = _STAMP.unpack_from(memory, at)
                if found != expected:
                    raise ValueError(f"page {page} came back from swap with {found}, not {expected}")
                _STAMP.pack_into(memory, at, last + 1, page)
            self._shared[0] = last + 1

    def goes_on(self, what: str) -> None:
        """Wait until every page has come back once more."""
        enough = self._shared[0] + 2
        eventually(lambda: self._shared[0] >= enough or not self._process.is_alive(), what)

    def end(self) -> None:
        """Let the process end; say how."""
        self._shared[1] = 1
        self._process.join()
        pages = swapped_in() - self._swapped_in
        say("swap churn", {"status": self._process.exitcode, "rounds": self._shared[0], "swapped in": pages})
        eventually(lambda: not (GROUP / "cgroup.procs").read_text(), "the group is empty")
        GROUP.rmdir()


class Load(NamedTuple):
    """What uses all four layers."""

    fio: "subprocess.Popen[str]"
    churn: Churn

    def goes_on(self, what: str) -> None:
        """Wait until every disk has written more than can have been in flight before, and swap has been read."""
        for name in ("lvm", "half0", "half1"):
            writes_go_on(f"{name} writes {what}", node(name))
        self.churn.goes_on(f"swap goes on {what}")


@contextmanager
def loaded() -> Iterator[Load]:
    """Use all layers for the length of a block; say what fio found."""
    with running_fio("stacks fio", FIO) as fio:
        churn = Churn()
        try:
            yield Load(fio, churn)
        finally:
            churn.end()


def kill_everything_once(load: Load) -> None:
    """Kill all backends, then the daemon, then all workers; the layers go on after each."""
    load.goes_on("at first")
    before = {name: backend_pid(name) for name in SIZES}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    for name, pid in before.items():
        eventually(partial(is_live, name, pid), f"{name} has another backend")
    load.goes_on("after the backends' deaths")
    daemon = int(units("ublkpool.service")["ublkpool.service"]["MainPID"])
    os.kill(daemon, signal.SIGKILL)
    eventually(lambda: new_daemon(daemon) and all(map(is_live, SIZES)), "the next daemon has taken over")
    load.goes_on("after the daemon's death")
    epochs = {name: kill_workers(name) for name in SIZES}
    for name, epoch in epochs.items():
        eventually(partial(is_later, name, epoch), f"{name} is recovered")
    load.goes_on("after the workers' deaths")
    say("stacks ran through", load.fio.poll() is None)


def new_daemon(pid: int) -> bool:
    """Whether systemd has started another daemon."""
    return int(units("ublkpool.service")["ublkpool.service"]["MainPID"]) not in (0, pid)


def kill_workers(name: str) -> int:
    """Kill a device's workers; returns the epoch that they served."""
    found = status(name)
    for each in found.workers:
        os.kill(each.pid, signal.SIGKILL)
    return found.epoch


def status(name: str) -> DeviceStatus:
    """A device's status, as soon as a daemon answers."""
    answers: list[DeviceStatus] = []

    def is_answered() -> bool:
        found = device(name)
        if found is not None:
            answers.append(found)
        return found is not None

    eventually(is_answered, f"a daemon answers about {name}")
    return answers[0]


def is_later(name: str, epoch: int) -> bool:
    """Whether the device is live in a later epoch."""
    found = device(name)
    return found is not None and found.epoch > epoch and is_live(name)


def stacks() -> None:
    """Build the layers, use them while everything below is killed once, look at them, take them apart."""
    build()
    with loaded() as load:
        kill_everything_once(load)
    say("mirror", shell("mdadm", "--detail", ARRAY)["said"])
    say("volume check", shell("vgck", "stack"))
    take_apart()
